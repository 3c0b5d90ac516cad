"""The rules of pipelined parallel decoding (paper, algorithm 2) as pure tensor functions.

Shapes: B sequences, N block slots in order, K positions of a block (the last one of a sequence may
be shorter; `valid_BNK` tells). Blocks 0 … opened_B - 1 are open; of these the first cached_B are
CACHED. Thresholds are numbers, or tensors that broadcast, one for each sequence: of float64 where
shares are compared, else 0.1 would not equal the share 1 / 10. Nothing here waits for the host, so
the same functions serve a CPU loop and a captured CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decoded_share(decoded_BNK: Tensor, valid_BNK: Tensor) -> Tensor:
    """Decoded share of each block: (B, N), float64 so that it equals Python's division."""
    size_BN = valid_BNK.sum(-1).clamp_min(1)
    return (decoded_BNK & valid_BNK).sum(-1).double() / size_BN.double()


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
    last_B1 = (opened_B - 1).clamp_min(0)[:, None]
    share_B = torch.where(opened_B > 0, share_BN.gather(1, last_B1)[:, 0], 1.0)
    ready_B = (share_B >= add_threshold) & (opened_B < total_B) & ~eos_seen_B
    if max_live_blocks is not None:
        ready_B = ready_B & (opened_B - cached_B < max_live_blocks)
    return opened_B + ready_B


def activate(share_BN: Tensor, fully_BN: Tensor, *, activate_threshold: float | Tensor) -> Tensor:
    """Turn blocks fully active whose predecessor's share is >= tau_act, for good: (B, N).

    The first block's predecessor is the prompt. Blocks not yet open may be marked; shares only
    rise, so they would be marked once open all the same. As a tensor, the threshold is (B, 1).
    """
    before_BN = torch.cat([torch.ones_like(share_BN[:, :1]), share_BN[:, :-1]], dim=1)
    return fully_BN | (before_BN >= activate_threshold)


def accept(
    candidate_BNK: Tensor,
    confidence_BNK: Tensor,
    rank_BNK: Tensor,
    fully_BN: Tensor,
    *,
    confidence_threshold: float | Tensor,
) -> Tensor:
    """Which candidates (masked positions of open blocks) are accepted: (B, N, K), bool.

    All whose confidence is > tau_conf; a fully active block in which none is accepts the one that
    ranks highest (the first of equals), a semi-active block then accepts nothing. As a tensor, the
    threshold is fp32, as the confidence, and (B, 1, 1).
    """
    sure_BNK = candidate_BNK & (confidence_BNK > confidence_threshold)
    # A NaN from a broken model must not stop decoding: it ranks last among the candidates.
    rank_BNK = rank_BNK.nan_to_num(nan=torch.finfo(rank_BNK.dtype).min)
    score_BNK = torch.where(candidate_BNK, rank_BNK, -torch.inf)
    best_BN1 = score_BNK.amax(-1, keepdim=True)
    index_K = torch.arange(candidate_BNK.shape[-1], device=candidate_BNK.device)
    first_BN1 = torch.where(score_BNK == best_BN1, index_K, len(index_K)).amin(-1, keepdim=True)
    forced_BN = fully_BN & ~sure_BNK.any(-1)
    return sure_BNK | (forced_BN[..., None] & candidate_BNK & (index_K == first_BN1))


def completed_blocks(share_BN: Tensor, opened_B: Tensor) -> Tensor:
    """Leading open blocks without a mask, COMPLETE or CACHED: (B,).

    The next forward computes their keys and values from their final tokens, which caches them.
    """
    slot_N = torch.arange(share_BN.shape[1], device=share_BN.device)
    done_BN = (share_BN >= 1) & (slot_N < opened_B[:, None])
    return done_BN.long().cumprod(-1).sum(-1)


def finished(decoded_BR: Tensor, is_eos_BR: Tensor, idle_B: Tensor, *, early_stop: bool) -> Tensor:
    """Which sequences are done: (B,), bool.

    Args:
        decoded_BR: Decoded positions of the response, in order.
        is_eos_BR: Decoded positions that hold an EOS.
        idle_B: No open block has a mask and no further one may open.
        early_stop: Done already when everything up to some EOS is decoded.
    """
    if not early_stop:
        return idle_B
    prefix_BR = decoded_BR.long().cumprod(-1).bool()
    return idle_B | (prefix_BR & is_eos_BR).any(-1)
