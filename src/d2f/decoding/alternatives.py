"""Alternatives of a token: the most probable tokens at its position, which it was chosen from.

Shapes: M positions, A alternatives, V vocabulary, D hidden size.

On the device an alternative is one number, its token above the bits of its probability, so that it
travels with the other whole numbers that a step reports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from d2f.models.transformer import Transformer
from d2f.ops.backend import Backend
from d2f.ops.sampling import Choice, Sampling, most_probable

HEAD_ROWS = 512
"""Most positions whose logits exist at once."""

MOST_ALTERNATIVES = 20
"""Most tokens that a request may have reported at each position, as in OpenAI's protocol."""

Alternatives: TypeAlias = tuple[tuple[int, float], ...]
"""Token and probability, the most probable one first; in the forward that decoded the position."""


def find_alternatives(
    logits_MV: Tensor, count: int, mask_token_id: int | None, sampling: Sampling | None
) -> Tensor:
    """The most probable tokens of each position as numbers: (M, count), int64."""
    token_MA, probability_MA = most_probable(
        logits_MV, count, mask_token_id=mask_token_id, sampling=sampling
    )
    # Probabilities are not negative, so that their bits are not either.
    return (token_MA << 32) | probability_MA.view(torch.int32).long()


def choose_with_alternatives(
    aligned_MD: Tensor,
    model: Transformer,
    backend: Backend,
    *,
    mask_token_id: int | None,
    count: int,
    sampling: Callable[[slice], Sampling | None],
    confidence_M: Tensor | None,
    needed_M: Tensor | None,
) -> tuple[Choice, Tensor]:
    """Tokens for positions with their probability and rank, and their alternatives (M, count).

    `sampling` says how a part of the positions is sampled; the rest is as `choose_tokens` takes it.
    """
    parts, others = [], [aligned_MD.new_empty(0, count, dtype=torch.long)]
    for at in range(0, len(aligned_MD), HEAD_ROWS):
        part = slice(at, at + HEAD_ROWS)
        sampled = sampling(part)
        logits_MV = model.head(aligned_MD[part], backend)
        if count:
            others.append(find_alternatives(logits_MV, count, mask_token_id, sampled))
        parts.append(
            backend.choose_tokens(
                logits_MV,
                mask_token_id=mask_token_id,
                confidence_M=None if confidence_M is None else confidence_M[part],
                sampling=sampled,
                needed_M=None if needed_M is None else needed_M[part],
            )
        )
    choice = parts[0] if len(parts) == 1 else Choice(*map(torch.cat, zip(*parts, strict=True)))
    return choice, torch.cat(others)


def read_alternatives(numbers_MA: np.ndarray) -> list[Alternatives]:
    """Turn numbers into alternatives; tokens that could not be chosen are left out.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, 9.0]])
        >>> read_alternatives(find_alternatives(logits, 1, 2, None).numpy())
        [((0, 0.00012337...),)]
    """
    token_MA = (numbers_MA >> 32).tolist()
    probability_MA = (numbers_MA & 0xFFFFFFFF).astype(np.uint32).view(np.float32).tolist()
    return [
        tuple((token, p) for token, p in zip(tokens, probabilities, strict=True) if p > 0)
        for tokens, probabilities in zip(token_MA, probability_MA, strict=True)
    ]
