"""The rules of pipelined parallel decoding (paper, algorithm 2) as pure tensor functions.

Shapes: B sequences, N block slots in order, K positions of a block (the last one of a sequence may
be shorter; `length_BN` tells). Blocks 0 … opened_B - 1 are open; of these the first cached_B are
CACHED. Thresholds are numbers, or tensors that broadcast, one for each sequence: of float64 where
shares are compared, else 0.1 would not equal the share 1 / 10. Nothing here waits for the host, so
the same functions serve a CPU loop and a captured CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decoded_share(decoded_BNK: Tensor, length_BN: Tensor) -> Tensor:
    """Decoded share of each block: (B, N), float64 so that it equals Python's division.

    `length_BN` is float64 and at least 1; positions beyond it are not decoded.
    """
    return decoded_BNK.sum(-1) / length_BN


def open_blocks(
    share_BN: Tensor,
    opened_B: Tensor,
    cached_B: Tensor,
    total_B: Tensor,
    eos_seen_B: Tensor,
    *,
    add_threshold: float | Tensor,
    max_live_blocks: int | Tensor | None,
) -> Tensor:
    """Open at most one block per sequence; returns opened_B.

    It opens when the last open block's decoded share is >= tau_add (the prompt's is 1), no EOS has
    been accepted, blocks are left, and the window has room. As tensors, threshold and window are
    (B,); None, or a window that no response fills, is unbounded.
    """
    share_B = _with_prompt(share_BN).gather(1, opened_B[:, None])[:, 0]
    most_B = torch.where(eos_seen_B, opened_B, total_B)
    if max_live_blocks is not None:
        most_B = torch.minimum(most_B, cached_B + max_live_blocks)
    return opened_B + ((share_B >= add_threshold) & (opened_B < most_B))


def _with_prompt(share_BN: Tensor) -> Tensor:
    """The shares behind that of the prompt, which is 1."""
    return torch.nn.functional.pad(share_BN, (1, 0), value=1.0)


def activate(share_BN: Tensor, fully_BN: Tensor, *, activate_threshold: float | Tensor) -> Tensor:
    """Turn blocks fully active whose predecessor's share is >= tau_act, for good: (B, N).

    The first block's predecessor is the prompt. Blocks not yet open may be marked; shares only
    rise, so they would be marked once open all the same. As a tensor, the threshold is (B, 1).
    """
    return fully_BN | (_with_prompt(share_BN[:, :-1]) >= activate_threshold)


def accept(
    candidate_BNK: Tensor,
    confidence_BNK: Tensor,
    rank_BNK: Tensor,
    fully_BN: Tensor,
    *,
    confidence_threshold: float | Tensor,
) -> Tensor:
    """Mark the candidates (masked positions of open blocks) that are accepted: (B, N, K), bool.

    All whose confidence is > tau_conf; a fully active block in which none is accepts the one that
    ranks highest (the first of equals), a semi-active block then accepts nothing. As a tensor, the
    threshold is fp32, as the confidence, and (B, 1, 1).
    """
    sure_BNK = candidate_BNK & (confidence_BNK > confidence_threshold)
    # A NaN from a broken model must not stop decoding: it ranks last among the candidates.
    rank_BNK = rank_BNK.nan_to_num(nan=torch.finfo(rank_BNK.dtype).min)
    # The first of equals.
    best_BN1 = torch.where(candidate_BNK, rank_BNK, -torch.inf).argmax(-1, keepdim=True)
    index_K = torch.arange(candidate_BNK.shape[-1], device=candidate_BNK.device)
    forced_BN1 = fully_BN[..., None] > sure_BNK.any(-1, keepdim=True)
    return torch.where(forced_BN1, index_K == best_BN1, sure_BNK) & candidate_BNK


def completed_blocks(first_gap_B: Tensor, opened_B: Tensor, size_B: Tensor) -> Tensor:
    """Leading open blocks without a mask, COMPLETE or CACHED: (B,).

    The next forward computes their keys and values from their final tokens, which caches them.

    Args:
        first_gap_B: Place in the response of the first mask; anything beyond it if there is none.
        opened_B: Open blocks.
        size_B: Block size.
    """
    return torch.minimum(first_gap_B // size_B, opened_B)


def idle(complete_B: Tensor, opened_B: Tensor, total_B: Tensor, eos_seen_B: Tensor) -> Tensor:
    """Mark sequences that have no open block with a mask and may open no other: (B,), bool."""
    return complete_B >= torch.where(eos_seen_B, opened_B, total_B)


def finished(
    first_gap_B: Tensor, first_eos_B: Tensor, idle_B: Tensor, *, early_stop: Tensor
) -> Tensor:
    """Mark the sequences that are done: (B,), bool.

    Args:
        first_gap_B: Place in the response of the first mask.
        first_eos_B: Place of the first EOS; no less than the gap's if there is none.
        idle_B: No open block has a mask and no further one may open.
        early_stop: Not 0: done already when everything up to some EOS is decoded.
    """
    return idle_B | torch.logical_and(first_eos_B < first_gap_B, early_stop)
