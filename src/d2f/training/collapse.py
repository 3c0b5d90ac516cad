"""The rule by which a run is warned that the model's confidence collapses."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

NUM_LINES = 5
"""Lines of the log in a row on which a condition must hold: a single batch says little."""
CONFIDENCE_SHARE = 0.5
"""Confidence below this share of the teacher's, or else of its own best, is too low."""
ONE_TOKEN = 0.9
"""Share of the other tokens' positions at which one token is predicted that is too much."""
ONE_TOKEN_SOUND = 0.7
"""Up to this share the teacher, or the model before, is not itself like that."""


class CollapseRule:
    """Looks at the lines of the log, after the warm-up of the learning rate, for two collapses.

    - The student becomes unsure: on each of the last `NUM_LINES` lines `confidence` is below
      `CONFIDENCE_SHARE` of `teacher_confidence`; or, where there is no teacher, of the highest
      mean over `NUM_LINES` lines in a row that the run has had.
    - The student predicts one token, EOS as a rule, whatever is right: on each of these lines
      `one_token`, the share of positions at which it does so among those where another token is
      right, is at least `ONE_TOKEN`, while the teacher's is at most `ONE_TOKEN_SOUND`; or, where
      there is no teacher, the mean over `NUM_LINES` lines has been at most that before.

    Each is told once, and again only after a line without it. Lines without numbers do not count.

    Args:
        after_step: Last step of the warm-up.

    Example:
        >>> rule = CollapseRule()
        >>> line = {"step": 1, "confidence": 0.2, "teacher_confidence": 0.7}
        >>> [len(rule.add(line | {"step": step})) for step in range(1, 7)]
        [0, 0, 0, 0, 1, 0]
    """

    def __init__(self, after_step: int = 0) -> None:
        self._after = after_step
        self._lines: deque[Mapping[str, Any]] = deque(maxlen=NUM_LINES)
        self._best: float | None = None
        self._was_varied = False
        self._told: set[str] = set()

    def add(self, record: Mapping[str, Any]) -> list[str]:
        """Take the next line; the warnings that it gives rise to."""
        if record.get("confidence") is None or record["step"] <= self._after:
            return []
        self._lines.append(record)
        found = {"unsure": self._unsure(), "one token": self._one_token()}
        new = [text for kind, text in found.items() if text and kind not in self._told]
        self._told = {kind for kind, text in found.items() if text}
        self._remember()
        return new

    def _unsure(self) -> str | None:
        """A warning that the student has become unsure."""
        if len(self._lines) < NUM_LINES:
            return None
        last = self._lines[-1]
        teacher = last.get("teacher_confidence")
        bars = [line.get("teacher_confidence", self._best) for line in self._lines]
        if not all(
            bar is not None and line["confidence"] < CONFIDENCE_SHARE * bar
            for line, bar in zip(self._lines, bars, strict=True)
        ):
            return None
        what = (
            f"the teacher's {teacher:.2f}" if teacher is not None else f"its best, {bars[-1]:.2f}"
        )
        return (
            f"the student's confidence collapses: {last['confidence']:.2f} at step {last['step']}, "
            f"below half of {what}, for {NUM_LINES} lines of the log; lower optimizer.lr, or go "
            "back to an earlier checkpoint"
        )

    def _one_token(self) -> str | None:
        """A warning that the student says one thing only."""
        shares = [line.get("one_token") for line in self._lines]
        if len(shares) < NUM_LINES or not all(s is not None and s >= ONE_TOKEN for s in shares):
            return None
        teachers = [line.get("teacher_one_token") for line in self._lines]
        if None in teachers:
            sound = self._was_varied
        else:
            sound = all(s is not None and s <= ONE_TOKEN_SOUND for s in teachers)
        if not sound:
            return None
        last = self._lines[-1]
        return (
            f"the student predicts {last.get('one_token_name', 'one token')} nearly everywhere "
            f"(at {last['one_token']:.0%} of the positions where another token is right) at step "
            f"{last['step']} and {NUM_LINES - 1} lines of the log before; lower optimizer.lr, or "
            "go back to an earlier checkpoint"
        )

    def _remember(self) -> None:
        if len(self._lines) < NUM_LINES:
            return
        mean = sum(line["confidence"] for line in self._lines) / NUM_LINES
        self._best = mean if self._best is None else max(self._best, mean)
        shares = [line.get("one_token") for line in self._lines]
        known = [share for share in shares if share is not None]
        if len(known) == NUM_LINES and sum(known) / NUM_LINES <= ONE_TOKEN_SOUND:
            self._was_varied = True
