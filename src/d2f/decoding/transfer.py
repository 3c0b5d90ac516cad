"""Rules of the samplers without a pipeline: they choose the predictions of a block that are kept.

Shapes: B sequences, K positions of a block. Nothing here waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def order(candidate_BK: Tensor, rank_BK: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each position when candidates stand in order of their rank, and the ranks so.

    The first of equals comes first; positions that are no candidates come last, with -inf. A rank
    that is not a number comes first, so that a broken model's decoding ends all the same.

    Example:
        >>> order(torch.tensor([[True, True, False]]), torch.tensor([[0.1, 0.2, 0.9]]))
        (tensor([[1, 0, 2]]), tensor([[0.2000, 0.1000,   -inf]]))
    """
    rank_BK = rank_BK.where(candidate_BK, -torch.inf)
    sorted_BK, index_BK = rank_BK.sort(dim=1, descending=True, stable=True)
    place_K = torch.arange(rank_BK.shape[1], device=rank_BK.device)
    place_BK = torch.empty_like(index_BK).scatter_(1, index_BK, place_K.expand_as(index_BK))
    return place_BK, sorted_BK


def keep_best(candidate_BK: Tensor, rank_BK: Tensor, keep_B: Tensor) -> Tensor:
    """The `keep_B` candidates of the highest rank: (B, K), bool.

    Example:
        >>> candidate, rank = torch.tensor([[True, True, False]]), torch.tensor([[0.1, 0.2, 0.9]])
        >>> keep_best(candidate, rank, torch.tensor([1]))
        tensor([[False,  True, False]])
    """
    return candidate_BK & (order(candidate_BK, rank_BK)[0] < keep_B[:, None])


def keep_above(candidate_BK: Tensor, confidence_BK: Tensor, threshold: float) -> Tensor:
    """The candidates of at least this confidence, and the most confident one: (B, K), bool.

    Example:
        >>> candidate, confidence = torch.tensor([[True] * 3]), torch.tensor([[0.6, 0.9, 0.2]])
        >>> keep_above(candidate, confidence, 0.5)
        tensor([[ True,  True, False]])
    """
    first_BK = order(candidate_BK, confidence_BK)[0] == 0
    return candidate_BK & (first_BK | (confidence_BK >= threshold))


def keep_by_factor(candidate_BK: Tensor, confidence_BK: Tensor, factor: float) -> Tensor:
    """The n most confident candidates for the largest n, at least 1, that the factor allows.

    It allows n where (n + 1) (1 - c) < factor, c being the n-th highest confidence: (B, K), bool.

    Example:
        >>> candidate, confidence = torch.tensor([[True] * 3]), torch.tensor([[0.6, 0.9, 0.2]])
        >>> keep_by_factor(candidate, confidence, 1.3)
        tensor([[ True,  True, False]])
    """
    place_BK, sorted_BK = order(candidate_BK, confidence_BK)
    number_K = torch.arange(1, sorted_BK.shape[1] + 1, device=sorted_BK.device)
    allowed_BK = (number_K + 1) * (1 - sorted_BK.double()) < factor
    keep_B1 = (number_K * allowed_BK).amax(1, keepdim=True).clamp_min(1)
    return candidate_BK & (place_BK < keep_B1)
