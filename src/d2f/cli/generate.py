"""`d2f generate`: answer one prompt, or a file of prompts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2f.cli.console import explain_blank, log
from d2f.cli.decoding_options import Decoding, with_option_groups
from d2f.cli.usage import UsageError, usage
from d2f.errors import RequestError, counted

if TYPE_CHECKING:
    from d2f.cli.prompt_file import PromptFile
    from d2f.engine.engine import Engine
    from d2f.engine.request import Request
    from d2f.models.transformer import Transformer
    from d2f.text import Tokenizer
    from d2f.training.pairs import Message, Prompt

_WARM_TOKENS = 8
ANSWER_COLUMNS = (
    "messages", "row", "sample", "seed", "num_tokens", "num_forwards", "finish_reason",
)  # fmt: skip
"""Columns of an answer's line beside its text, whose column must have another name."""

PromptArgument = Annotated[
    str | None,
    typer.Argument(
        help="The prompt, which may begin with a dash; - alone reads it from stdin.",
        show_default=False,
    ),
]
StreamOption = Annotated[bool, typer.Option("--stream", help="Print text as it is certain.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object; with --input, a summary.")
]


@dataclass(frozen=True, kw_only=True)
class BulkOptions:
    """A file of prompts to answer, the file for the answers, and how they are made."""

    input: Annotated[
        Path | None,
        typer.Option(
            help="A file of prompts (.jsonl, .json, .parquet); needs --output.", metavar="FILE"
        ),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(help="--input: where a line for each answer goes.", metavar="FILE"),
    ] = None
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="--input: what a column holds, as prompt=question, messages=conversations or any "
            "other name in data.columns of a training recipe; repeatable.",
            metavar="WHAT=NAME",
        ),
    ] = None
    n: Annotated[int | None, typer.Option(help="--input: answers of a row.", min=1)] = None
    batch_size: Annotated[
        int | None,
        typer.Option(help="--input: answers at a time. Default: 16, on a GPU 128.", min=1),
    ] = None
    fresh: Annotated[
        bool, typer.Option("--fresh", help="--input: throw away what an earlier run has answered.")
    ] = False

    def source(self, prompt: str | None, *, stream: bool) -> PromptFile | None:
        """Check the options and return the file of prompts; None if one prompt is given."""
        if self.input is None:
            if prompt is None:
                raise typer.BadParameter(
                    "there is nothing to answer; give a PROMPT, or --input FILE"
                )
            for field in fields(self):
                if getattr(self, field.name):
                    option = "--" + field.name.replace("_", "-")
                    raise UsageError(f"{option}: without effect without --input")
            return None
        if prompt is not None:
            raise UsageError("a PROMPT and --input exclude each other")
        output = self.output
        if output is None:
            raise UsageError("--input needs --output, the file for the answers")
        if stream:
            raise UsageError("--stream: without effect with --input")
        if str(output) == "-":
            raise UsageError("--output -: answers go to a file, so that a run can go on; name one")
        if output.resolve() == self.input.resolve() or _is_link_to(output, self.input):
            raise UsageError(f"--output {output} is the file with the prompts; name another")
        return _read_source(self.input, self.column or ())


