"""Turn logits into one token, its probability and its rank at each position.

Shapes: M positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PROBABILITY, MARGIN, NEG_ENTROPY = 0, 1, 2
"""Codes of what ranks a position: its token's probability, the gap between the two most probable
tokens, or how concentrated its distribution is."""

CONFIDENCE_CODES = {"probability": PROBABILITY, "margin": MARGIN, "neg_entropy": NEG_ENTROPY}
"""Code of each measure of confidence, by the name that a decoding policy uses."""

_WORD = (1 << 63) - 1


class Choice(NamedTuple):
    """The token that is chosen at each position, and how sure it is."""

    token_M: Tensor
    """Token chosen at each position, int64."""
    probability_M: Tensor
    """Probability of that token, fp32; not finite where the logits are not."""
    rank_M: Tensor
    """Rank of each position, fp32: where only one may be decoded, the highest is preferred."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampling:
    """Temperature, filters and noise with which a token is sampled at each position."""

    temperature_M: Tensor
    """fp32; 0: the most probable token, whatever else is set."""
    top_k_M: Tensor
    """Sample among this many most probable tokens, int64; 0: among all."""
    top_p_M: Tensor
    """Sample among the fewest most probable tokens of this mass, fp32; 1: among all."""
    seed_M: Tensor
    """Seed of each position's request, int64."""
    position_M: Tensor
    """Absolute position in its sequence, int64."""
    step_M: Tensor
    """Forwards of its sequence before this one, int64."""
    truncated: bool
    """False: no position sets `top_k_M`, `top_p_M` or `min_p_M`, and none of them is read."""
    min_p_M: Tensor | None = None
    """Sample among tokens of at least this share of the largest probability that a token other than
    the mask token has, fp32; 0: among all. None: 0 everywhere."""


def choose_tokens(
    logits_MV: Tensor,
    *,
    mask_token_id: int | None,
    confidence_M: Tensor | None = None,
    sampling: Sampling | None = None,
    needed_M: Tensor | None = None,
) -> Choice:
    """The token of each position, its probability and its rank.

    The token is the most probable one (the first of equals), else a sample of
    softmax(logits / temperature) by the Gumbel-max trick. Sampling may be confined to the top k
    tokens, then among these to the top p of their mass; all that equal the last one kept are kept.
    Last, as in transformers, min p keeps those of them that have at least this share of the largest
    probability. Probabilities are those of the softmax over what is kept. The mask token is never
    chosen, yet its probability counts in the softmax; the most probable other token is always kept,
    and it is the one that min p compares with.

    Args:
        logits_MV: Logits, computed with as fp32.
        mask_token_id: The token that is never chosen; None: there is none.
        confidence_M: What ranks each position, a code from `CONFIDENCE_CODES`; None: the
            probability. The margin leaves the mask token out, the entropy counts it.
        sampling: None: the most probable token everywhere.
        needed_M: Where a choice is needed, bool; elsewhere all three results are 0. None: all.

    Example:
        >>> choice = choose_tokens(torch.tensor([[0.0, 9.0, 5.0]]), mask_token_id=1)
        >>> int(choice.token_M), round(float(choice.probability_M), 3)
        (2, 0.018)
    """
    scaled_MV = _scaled(logits_MV, sampling, mask_token_id)
    score_MV = scaled_MV
    if sampling is not None:
        noise_MV = gumbel_noise(
            sampling.seed_M, sampling.position_M, sampling.step_M, score_MV.shape[-1]
        )
        score_MV = score_MV + noise_MV.where((sampling.temperature_M > 0)[:, None], 0.0)
    token_M = _argmax_without(score_MV, mask_token_id)
    probability_MV = scaled_MV.softmax(-1)
    probability_M = probability_MV.gather(-1, token_M[:, None])[:, 0]
    rank_M = probability_M
    if confidence_M is not None:
        rank_M = _rank(probability_MV, probability_M, confidence_M, mask_token_id)
    if needed_M is None:
        return Choice(token_M, probability_M, rank_M)
    return Choice(
        token_M.where(needed_M, 0), probability_M.where(needed_M, 0), rank_M.where(needed_M, 0)
    )


