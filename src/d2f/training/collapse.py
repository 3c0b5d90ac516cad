"""The rule by which a run is warned that the model's confidence collapses."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

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

    Each is told once, and again only after it was over. Lines of the warm-up of the learning rate
    and lines without numbers do not count.

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
        self._best = 0.0
        self._was_varied = False
        self._told: set[str] = set()

    def add(self, record: Mapping[str, Any]) -> list[str]:
        """Take the next line; the warnings that it gives rise to."""
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
        """A warning that the student has become unsure."""
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
        """A warning that the student says one thing only."""
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
