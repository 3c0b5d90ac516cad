"""`d2f generate --input`: answer a file of prompts, each row by a request of its own."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from types import FrameType
from typing import Any

import typer

from d2f.cli.answer_file import AnswerFile
from d2f.cli.console import log, say
from d2f.cli.generate import Asked, BulkOptions
from d2f.cli.model_files import model_sha256
from d2f.cli.prompt_file import PromptFile, PromptRow, refuse_all
from d2f.cli.usage import UsageError
from d2f.engine.engine import Engine, EngineConfig
from d2f.engine.request import Request
from d2f.engine.response_text import ResponseText
from d2f.errors import RequestError, counted
from d2f.evaluation.answering import Answer, Answering
from d2f.evaluation.eval_progress import Terminal
from d2f.models.spec import ModelSpec
from d2f.provenance import describe_code
from d2f.text import Tokenizer
from d2f.training.data import derive_seed
from d2f.training.pairs import BadRow, BadRows

_BATCH_SIZE = {"cpu": 16, "cuda": 128}


def answer_file(source: PromptFile, options: BulkOptions, asked: Asked, as_json: bool) -> None:
    """Answer the rows that earlier runs have not answered, and print a summary of all rows."""
    num_samples, output = options.n or 1, options.output
    assert output is not None
    if num_samples > 1 and asked.request.temperature == 0:
        raise UsageError(f"--n {num_samples}: all the same at --temperature 0")
    source.check()
    settings = {
        "input": source.sha256,
        "model": model_sha256(asked.decoding.choice.source, asked.decoding.choice.adapter),
        "columns": asdict(source.columns),
        "n": num_samples,
        **asked.settings(),
    }
    answers = AnswerFile(output, settings, num_samples=num_samples, fresh=options.fresh)
    with closing(answers):
        run = _Run(source, num_samples, asked, answers)
        try:
            with _sigterm_as_ctrl_c():
                if answers.totals.answers < run.num_wanted:
                    run.answer(options.batch_size)
                answers.finish()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped; {answers.totals.answers:,} of {counted(run.num_wanted, 'answer', ',')} "
                f"are in {output}; go on with the same command"
            ) from None
    if not answers.totals.answers:
        refuse_all(run.bad_rows)
    if as_json:
        typer.echo(json.dumps(run.summary()))
    else:
        _say_summary(run.summary(), run.bad_rows)


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Run:
    """A run through the prompts: a request for each missing answer, and a line for each one."""

    _tokenizer: Tokenizer
    _spec: ModelSpec
    _request: Request
    """The request without a prompt."""

    def __init__(
        self, source: PromptFile, num_samples: int, asked: Asked, answers: AnswerFile
    ) -> None:
        self._source, self._num_samples = source, num_samples
        self._asked, self._answers = asked, answers
        self.num_wanted = source.num_rows * num_samples
        self._num_before = answers.totals.answers
        self._num_tokens, self._seconds = 0, 0.0
        """Tokens and seconds of this run, without earlier ones."""
        self.bad_rows = BadRows()
        """Rows without a prompt, and rows whose request failed."""
        self._open: dict[int, tuple[PromptRow, int, Request]] = {}
        """Row, sample and request of each answer in progress, by its number."""
        self._failed: set[int] = set()

    def answer(self, batch_size: int | None) -> None:
        """Answer the rows that have no answer yet."""
        answers = self._answers
        model, self._tokenizer, self._request = self._asked.load(answers.about.get("dtype"))
        self._spec = model.spec
        dtype = str(model.dtype).removeprefix("torch.")
        answers.begin(
            {"model": self._asked.decoding.choice.source, "dtype": dtype, **describe_code()}
        )
        size = batch_size or _BATCH_SIZE.get(model.device.type, 128)
        engine = Engine(model, EngineConfig(max_batch_size=size), self._tokenizer)
        terminal, start = Terminal(), time.perf_counter()
        try:
            for finished, _ in Answering(engine, self._numbers(), lambda n: self._open[n][2]):
                records = self._take(finished)
                answers.add(records)
                self._num_tokens += sum(record["num_tokens"] for record in records)
                self._seconds = time.perf_counter() - start
                terminal.progress("answers", answers.totals.answers, *self._pace())
        finally:
            terminal.close()
            engine.close()

    def _pace(self) -> tuple[int, str]:
        """The number of answers expected in all, and a text with speed and time left."""
        done = self._answers.totals.answers
        total = max(self.num_wanted - self.bad_rows.count * self._num_samples, done)
        text = f"{self._num_tokens / self._seconds:,.0f} tokens/s"
        if not log.is_terminal:  # a terminal shows a progress bar instead
            left = self._seconds * (total - done) / max(done - self._num_before, 1)
            text += f"  {timedelta(seconds=int(left))} left"
        return total, text

    def summary(self) -> dict[str, Any]:
        """Return the counts of answers and bad rows, and the speed of this run."""
        totals = self._answers.totals
        return {
            "output": str(self._answers.path),
            "num_rows": self._source.num_rows,
            "num_answers": totals.answers,
            "num_new_answers": totals.answers - self._num_before,
            "num_tokens": totals.tokens,
            "num_forwards": totals.forwards,
            "tokens_per_forward": totals.tokens / max(totals.forwards, 1),
            "seconds": self._seconds,
            "tokens_per_second": self._num_tokens / self._seconds if self._num_tokens else None,
            "length_share": totals.cut / totals.answers,
            "num_bad_rows": self.bad_rows.count,
            "bad_rows": self.bad_rows.to_table(),
        }

    def _numbers(self) -> Iterator[int]:
        """Yield a number for each missing answer; bad rows are counted and get no number."""
        number = 0
        for row in self._source.prompts(self.bad_rows):
            samples = range(self._num_samples)
            missing = [one for one in samples if not self._answers.has(row.number, one)]
            if not missing:
                continue
            try:
                request = self._ask(row)
            except (BadRow, RequestError) as error:
                self.bad_rows.add(self._source.where(row.number), str(error))
                continue
            for sample in missing:
                number += 1
                self._open[number] = row, sample, _seeded(request, row.number, sample)
                yield number

    def _take(self, finished: Sequence[Answer]) -> list[dict[str, Any]]:
        """The lines of answers; what has failed is counted."""
        records = []
        for answer in finished:
            row, sample, request = self._open.pop(answer.index)
            if answer.error is None:
                records.append(self._record(row, sample, request, answer))
            elif row.number not in self._failed:
                self._failed.add(row.number)
                self.bad_rows.add(self._source.where(row.number), answer.error)
        return records

    def _ask(self, row: PromptRow) -> Request:
        prompt_ids = self._asked.prompt_ids(self._tokenizer, row.prompt)
        try:
            request = self._asked.decoding.limited(self._request, self._spec, prompt_ids)
        except UsageError as error:
            # The options fit the model, but not the few positions that this prompt leaves.
            raise BadRow(str(error)) from None
        if len(prompt_ids) + request.max_new_tokens > self._spec.max_positions:
            raise BadRow(
                f"the prompt and {counted(request.max_new_tokens, 'new token')} are more than the "
                f"model's {counted(self._spec.max_positions, 'position')}"
            )
        return request

    def _record(
        self, row: PromptRow, sample: int, request: Request, answer: Answer
    ) -> dict[str, Any]:
        ends, columns = self._spec.eos_token_ids, self._source.columns
        response = ResponseText(self._tokenizer, eos_token_ids=ends, stop=request.stop)
        text = response.end(answer.token_ids)
        new: dict[str, Any] = {}
        if row.messages is not None:
            # An answer replaces the assistant's message at the end of a conversation.
            before = list(row.row[row.messages])
            last = before[-1][columns.role]
            if columns.roles.get(last, last) == "assistant":
                before.pop()
            new[row.messages] = [*before, {columns.role: "assistant", columns.content: text}]
        new |= {columns.response: text, "row": row.number}
        if self._num_samples > 1:
            new["sample"] = sample
        if request.temperature > 0:
            new["seed"] = request.seed
        new |= {
            "num_tokens": len(answer.token_ids),
            "num_forwards": answer.num_forwards,
            "finish_reason": answer.finish_reason,
        }
        return kept_columns(row.row, new, row.messages) | new


def _seeded(request: Request, row: int, sample: int) -> Request:
    """Give a request noise of its own, which depends on nothing but the seed and the place."""
    if request.temperature == 0:
        return request
    return replace(request, seed=derive_seed(request.seed, f"answer {sample}", row))


def _say_summary(summary: Mapping[str, Any], bad_rows: BadRows) -> None:
    rate = summary["tokens_per_second"]
    speed = f", {rate:,.0f} tokens/s" if rate is not None else ""
    say(
        log,
        f"{summary['output']}: {counted(summary['num_answers'], 'answer', ',')}, "
        f"{counted(summary['num_tokens'], 'token', ',')} "
        f"({summary['tokens_per_forward']:.2f} per forward{speed}), "
        f"{summary['length_share']:.1%} ended by length",
        markup=False,
    )
    if bad_rows.count:
        rows = counted(summary["num_rows"], "row", ",")
        text = f"{bad_rows.count:,} of {rows} are bad and have no answer: {bad_rows.text()}"
        say(log, text, markup=False)


def kept_columns(
    row: Mapping[str, Any], new: Mapping[str, Any], messages: str | None = None
) -> dict[str, Any]:
    """Return the columns of a row to keep beside those of its answer, renamed if names collide.

    The column `messages` with the conversation is not kept if `new` only continues it.

    Example:
        >>> kept_columns({"response": "gold", "id": 7}, {"response": "2", "row": 1})
        {'input_response': 'gold', 'id': 7}
    """
    kept: dict[str, Any] = {}
    for name, value in row.items():
        if name == messages and len(new[name]) > len(value):
            continue
        free = name
        while free in new or free in kept or (free != name and free in row):
            free = f"input_{free}"
        kept[free] = value
    return kept
