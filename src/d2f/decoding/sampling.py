"""From logits to one token and its confidence at each position.

Shapes: M positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = (1 << 63) - 1


def choose_tokens(
    logits_MV: Tensor,
    *,
    mask_token_id: int | None,
    temperature: float = 0.0,
    noise_MV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The candidate token of each position and its probability: (M,), (M,) fp32.

    At temperature 0 the candidate is the most probable token, else a sample of
    softmax(logits / temperature) by the Gumbel-max trick with `noise_MV`; its confidence is its
    probability under that softmax. The mask token is never a candidate, yet its probability counts
    in the softmax.

    Example:
        >>> token_M, confidence_M = choose_tokens(torch.tensor([[0.0, 9.0, 5.0]]), mask_token_id=1)
        >>> int(token_M), round(float(confidence_M), 3)
        (2, 0.018)
    """
    logits_MV = logits_MV.float()
    if temperature > 0:
        logits_MV = logits_MV / temperature
    total_M = logits_MV.logsumexp(-1)
    score_MV = logits_MV
    if temperature > 0:
        assert noise_MV is not None, "sampling needs noise"
        score_MV = score_MV + noise_MV
    if mask_token_id is not None:
        score_MV = score_MV.index_fill(
            -1, torch.tensor([mask_token_id], device=score_MV.device), -torch.inf
        )
    token_M = score_MV.argmax(-1)
    chosen_M = logits_MV.gather(-1, token_M[..., None])[..., 0]
    return token_M, (chosen_M - total_M).exp()


def gumbel_noise(seed_M: Tensor, position_M: Tensor, step_M: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise (M, V), a hash of (seed, position, step, token) and of nothing else.

    So a sequence draws the same sample alone, in any batch and on any device.

    Args:
        seed_M: Seed of each position's request, int64.
        position_M: Absolute position in its sequence, int64.
        step_M: Forwards of its sequence before this one, int64.
        vocab_size: V.

    Example:
        >>> one = torch.tensor([1])
        >>> gumbel_noise(one, one, one, 3).shape
        torch.Size([1, 3])
    """
    key_M = _mix(_mix(_mix(seed_M) ^ position_M) ^ step_M)
    token_V = torch.arange(vocab_size, device=seed_M.device)
    word_MV = _mix(key_M[:, None] ^ _mix(token_V)[None])
    # 53 bits are what a double holds; the half keeps u away from 0 and 1.
    u_MV = ((word_MV & ((1 << 53) - 1)).double() + 0.5) / 2.0**53
    return -(-u_MV.log()).log().float()


def _mix(word: Tensor) -> Tensor:
    """The finaliser of SplitMix64, on wrapping int64 with logical shifts."""
    word = word + -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        word = (word ^ ((word >> shift) & (_WORD >> (shift - 1)))) * factor
    return word ^ ((word >> 31) & (_WORD >> 30))
