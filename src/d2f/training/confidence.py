"""The confidence of student and teacher at a few masked positions.

Shapes: M positions, D hidden size, V vocabulary, C positions whose logits are made at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from d2f.training.stage_loss import StageLoss
from d2f.training.step_inputs import StepInputs

MOST_POSITIONS = 256
MOST_SEQUENCES = 16
"""The most that one measurement reads, as training itself does not need the pass."""
_ROWS = 64
"""Positions whose logits are made at once."""
_LEAST = 16
"""Fewest positions where another token is right; fewer say nothing."""


@torch.no_grad()
def measure_confidence(loss: StageLoss, inputs: StepInputs) -> dict[str, Any]:
    """Measure how sure the student, and the teacher if there is one, are of their predictions.

    One forward pass of each over the first `MOST_SEQUENCES` sequences of the given part of a batch,
    without dropout; no gradient and no random number is touched. Positions are at most
    `MOST_POSITIONS` of those that count in the loss, evenly spread.

    Gives `confidence`, the mean of the highest probability; `one_token`, of the positions where
    another token than the most predicted one is right the share at which that one is predicted;
    `one_token_name`, "EOS" or "token 17"; and the same of the teacher, `teacher_confidence` and
    `teacher_one_token`. Empty where nothing is masked.
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
    """Join what several processes measured, each on its own samples, to one measurement.

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
    said_M = token_M[target_M != most] == most
    share = round(float(said_M.float().mean()), 4) if len(said_M) >= _LEAST else None
    return round(float(torch.cat(tops).mean()), 4), most, share
