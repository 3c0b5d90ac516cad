"""The log of a run: JSONL files, the numbers of their lines, and what it warns of.

Shapes: B sequences, L positions, N blocks.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2f.training.confidence import mean_confidence
from d2f.training.config import TrainConfig
from d2f.training.objective import block_sums
from d2f.training.processes import Processes
from d2f.training.step_inputs import StepInputs
from d2f.training.trackers import Trackers

Record = Mapping[str, Any]


class Reporter:
    """Is told how a run goes, and does nothing about it; subclasses override what they want."""

    def record(self, record: Record) -> None:
        """Take a line of the log: step, loss, lr, and so on."""

    def sample(self, sample: Record) -> None:
        """Take a sample answer."""

    def evaluation(self, record: Record) -> None:
        """Take a line of evaluations.jsonl, and `best_step`, the step of the best one."""

    def note(self, text: str) -> None:
        """Take something that the user should know."""

    def close(self) -> None:
        """Hear that the run is over."""


class RunLog:
    """The log of a run, which goes to log.jsonl, samples.jsonl, a reporter and trackers.

    Only the main process has one. A run resumed after `after_step` goes on with the files. Raises
    `ConfigError` if a tracker is not there or does not start.
    """

    def __init__(self, config: TrainConfig, reporter: Reporter, *, after_step: int = 0) -> None:
        self._reporter = reporter
        self.warnings: list[str] = []
        """Warnings of the `CollapseRule`."""
        output = Path(config.output)
        self._lines = JsonLog(output / "log.jsonl", after_step=after_step)
        self._samples = JsonLog(output / "samples.jsonl", after_step=after_step)
        self._rule = CollapseRule(config.optimizer.warmup_steps)
        for record in read_log(self._lines.path):
            self._rule.add(record)
        self._trackers = Trackers(config, reporter.note) if config.trackers else None

    def write(self, record: Record) -> None:
        """Add a line of the log, and warn if the student's confidence collapses."""
        self._append(self._lines, [record])
        self._reporter.record(record)
        if self._trackers is not None:
            self._trackers.log(record)
        for warning in self._rule.add(record):
            self.warnings.append(warning)
            self._reporter.note(f"warning: {warning}")

    def write_samples(self, answers: Sequence[Record]) -> None:
        """Add sample answers, of which the first is shown."""
        self._append(self._samples, answers)
        if answers:
            self._reporter.sample(answers[0])

    def close(self) -> None:
        """End the trackers."""
        if self._trackers is not None:
            self._trackers.close()

    def _append(self, log: JsonLog, records: Sequence[Record]) -> None:
        """Append to a file; that it cannot be written is no reason to end a training."""
        try:
            log.write(records)
        except OSError as error:
            self._reporter.note(
                f"{log.path.name} misses step {records[0]['step']}: {error.strerror or error}; "
                "training goes on, but a checkpoint will need room"
            )


