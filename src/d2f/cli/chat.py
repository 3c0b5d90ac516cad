"""`d2f chat`: a conversation in the terminal that shows each answer while it is decoded."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from d2f.cli.console import explain_blank, log, out, say
from d2f.cli.decoding_options import Decoding, with_option_groups
from d2f.cli.usage import usage
from d2f.errors import D2FError, RequestError, counted, unknown_name

if TYPE_CHECKING:
    from d2f.cli.chat_session import ChatSession
    from d2f.decoding.batch import GenerationResult
    from d2f.text import Tokenizer

ONE_BY_ONE = ("autoregressive", "vanilla")
"""Strategies that decode one token in each forward."""
ONE_BY_ONE_SECONDS = 0.03
SlowOption = Annotated[
    float | None,
    typer.Option(
        help="Seconds that each forward takes at least, to be seen; 0: as fast as it is. "
        "Default: 0.25, 0.03 where a forward gives one token.",
        min=0.0,
    ),
]
HistoryOption = Annotated[
    bool | None,
    typer.Option(
        "--history/--no-history",
        help="Tell the model what was said before. Default: if its chat template takes that; the "
        "shipped models' does not, since they were trained on single questions.",
    ),
]
_COMMANDS = {
    "/help": "this list",
    "/clear": "forget the conversation",
    "/policy NAME=VALUE …": "change the decoding policy; alone: show it; reset: the model's own",
    "/strategy NAME [OPTION=VALUE …]": "decode with another strategy; alone: show it",
    "/race [PROMPT]": "one prompt (the last) through all strategies of this model",
    "/example": "ask one of the problems that the shipped models can solve",
    "/quit": "leave, as Ctrl-D does; Ctrl-C stops an answer, twice it leaves",
}


@with_option_groups
def chat_command(
    *,
    decoding: Decoding,
    history: HistoryOption = None,
    slow: SlowOption = None,
) -> None:
    """Talk with a model and watch its blocks decode, slowed down so that one can follow.

    The final text comes with its statistics, by the clock that was not slowed down. A model whose
    chat template takes it is told the conversation so far; to another, and to the shipped ones,
    which were trained on single questions, each message stands alone.
    Messages may also be piped in, one a line; then there are no blocks, and nothing is slowed.

    Example:  d2f chat --strategy serial --slow 0.5
    """
    decoding.check(decoding.request())
    model, tokenizer, request = decoding.load(decoding.request())
    from d2f.cli.chat_session import ChatSession

    assert request.strategy is not None
    with usage():
        session = ChatSession(
            model=model,
            tokenizer=tokenizer,
            strategy=request.strategy,
            changed=decoding.changed,
            max_new_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            seed=decoding.seed,
            remembers=_remembers(history, tokenizer),
        )
        session.change_strategy(request.strategy, [])
    chat = Chat(session, slow)
    chat.welcome()
    if not chat.run() and not chat.is_live:
        raise typer.Exit(1)


def _remembers(history: bool | None, tokenizer: Tokenizer) -> bool:
    if history is not None:
        return history
    return tokenizer.chat_template is not None and "history" not in tokenizer.left_out


class LeaveAtOnce(Exception):
    """The user ends the conversation with a second Ctrl-C."""


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Only note the first Ctrl-C, of which the function tells; at the second `LeaveAtOnce`."""
    count = 0

    def note(_number: int, _frame: FrameType | None) -> None:
        # An exception could interrupt a step of the engine; the loop asks after each.
        nonlocal count
        count += 1
        if count > 1:
            raise LeaveAtOnce

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, previous)