def most_probable(
    logits_MV: Tensor,
    count: int,
    *,
    mask_token_id: int | None,
    sampling: Sampling | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens that `choose_tokens` is likeliest to choose, and their probabilities there.

    Args:
        logits_MV: Logits, computed with as fp32.
        count: How many of each position; at most V.
        mask_token_id: The token that is never chosen; None: there is none.
        sampling: As in `choose_tokens`; what it does not keep has the probability 0.

    Returns:
        Token ids, int64, and probabilities, fp32, both (M, count), the most probable one first.

    Example:
        >>> ids, p = most_probable(torch.tensor([[0.0, 9.0, 5.0]]), 2, mask_token_id=1)
        >>> ids.tolist(), [round(x, 4) for x in p[0].tolist()]
        ([[2, 0]], [0.018, 0.0001])
    """
    scaled_MV = _scaled(logits_MV, sampling, mask_token_id)
    value_MA, token_MA = _without(scaled_MV, mask_token_id, -torch.inf).topk(count, -1)
    return token_MA, (value_MA - scaled_MV.logsumexp(-1, keepdim=True)).exp()


def gumbel_noise(seed_M: Tensor, position_M: Tensor, step_M: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise (M, V), a hash of (seed, position, step, token) and of nothing else.

    So a sequence is sampled with the same noise alone, in any batch and on any device. `Sampling`
    says what seed, position and step are.

    Example:
        >>> one = torch.tensor([1])
        >>> gumbel_noise(one, one, one, 3).shape
        torch.Size([1, 3])
    """
    key_M = _key(seed_M, position_M, step_M)
    token_V = torch.arange(vocab_size, device=seed_M.device)
    return -(-_unit(key_M[:, None] ^ _mix(token_V)[None]).log()).log().float()


def uniform_noise(seed_M: Tensor, position_M: Tensor, step_M: Tensor) -> Tensor:
    """Noise (M,) between 0 and 1, fp64, a hash of the same but of no token.

    Example:
        >>> one = torch.tensor([1])
        >>> 0 < float(uniform_noise(one, one, one)) < 1
        True
    """
    return _unit(~_key(seed_M, position_M, step_M))


def _key(seed_M: Tensor, position_M: Tensor, step_M: Tensor) -> Tensor:
    return _mix(_mix(_mix(seed_M) ^ position_M) ^ step_M)


def _unit(key: Tensor) -> Tensor:
    # 53 bits are what a double holds; the half keeps u away from 0 and 1.
    return ((_mix(key) & ((1 << 53) - 1)).double() + 0.5) / 2.0**53


def _mix(word: Tensor) -> Tensor:
    """The finaliser of SplitMix64, on wrapping int64 with logical shifts."""
    word = word + -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        word = (word ^ ((word >> shift) & (_WORD >> (shift - 1)))) * factor
    return word ^ ((word >> 31) & (_WORD >> 30))


def _scaled(logits_MV: Tensor, sampling: Sampling | None, mask_token_id: int | None) -> Tensor:
    """Logits / temperature, -inf where they are not kept; as they are where nothing is sampled."""
    scaled_MV = logits_MV.float()
    if sampling is None:
        return scaled_MV
    sampled_M1 = (sampling.temperature_M > 0)[:, None]
    scaled_MV = scaled_MV / sampling.temperature_M[:, None].where(sampled_M1, 1.0)
    return _truncate(scaled_MV, sampling, mask_token_id) if sampling.truncated else scaled_MV


def _truncate(scaled_MV: Tensor, sampling: Sampling, mask_token_id: int | None) -> Tensor:
    """-inf below the top k, the top p and the min p of each sampled position."""
    vocab_size = scaled_MV.shape[-1]
    sorted_MV = scaled_MV.sort(-1, descending=True).values
    top_k_M1 = sampling.top_k_M[:, None]
    last_M1 = top_k_M1.where(top_k_M1 > 0, vocab_size).clamp_max(vocab_size) - 1
    threshold_M1 = sorted_MV.gather(-1, last_M1)
    weight_MV = (sorted_MV - sorted_MV[:, :1]).exp().double()
    mass_MV = weight_MV.where(sorted_MV >= threshold_M1, 0.0).cumsum(-1)
    top_p_M1 = sampling.top_p_M[:, None]
    last_M1 = (mass_MV < top_p_M1 * mass_MV[:, -1:]).sum(-1, keepdim=True).clamp_max(vocab_size - 1)
    # Tokens too improbable to change the mass are part of the whole all the same.
    threshold_M1 = sorted_MV.gather(-1, last_M1).where(top_p_M1 < 1, threshold_M1)
    best_M1 = _without(scaled_MV, mask_token_id, -torch.inf).amax(-1, keepdim=True)
    threshold_M1 = torch.minimum(threshold_M1, best_M1)
    if sampling.min_p_M is not None:
        threshold_M1 = torch.maximum(threshold_M1, best_M1 + sampling.min_p_M.log()[:, None])
    dropped_MV = scaled_MV < threshold_M1
    return scaled_MV.masked_fill(dropped_MV & (sampling.temperature_M > 0)[:, None], -torch.inf)


def _rank(
    probability_MV: Tensor, probability_M: Tensor, confidence_M: Tensor, mask_token_id: int | None
) -> Tensor:
    neg_entropy_M = -torch.special.entr(probability_MV).sum(-1)
    top_M2 = _without(probability_MV, mask_token_id, 0.0).topk(2, -1).values
    rank_M = torch.where(confidence_M == MARGIN, top_M2[:, 0] - top_M2[:, 1], probability_M)
    return torch.where(confidence_M == NEG_ENTROPY, neg_entropy_M, rank_M)


def _without(x_MV: Tensor, token_id: int | None, value: float) -> Tensor:
    if token_id is None:
        return x_MV
    x_MV = x_MV.clone()
    x_MV[:, token_id].fill_(value)
    return x_MV


def _argmax_without(x_MV: Tensor, token_id: int | None) -> Tensor:
    if x_MV.device.type != "cpu":
        return _without(x_MV, token_id, -torch.inf).argmax(-1)
    # On a CPU numpy's is ten times as fast, and both give the first of equals.
    values_MV = x_MV.detach().numpy()
    if token_id is None:
        return torch.from_numpy(values_MV.argmax(-1))
    # A copy of all logits would take longer than the rest, so the token is out only for now.
    kept_M = values_MV[:, token_id].copy()
    values_MV[:, token_id] = -np.inf
    best_M = torch.from_numpy(values_MV.argmax(-1))
    values_MV[:, token_id] = kept_M
    return best_M