class JsonLog:
    """A JSONL file that a resumed run goes on with."""

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if after_step and path.exists():
            # Lines of steps that the resumed run makes again.
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step(line) <= after_step]
        part = path.with_name(path.name + ".part")
        part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(part, path)

    def write(self, records: Iterable[Record]) -> None:
        """Append records: all of them, or none, and an `OSError`, where the disk is full."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError:
            # Half a line would spoil the next one.
            with contextlib.suppress(OSError):
                os.truncate(self.path, before)
            raise


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _step(line: str) -> float:
    """The step of a log line; infinity for a line that a crash cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class LogWindow:
    """Sums since the last line of the log; they stay on the device until the line is written."""

    def __init__(self, step: int, seconds: float) -> None:
        self.timed_from = (step, seconds)
        """Step and seconds at which the clock of the window started."""
        self._losses: list[Tensor] = []
        self._norm: Tensor | None = None
        self._lr = 0.0
        self._blocks: list[tuple[Tensor, Tensor]] = []
        self.confidence: dict[str, Any] | None = None
        """The result of `measure_confidence`."""

    def add(self, loss: Tensor, norm: Tensor, lr: float) -> None:
        """Add a step: its loss, the norm of its gradient, its learning rate."""
        self._losses.append(loss)
        self._norm, self._lr = norm, lr

    def add_blocks(self, inputs: StepInputs, loss_BL: Tensor, config: TrainConfig) -> None:
        """Add the losses of a micro-batch's positions, for the mean of each block."""
        if config.noise is not None:
            num_blocks = -(-config.data.sequence_length // config.noise.block_size)
            counted_BL = inputs.weight_BL > 0
            block_BL = inputs.block_in_sample_BL
            self._blocks.append(block_sums(loss_BL, counted_BL, block_BL, num_blocks))

    def record(
        self, step: int, tokens_per_step: int, seconds: float, processes: Processes
    ) -> dict[str, Any]:
        """Give the line: mean loss of the window; block losses, norm and rate of its last step."""
        assert self._norm is not None
        steps, elapsed = step - self.timed_from[0], seconds - self.timed_from[1]
        record: dict[str, Any] = {
            "step": step,
            "loss": torch.stack(self._losses).mean().item(),
            "lr": self._lr,
            "grad_norm": self._norm.item(),
            "tokens_per_second": round(steps * tokens_per_step / elapsed) if elapsed > 0 else 0,
            "seconds": round(seconds, 3),
            **mean_confidence(processes.share(self.confidence or {})),
        }
        if self._blocks:
            sums_N, counts_N = (
                processes.sum(torch.stack(parts).sum(0))
                for parts in zip(*self._blocks, strict=True)
            )
            means = (sums_N / counts_N.clamp_min(1)).tolist()
            record["loss_per_block"] = [
                round(mean, 6) if count else None
                for mean, count in zip(means, counts_N.tolist(), strict=True)
            ]
        return record


NUM_LINES = 5
"""Lines of the log in a row whose mean counts: a single batch says little."""
CONFIDENCE_SHARE = 0.5
"""Confidence below this share of the teacher's, or else of its own best, is too low."""
ONE_TOKEN = 0.8
"""Share of the positions where other tokens are right at which one is predicted: too much."""
ONE_TOKEN_SOUND = 0.6
"""Up to this share the teacher, or the student before, is not itself like that."""


class CollapseRule:
    """Looks at means over the last `NUM_LINES` lines of the log, for two collapses.

    - The student becomes unsure: `confidence` is below `CONFIDENCE_SHARE` of
      `teacher_confidence`; or, where there is no teacher, of the highest such mean of the run.
    - The student predicts one token, EOS as a rule, whatever is right: `one_token`, the share of
      positions at which it does so among those where another token is right, is at least
      `ONE_TOKEN`, while the teacher's is at most `ONE_TOKEN_SOUND`; or, where there is no teacher,
      the student's own was that before.

    Each is told once, and again only after it was over. Lines up to `after_step`, the last of the
    learning rate's warm-up, and lines without numbers do not count.

    Example:
        >>> rule = CollapseRule()
        >>> line = {"step": 1, "confidence": 0.2, "teacher_confidence": 0.7}
        >>> [len(rule.add(line | {"step": step})) for step in range(1, 7)]
        [0, 0, 0, 0, 1, 0]
    """

    def __init__(self, after_step: int = 0) -> None:
        self._after = after_step
        self._lines: deque[Mapping[str, Any]] = deque(maxlen=NUM_LINES)
        self._best = 0.0
        self._was_varied = False
        self._told: set[str] = set()

    def add(self, record: Mapping[str, Any]) -> list[str]:
        """Take the next line, and give the warnings that it causes."""
        if record.get("confidence") is None or record["step"] <= self._after:
            return []
        self._lines.append(record)
        if len(self._lines) < NUM_LINES:
            return []
        found = {"unsure": self._unsure(), "one token": self._one_token()}
        new = [text for kind, text in found.items() if text and kind not in self._told]
        self._told = {kind for kind, text in found.items() if text}
        return new

    def _mean(self, name: str) -> float | None:
        """The mean over the last lines; None where one of them lacks the number."""
        values = [line.get(name) for line in self._lines]
        known = [value for value in values if value is not None]
        return sum(known) / NUM_LINES if len(known) == NUM_LINES else None

    def _unsure(self) -> str | None:
        mean, teacher = self._mean("confidence"), self._mean("teacher_confidence")
        assert mean is not None
        self._best = max(self._best, mean)
        bar = self._best if teacher is None else teacher
        if mean >= CONFIDENCE_SHARE * bar:
            return None
        whose = "of its best" if teacher is None else "of the teacher's"
        return self._worded(
            f"the student's confidence collapses: {mean:.2f} is below half {whose}, {bar:.2f}"
        )

    def _one_token(self) -> str | None:
        mean, teacher = self._mean("one_token"), self._mean("teacher_one_token")
        if mean is None:
            return None
        self._was_varied |= mean <= ONE_TOKEN_SOUND
        sound = self._was_varied if teacher is None else teacher <= ONE_TOKEN_SOUND
        if mean < ONE_TOKEN or not sound:
            return None
        name = self._lines[-1].get("one_token_name", "one token")
        return self._worded(
            f"the student predicts {name} nearly everywhere: at {mean:.0%} of the positions where "
            "another token is right"
        )

    def _worded(self, what: str) -> str:
        return (
            f"{what} (mean of {NUM_LINES} lines of the log up to step {self._lines[-1]['step']}); "
            "lower optimizer.lr, or go back to an earlier checkpoint"
        )
