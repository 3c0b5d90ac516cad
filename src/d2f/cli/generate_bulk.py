"""`d2f generate --input`: answer a file of prompts."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import timedelta
from types import FrameType
from typing import Any

import typer

from d2f.cli.answer_desk import AnswerDesk
from d2f.cli.answer_file import AnswerFile
from d2f.cli.asked import Asked
from d2f.cli.bulk_options import Bulk
from d2f.cli.console import log, say
from d2f.cli.model_files import model_sha256
from d2f.cli.prompt_file import refuse_all
from d2f.cli.usage import UsageError
from d2f.errors import counted
from d2f.training.pairs import BadRows

_BATCH_SIZE = {"cpu": 16, "cuda": 128}


def answer_file(bulk: Bulk, asked: Asked) -> None:
    """Answer the rows that earlier runs have not answered, and print a summary of all rows.

    Raises:
        D2FError: No row can be answered, or the files cannot be read or written.
        ConfigError: The output has answers to other prompts or by other settings.
        UsageError: The options do not fit the model.
        KeyboardInterrupt: The run was stopped, by Ctrl-C or SIGTERM.
    """
    if bulk.num_samples > 1 and asked.request.temperature == 0:
        raise UsageError(f"--n {bulk.num_samples}: all the same at --temperature 0")
    bulk.source.check()
    settings = {
        "input": bulk.source.sha256,
        "model": model_sha256(asked.choice.source, asked.choice.adapter),
        "columns": asdict(bulk.source.columns),
        "n": bulk.num_samples,
        **asked.settings(),
    }
    answers = AnswerFile(bulk.output, settings, num_samples=bulk.num_samples, fresh=bulk.fresh)
    with closing(answers):
        run = _Run(bulk, asked, answers)
        try:
            with _sigterm_as_ctrl_c():
                if answers.totals.answers < run.num_wanted:
                    run.answer()
                answers.finish()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped; {answers.totals.answers:,} of {counted(run.num_wanted, 'answer', ',')} "
                f"are in {bulk.output}; go on with the same command"
            ) from None
    if not answers.totals.answers:
        refuse_all(run.bad_rows)
    if bulk.as_json:
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
    """A run through the prompts, with its counts."""

    def __init__(self, bulk: Bulk, asked: Asked, answers: AnswerFile) -> None:
        self._bulk, self._asked, self._answers = bulk, asked, answers
        self.num_wanted = bulk.source.num_rows * bulk.num_samples
        self._num_before = answers.totals.answers
        self._num_tokens, self._seconds = 0, 0.0
        """Tokens and seconds of this run, without earlier ones."""
        self.bad_rows = BadRows()

    def answer(self) -> None:
        """Answer the rows that have no answer yet."""
        from d2f.engine.engine import Engine, EngineConfig
        from d2f.evaluation.answering import Answering
        from d2f.evaluation.eval_progress import Terminal
        from d2f.provenance import describe_code

        bulk, answers = self._bulk, self._answers
        model, tokenizer, request = self._asked.load(answers.about.get("dtype"))
        dtype = str(model.dtype).removeprefix("torch.")
        answers.begin({"model": self._asked.choice.source, "dtype": dtype, **describe_code()})
        size = bulk.batch_size or _BATCH_SIZE.get(model.device.type, 128)
        engine = Engine(model, EngineConfig(max_batch_size=size), tokenizer)
        desk = AnswerDesk(
            bulk.source, answers, self._asked, model, tokenizer, request,
            num_samples=bulk.num_samples,
        )  # fmt: skip
        self.bad_rows = desk.bad_rows
        terminal, start = Terminal(), time.perf_counter()
        try:
            for finished, _ in Answering(engine, desk.numbers(), desk.request):
                written = desk.take(finished)
                answers.add(written)
                self._num_tokens += sum(record["num_tokens"] for record in written)
                self._seconds = time.perf_counter() - start
                terminal.progress("answers", answers.totals.answers, *self._pace())
        finally:
            terminal.close()
            engine.close()

    def _pace(self) -> tuple[int, str]:
        """Return the number of answers expected in all, and a text with speed and time left."""
        done = self._answers.totals.answers
        total = max(self.num_wanted - self.bad_rows.count * self._bulk.num_samples, done)
        text = f"{self._num_tokens / self._seconds:,.0f} tokens/s"
        if not log.is_terminal:  # a terminal shows a progress bar instead
            left = self._seconds * (total - done) / max(done - self._num_before, 1)
            text += f"  {timedelta(seconds=int(left))} left"
        return total, text

    def summary(self) -> dict[str, Any]:
        """Return the counts of answers and bad rows, and the speed of this run."""
        totals = self._answers.totals
        return {
            "output": str(self._bulk.output),
            "num_rows": self._bulk.source.num_rows,
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
