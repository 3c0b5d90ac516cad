"""The confidence of student and teacher at a few masked positions, and when it has collapsed.

Shapes: M positions, D hidden size, V vocabulary, C positions whose logits are made at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from d2f.training.stage_loss import StageLoss
from d2f.training.step_inputs import StepInputs

MOST_POSITIONS = 256
MOST_SEQUENCES = 16
"""Enough for so many positions; the pass is one that training does not need."""
_ROWS = 64
"""Logits of so many positions are made at once."""
_LEAST = 16
"""Positions where another token is right; fewer say nothing."""


@torch.no_grad()
def measure_confidence(loss: StageLoss, inputs: StepInputs) -> dict[str, Any]:
    """How sure the student is of what it predicts, and the teacher, where the stage has one.

    One forward pass of each over the first `MOST_SEQUENCES` sequences of the given part of a batch,
    without dropout; no gradient and no random number is touched. Positions are at most
    `MOST_POSITIONS` of those that count in the loss, evenly spread.

    Returns:
        `confidence`: the mean of the highest probability; `one_token`: of the positions where
        another token than the most predicted one is right, the share at which that one is
        predicted (None if they are fewer than 16); `one_token_name`: "EOS" or "token 17"; and
        `teacher_confidence`, `teacher_one_token`. Empty where nothing is masked.
    """
    inputs = next(inputs.parts(MOST_SEQUENCES, select=True))
    rows_M = inputs.selected_M
    assert rows_M is not None
    if len(rows_M) > MOST_POSITIONS:
        spread = torch.linspace(0, len(rows_M) - 1, MOST_POSITIONS, device=rows_M.device)
        rows_M = rows_M[spread.long()]
    target_M = inputs.target_BL.flatten()[rows_M]
    student = loss.student
    training = student.training
    student.eval()
    try:
        states = loss.hidden_states(inputs, rows_M)
    finally:
        student.train(training)
    if not len(rows_M):
        # Not before the passes, in which processes may gather a model's shards together.
        return {}
    result: dict[str, Any] = {}
    for prefix, (hidden_MD, head_VD) in states.items():
        confidence, token, share = _summary(hidden_MD, head_VD, target_M)
        result[f"{prefix}confidence"] = confidence
        result[f"{prefix}one_token"] = share
        if not prefix:
            eos = token in student.spec.eos_token_ids
            result["one_token_name"] = "EOS" if eos else f"token {token}"
    return result


def mean_confidence(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several processes measured, each on samples of its own, as one.

    Example:
        >>> mean_confidence([{"confidence": 0.5}, {"confidence": 0.25, "one_token": None}, {}])
        {'confidence': 0.375, 'one_token': None}
    """
    result: dict[str, Any] = {}
    for name in dict.fromkeys(name for found in measured for name in found):
        values = [found[name] for found in measured if found.get(name) is not None]
        if values and not isinstance(values[0], str):
            result[name] = round(sum(values) / len(values), 4)
        else:
            result[name] = values[0] if values else None
    return result


def _summary(
    hidden_MD: Tensor, head_VD: Tensor, target_M: Tensor
) -> tuple[float, int, float | None]:
    """Mean confidence, the token predicted most, and its share where another one is right."""
    tops, tokens = [], []
    for part_CD in hidden_MD.split(_ROWS):
        logits_CV = (part_CD.to(head_VD.dtype) @ head_VD.T).float()
        top_C, token_C = logits_CV.softmax(dim=-1).max(dim=-1)
        tops.append(top_C)
        tokens.append(token_C)
    token_M = torch.cat(tokens)
    most = int(token_M.mode().values)
    other_M = target_M != most
    share = (
        float((token_M[other_M] == most).float().mean()) if int(other_M.sum()) >= _LEAST else None
    )
    return (
        round(float(torch.cat(tops).mean()), 4),
        most,
        None if share is None else round(share, 4),
    )


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
