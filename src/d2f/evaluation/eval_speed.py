"""Measure the speed of rows side by side, in rounds over the same problems, each row in turn.

Rows of the same batch size are measured together in one process: at batch size 1 problem 1 with
every row, problem 2 with every row, and so on, at a larger one all problems with one row after the
other. Before, they answer the problems without a clock until nothing new is captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2f.engine.engine import Engine
from d2f.evaluation.answering import timed_run, warm_up
from d2f.evaluation.eval_progress import Reporter
from d2f.evaluation.eval_row import Engines, EvalRow
from d2f.evaluation.eval_score import counts_tails
from d2f.evaluation.metrics import DECODED, OF_TOKENS, Counts, answer_metrics, ratio, spread
from d2f.evaluation.results import Record, RowFolder


@dataclass(frozen=True, kw_only=True)
class Racer:
    """A row that has its speed measured."""

    row: EvalRow
    folder: RowFolder
    num_problems: int


class SpeedGroup:
    """Rows that are measured side by side.

    `settings` has what the times depend on beside the rows' own settings: machine, versions.
    """

    def __init__(
        self,
        racers: Sequence[Racer],
        *,
        batch_size: int,
        num_runs: int,
        settings: Mapping[str, Any],
        reporter: Reporter,
    ) -> None:
        self._racers, self._batch_size, self._num_runs = racers, batch_size, num_runs
        self._settings, self._reporter = settings, reporter

    @property
    def done(self) -> bool:
        """Tell whether earlier runs have measured all rounds."""
        names = {racer.row.name for racer in self._racers}
        for racer in self._racers:
            known = racer.folder.settings("speed") or {}
            beside = names <= set(known.get("rows", ()))
            enough = known.get("num_problems", 0) >= racer.num_problems
            indices = known.get("indices", ())
            rounds = whole_rounds(racer.folder.speed(), indices)
            alike = known.get("batch_size") == self._batch_size
            if not (alike and beside and enough and (len(rounds) >= self._num_runs or not indices)):
                return False
        return True

    def measure(self, engines: Engines) -> None:
        """Run the rounds that are missing.

        Rounds of an earlier run count where it measured the same rows on the same problems, on the
        same kind of machine with the same code; else all are run again.
        """
        indices = self._warm_up(engines)
        first = self._known_rounds(indices)
        for racer in self._racers:
            kept = [line for line in racer.folder.speed() if line["round"] < first]
            racer.folder.keep_speed(kept)
            racer.folder.note_settings("speed", self._described(racer, indices))
        for number in range(first, self._num_runs):
            for racer, lines in zip(self._racers, self._round(engines, indices), strict=True):
                lines = [{"round": number} | line for line in lines]
                racer.folder.add_speed(lines)
                rate = ratio(_total(lines, "num_tokens"), _total(lines, "seconds"))
                yields = ratio(_total(lines, "num_tokens"), _total(lines, "num_forwards"))
                text = f"{rate:.0f} tokens/s  {yields:.2f} tokens/forward"
                self._tell(racer, number + 1, text)

    def _tell(self, racer: Racer, rounds: int, text: str) -> None:
        self._reporter.progress(f"{racer.row.name} speed", rounds, self._num_runs, text)

    def _described(self, racer: Racer, indices: Mapping[str, Sequence[int]]) -> Record:
        return {
            **self._settings,
            "batch_size": self._batch_size,
            "num_problems": racer.num_problems,
            "indices": list(indices[racer.row.name]),
            "rows": [other.row.name for other in self._racers],
        }

    def _known_rounds(self, indices: Mapping[str, Sequence[int]]) -> int:
        """Count the first rounds that all rows have."""
        counts = []
        for racer in self._racers:
            if racer.folder.settings("speed") != self._described(racer, indices):
                return 0
            some = indices[racer.row.name]
            rounds = whole_rounds(racer.folder.speed(), some)
            if some:
                counts.append(next(n for n in range(len(rounds) + 1) if n not in rounds))
        return min(counts, default=0)

    def _warm_up(self, engines: Engines) -> dict[str, list[int]]:
        """Let each row answer its problems, and list those that it can answer.

        A problem that one row cannot answer is left out of all that can answer others.
        """
        failed: dict[str, set[int]] = {}
        for racer in self._racers:
            self._tell(racer, 0, "warming up")
            engine = engines.of(racer.row, self._batch_size)
            failed[racer.row.name] = set(
                warm_up(engine, range(racer.num_problems), racer.row.request)
            )
        hopeless = {r.row.name for r in self._racers if len(failed[r.row.name]) == r.num_problems}
        out = {index for name, some in failed.items() if name not in hopeless for index in some}
        if out:
            self._reporter.note(f"speed: without problems that some row cannot answer: {len(out)}")
        return {
            racer.row.name: []
            if racer.row.name in hopeless
            else [index for index in range(racer.num_problems) if index not in out]
            for racer in self._racers
        }

    def _round(self, engines: Engines, indices: Mapping[str, Sequence[int]]) -> list[list[Record]]:
        """Run one round, and give the lines of each row."""
        lines: dict[str, list[Record]] = {racer.row.name: [] for racer in self._racers}
        every = sorted({index for some in indices.values() for index in some})
        for batch in [[index] for index in every] if self._batch_size == 1 else [every]:
            for racer in self._racers:
                name, engine = racer.row.name, engines.of(racer.row, self._batch_size)
                here = [index for index in batch if index in indices[name]]
                lines[name] += _timed(racer.row, engine, here)
        for racer in self._racers:
            _judge(racer.row, lines[racer.row.name])
        return list(lines.values())


def _timed(row: EvalRow, engine: Engine, indices: Sequence[int]) -> list[Record]:
    """Time problems that are answered together; each gets an equal share of the run's seconds."""
    if not indices:
        return []
    run = timed_run(engine, [row.request(index) for index in indices])
    share = 1 / len(indices)
    return [
        {
            "index": index,
            "num_tokens": answer.num_tokens,
            "num_decoded_tokens": answer.num_decoded_tokens,
            "num_forwards": answer.num_forwards,
            "num_query_tokens": answer.num_query_tokens,
            "seconds": run.seconds * share,
            "decode_tokens": run.decode_tokens * share,
            "decode_seconds": run.decode_seconds * share,
            "token_ids": answer.token_ids,
        }
        for index, answer in zip(indices, run.answers, strict=True)
    ]