class Chat:
    """Reads lines, carries out commands, and shows answers.

    Each forward is shown for at least `slow` seconds; None: as long as the strategy wants.
    """

    def __init__(self, session: ChatSession, slow: float | None) -> None:
        self.session = session
        self.is_live = sys.stdin.isatty() and out.is_terminal and not out.is_dumb_terminal
        """Whether a person types and reads; else input or output is a pipe or file."""
        self._slow = slow
        self._last = ""
        self._examples: list[str] = []

    def welcome(self) -> None:
        """Print the model's facts, and whether it is told the conversation."""
        from d2f.cli.live import SIGNS, legend

        model, tokenizer = self.session.model, self.session.tokenizer
        spec = model.spec
        if self.is_live:
            log.print(
                f"[bold]d2f chat[/bold]  a {spec.architecture.name} model of "
                f"{spec.num_parameters / 1e6:,.1f}M parameters on {model.device}, "
                f"{str(model.dtype).removeprefix('torch.')}, strategy {self.session.strategy}"
            )
            log.print(legend())
            log.print(SIGNS, style="dim")
        if not self.session.remembers:
            single = "history" in tokenizer.left_out
            reason = "a model of single questions" if single else "no history"
            reason = reason if tokenizer.chat_template is not None else "no chat template"
            log.print(f"{reason}: each message stands alone", style="dim")
        if self.is_live:
            log.print("/example asks something it can answer, /help lists commands", style="dim")
            with suppress(ImportError):  # the import enables editing and the keys of earlier lines
                import readline  # noqa: F401

    def run(self) -> bool:
        """Answer lines until the input ends; return whether all succeeded."""
        well, pressed = True, False
        while True:
            try:
                line = self._read()
                pressed = False
                well &= self._heed(line.strip())
            except LeaveAtOnce:
                raise KeyboardInterrupt from None
            except (EOFError, StopIteration):
                return well
            except KeyboardInterrupt:
                if pressed or not self.is_live:
                    raise
                pressed = True
                log.print("\nCtrl-C again leaves, as does Ctrl-D", style="dim")

    def _read(self) -> str:
        if self.is_live:
            log.print()
            return input("> ")
        return next(sys.stdin)

    def _heed(self, line: str) -> bool:
        """Carry out a command or answer a message; return whether it succeeded."""
        if not line:
            return True
        try:
            if line.startswith("/"):
                name, *words = line.split()
                known = [usage.split()[0] for usage in _COMMANDS]
                if name not in known:
                    raise RequestError(unknown_name("command", name, known))
                # The method of a command has its name: `_help` is that of /help.
                getattr(self, name.replace("/", "_"))(words)
            else:
                self._ask(line)
        except D2FError as error:
            self._say_error(str(error))
        except (LeaveAtOnce, EOFError):
            raise
        except Exception as error:
            # The exception may have interrupted a step and left the engine in a bad state.
            self.session.renew()
            self._say_error(f"{type(error).__name__}: {error}")
        else:
            return True
        return False

    def _say_error(self, message: str) -> None:
        from rich.text import Text

        hint = " (/clear starts a new conversation)" if self.session.messages else ""
        log.print("[red]error:[/red]", end=" ")
        words = Text(" ".join((message + hint).split()))
        log.print(words, soft_wrap=not self.is_live)

    # -------------------------------------------------------------------------------- answers

    def _ask(self, message: str) -> None:
        from d2f.cli.chat_session import answer

        request, slow = self.session.request(message), 0.0
        self._last = message
        if self.is_live:
            from d2f.cli.live import watch_answer

            slow = self._seconds_per_forward()
            with _interruptible() as stopped:
                watched = watch_answer(
                    out,
                    self.session.engine,
                    request,
                    self.session.tokenizer,
                    slow=slow,
                    stopped=stopped,
                )
            output, seconds = watched.output, watched.seconds
            result = None if output is None else output.result
            if result is None:
                self._print_text(output.token_ids if output else [])
                log.print("stopped; not kept", style="dim")
                raise KeyboardInterrupt
        else:
            start = time.perf_counter()
            result = answer(self.session.engine, request, lambda: False)
            seconds = time.perf_counter() - start
            assert result is not None
        text = self._print_text(result.token_ids)
        self.session.keep(message, text)
        explain_blank(text)
        self._report(result, seconds, slow)

    def _seconds_per_forward(self) -> float:
        from d2f.cli.live import SLOWED_SECONDS

        if self._slow is not None:
            return self._slow
        return ONE_BY_ONE_SECONDS if self.session.strategy in ONE_BY_ONE else SLOWED_SECONDS

    def _print_text(self, token_ids: Sequence[int]) -> str:
        from d2f.cli.live import harmless

        text = self.session.tokenizer.decode(token_ids)
        if out.is_terminal:  # `say` breaks lines between words, the terminal within them
            say(out, harmless(text), markup=False, highlight=False, emoji=False)
        else:
            typer.echo(text)
        return text

    def _report(self, result: GenerationResult, seconds: float, slow: float) -> None:
        count, forwards = len(result.token_ids), result.num_forwards
        slowed = slow > seconds / max(forwards, 1)
        log.print(
            f"{counted(count, 'token')} in {counted(forwards, 'forward')} "
            f"({result.tokens_per_forward:.1f} per forward), "
            f"{1000 * seconds / max(forwards, 1):.2f} ms per forward, {count / seconds:.0f} "
            f"tokens/s, ended by {result.finish_reason}"
            + (f"; shown at {slow:g} s per forward" if slowed else ""),
            style="dim",
        )

    # ------------------------------------------------------------------------------- commands

    def _help(self, _words: list[str]) -> None:
        width = max(map(len, _COMMANDS))
        for name, does in _COMMANDS.items():
            log.print(f"{name:{width}}  {does}", markup=False)

    def _clear(self, _words: list[str]) -> None:
        self.session.clear()
        log.print("a new conversation", style="dim")

    def _policy(self, words: list[str]) -> None:
        if words:
            self.session.change_policy(words)
        values = " ".join(f"{name}={value}" for name, value in self.session.policy().items())
        log.print(values or f"strategy {self.session.strategy} has no policy", style="dim")

    def _strategy(self, words: list[str]) -> None:
        if words:
            self.session.change_strategy(words[0], words[1:])
        given_options = (f"{name}={value}" for name, value in self.session.options.items())
        log.print(" ".join(["strategy", self.session.strategy, *given_options]), style="dim")

    def _race(self, words: list[str]) -> None:
        from d2f.cli.chat_session import print_race, run_race

        message = " ".join(words) or self._last
        if not message:
            raise RequestError("there is no prompt to race with: /race PROMPT")
        requests = self.session.race_requests(message)
        finishes = []
        with _interruptible() as stopped:
            for finish in run_race(self.session.engine, requests, stopped):
                finishes.append(finish)
                log.print(f"{finish.strategy}: {finish.seconds:.3f} s", style="dim")
        if len(requests) > 1:
            log.print(
                "The same weights in all rows, at best as they were trained to be decoded.",
                style="dim",
            )
        print_race(out, finishes, self.session.tokenizer)
        if stopped():
            raise KeyboardInterrupt

    def _example(self, _words: list[str]) -> None:
        from d2f.cli.serve import example_problems

        if not self._examples:
            self._examples = [problem.prompt for problem in example_problems()]
        prompt = self._examples.pop(0)
        log.print(prompt, style="bold", markup=False)
        self._ask(prompt)

    def _quit(self, _words: list[str]) -> None:
        raise EOFError