def _is_link_to(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _read_source(path: Path, words: Sequence[str]) -> PromptFile:
    # Imported here: these modules import torch, and `d2f --help` must start fast.
    from d2f.cli.prompt_file import PromptFile
    from d2f.recipe import from_table
    from d2f.training.sections import ColumnConfig

    table = {}
    for word in words:
        what, equals, name = word.partition("=")
        if not equals or not what or not name:
            raise UsageError(f"--column {word!r}: write it as WHAT=NAME, prompt=question say")
        table[what] = name
    if table.get("response") in ANSWER_COLUMNS:
        raise UsageError(
            f"--column response={table['response']}: an answer's line has another column of this "
            f"name, as it has {', '.join(ANSWER_COLUMNS)}; name another"
        )
    with usage():
        return PromptFile(path=path, columns=from_table(ColumnConfig, table, "--column"))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of `d2f generate` as the user gave them, without the prompts."""

    decoding: Decoding
    options: dict[str, Any]
    """Options of the strategy."""
    top_k: Annotated[int, typer.Option(help="Sample among this many tokens; 0: among all.")] = 0
    top_p: Annotated[float, typer.Option(help="Sample among the top tokens of this mass.")] = 1.0
    min_p: Annotated[
        float,
        typer.Option(help="Sample among tokens of at least this share of the largest probability."),
    ] = 0.0
    stop: Annotated[
        list[str] | None,
        typer.Option(help="The text ends before this; repeatable.", metavar="TEXT"),
    ] = None
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Apply the model's chat template.")
    ] = None
    system: Annotated[
        str | None, typer.Option(help="A system message, by the chat template.", metavar="TEXT")
    ] = None

    @cached_property
    def request(self) -> Request:
        """The request without a prompt and without what depends on the model."""
        names = ("options", "top_k", "top_p", "min_p")
        more = {name: getattr(self, name) for name in names}
        return self.decoding.request(stop=tuple(self.stop or ()), **more)

    def check(self) -> None:
        """Refuse options that fit no model, before one is loaded."""
        if self.system is not None and self.chat is False:
            raise UsageError("--system: without effect with --no-chat")
        self.decoding.check(self.request)

    def load(self, dtype: str | None = None) -> tuple[Transformer, Tokenizer, Request]:
        """Load as `Decoding.load` does, for prompts of the form that the options say."""
        model, tokenizer, request = self.decoding.load(self.request, dtype)
        if tokenizer.chat_template is None and (self.chat or self.system is not None):
            option = "--chat" if self.chat else "--system"
            raise UsageError(
                f"{option}: this model has no chat template; pass the prompt without it"
            )
        if self.system is not None and "system" in tokenizer.left_out:
            raise UsageError(
                "--system: this model's chat template leaves system messages out; pass the prompt "
                "without it"
            )
        return model, tokenizer, request

    def prompt_ids(self, tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, rendered by the chat template if it is used.

        A system message in the prompt wins over that of the options.
        """
        from d2f.training.sources import encode_prompt

        if self.system is not None:
            messages: list[Message] = (
                [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
            )
            if messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": self.system})
            prompt = messages
        return encode_prompt(tokenizer, prompt, self.chat)

    def settings(self) -> dict[str, Any]:
        """Return all options on which answers depend, except for the model's files."""
        given = {**vars(self.decoding.choice), **vars(self.decoding), **vars(self)}
        names = (
            "strategy", "options", "max_new_tokens", "temperature", "top_k", "top_p", "min_p",
            "seed", "chat", "system", "replace_eos", "dtype",
        )  # fmt: skip
        lists = {name: list(given[name] or ()) for name in ("stop", "eos")}
        return {name: given[name] for name in names} | lists | {"policy": given["changed"]}


@with_option_groups
def generate_command(
    *,
    prompt: PromptArgument = None,
    asked: Asked,
    stream: StreamOption = False,
    as_json: JsonOption = False,
    in_bulk: BulkOptions,
) -> None:
    """Answer one prompt, or a file of them. Text goes to stdout, statistics to stderr.

    The clock runs from the prompt to the last token, once the model is loaded and warm. A run with
    --input that was stopped goes on with the same command.

    Example:  d2f generate "Tom has 5 apples. Ann has 3 times as many apples as Tom. How many
    apples does Ann have?"

    Example:  d2f generate --input prompts.jsonl --output answers.jsonl
    """
    if stream and as_json:
        raise UsageError("--stream and --json exclude each other")
    source = in_bulk.source(prompt, stream=stream)
    asked.check()
    if source is not None:
        from d2f.cli.generate_bulk import answer_file

        answer_file(source, in_bulk, asked, as_json)
    elif prompt is not None:
        _answer_one(_read(prompt), asked, stream, as_json)


def _answer_one(prompt: str, asked: Asked, stream: bool, as_json: bool) -> None:
    from d2f.engine.engine import Engine, EngineConfig
    from d2f.engine.response_text import ResponseText

    model, tokenizer, request = asked.load()
    request = asked.decoding.limited(request, model.spec, asked.prompt_ids(tokenizer, prompt))
    engine = Engine(model, EngineConfig(), tokenizer)
    _warm_up(engine, request)
    response = ResponseText(tokenizer, eos_token_ids=model.spec.eos_token_ids, stop=request.stop)
    text, result = "", None
    start = time.perf_counter()
    if stream:
        for output in engine.stream(request):
            result = output.result
            more = response.grow(output.token_ids)
            typer.echo(more, nl=False)
            text += more
    else:
        [result] = engine.generate([request])
    seconds = time.perf_counter() - start
    assert result is not None
    rest = response.end(result.token_ids)
    text += rest
    count, forwards = len(result.token_ids), result.num_forwards
    if as_json:
        facts = {
            "text": text,
            "token_ids": result.token_ids,
            "num_tokens": count,
            "num_forwards": forwards,
            "tokens_per_forward": result.tokens_per_forward,
            "seconds": seconds,
            "tokens_per_second": count / seconds,
            "finish_reason": result.finish_reason,
        }
        typer.echo(json.dumps(facts))
        return
    typer.echo(rest if stream else text)
    explain_blank(text)
    log.print(
        f"{counted(count, 'token')} in {counted(forwards, 'forward')} "
        f"({result.tokens_per_forward:.1f} per forward), {seconds:.3f} s, "
        f"{count / seconds:.0f} tokens/s, ended by {result.finish_reason}",
        style="dim",
    )


def _read(prompt: str) -> str:
    # As in a shell's $(…), newlines at the end are dropped: `echo … | d2f generate -` adds one.
    text = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
    if not text.strip():
        where = " on stdin" if prompt == "-" else ""
        raise RequestError(f"the prompt{where} is empty; write what the model is to answer")
    return text


def _warm_up(engine: Engine, request: Request) -> None:
    """Run a short request first: the first forward of a process is slow, and is not timed."""
    few = replace(
        request,
        prompt_ids=list(request.prompt_ids[:1]),
        max_new_tokens=min(_WARM_TOKENS, request.max_new_tokens),
        stop=(),
        options={},  # some options are refused for so short an answer
    )
    engine.generate([few])
    engine.forget_prompts()