def _judge(row: EvalRow, lines: Sequence[Record]) -> None:
    """Put a verdict in place of each line's tokens."""
    texts = [row.text(line.pop("token_ids")) for line in lines]
    verdicts = row.judge([line["index"] for line in lines], texts)
    for line, verdict in zip(lines, verdicts, strict=True):
        line["correct"] = verdict.correct


def whole_rounds(lines: Sequence[Record], indices: Sequence[int]) -> set[int]:
    """Find the rounds in which all of these problems were timed."""
    found: dict[int, set[int]] = {}
    for line in lines:
        found.setdefault(line["round"], set()).add(line["index"])
    return {number for number, some in found.items() if some == set(indices)}


def _total(lines: Sequence[Record], name: str) -> float:
    return sum(line[name] for line in lines)


def summarise_speed(lines: Sequence[Record], *, batch_size: int) -> Record | None:
    """Summarise the speed of a row from its lines; None if there are none."""
    rounds: dict[int, list[Record]] = {}
    for line in lines:
        rounds.setdefault(line["round"], []).append(line)
    if not rounds:
        return None
    runs = [answer_metrics([Counts.of(line) for line in some]) for some in rounds.values()]
    metrics = answer_metrics([Counts.of(line) for line in lines])
    decoded = [
        _total(some, "decode_tokens") / _total(some, "decode_seconds")
        for some in rounds.values()
        if _total(some, "decode_seconds") > 0
    ]
    names = (
        "tokens_per_forward", "mean_of_tokens_per_forward", "query_tokens_per_forward",
        "computed_per_answered", "mean_tokens",
    )  # fmt: skip
    forwards = spread([run["milliseconds_per_forward"] for run in runs])
    assert forwards is not None
    tails = {"with_tail": _with_tail(list(rounds.values()))} if counts_tails(lines) else {}
    return {
        "num_problems": len(rounds[min(rounds)]),
        "num_runs": len(rounds),
        "batch_size": batch_size,
        "tokens_per_second": spread([run["tokens_per_second"] for run in runs]),
        "decode_tokens_per_second": spread(decoded),
        "seconds_per_problem": spread([run["seconds_per_problem"] for run in runs]),
        "milliseconds_per_forward": forwards["median"],
        **{name: metrics[name] for name in names},
        **tails,
        "score": ratio(_total(lines, "correct"), len(lines)),
    }


def _with_tail(rounds: Sequence[Sequence[Record]]) -> Record:
    """Give the metrics that depend on which tokens count, with all decoded tokens counted."""
    counts = [[Counts.of(line, DECODED) for line in some] for some in rounds]
    metrics = answer_metrics([count for some in counts for count in some])
    speeds = spread([answer_metrics(some)["tokens_per_second"] for some in counts])
    return {name: metrics[name] for name in OF_TOKENS} | {"tokens_per_second": speeds}
