"""Block-causal attention over the paged cache, in plain torch: the twin of the Triton kernels.

Shapes: T packed tokens of B rows, L queries and S keys of a row, N query heads, K key/value heads,
G = N / K, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2f.ops.attention import AttentionMask, attention
from d2f.ops.packed import PackedTokens


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionPlan:
    """Plan that a forward's layers share. The tokens become B rows of L queries and S keys."""

    rows: tuple[int, int, int]
    """B, L, S; with S = 0 there is nothing to attend to."""
    keys: Tensor | slice
    """The slots of the rows' keys, B * S of them."""
    mask: AttentionMask | None
    """Mask that says which tokens see which; None: all see all."""
    queries: Tensor | None
    """The token of each of the B * L queries; None: they are the tokens themselves."""
    answers: Tensor | None
    """The query of each of the T tokens; None: they are the queries themselves."""
    padding_T1: Tensor | None
    """Marks of the tokens that are padding; None: no token is."""


def plan_attention(packed: PackedTokens, num_heads: int, num_kv_heads: int) -> AttentionPlan:
    """Work out once what all layers' `paged_attention` of a forward need.

    Example:
        >>> packed = PackedTokens(
        ...     positions_T=torch.tensor([0, 1]), slots_T=torch.tensor([4, 5]),
        ...     limits_T=torch.tensor([1, 2]), starts_B=torch.tensor([0]),
        ...     counts_B=torch.tensor([2]), ends_B=torch.tensor([2]),
        ...     pages_BP=torch.tensor([[1]]), page_size=4, max_count=2, max_end=2,
        ... )
        >>> plan_attention(packed, num_heads=4, num_kv_heads=2).rows
        (1, 2, 2)
    """
    batch, num_tokens = len(packed.counts_B), len(packed.limits_T)
    # What a tensor on the CPU holds can be looked at; on a GPU that would wait for it.
    on_cpu = packed.limits_T.device.type == "cpu"
    length = num_tokens if batch == 1 else packed.max_count
    num_keys = int(packed.ends_B.max()) if on_cpu and batch else packed.max_end
    queries, answers = (None, None) if batch == 1 else _rows_of_tokens(packed, on_cpu)
    limits_T = packed.limits_T if queries is None else packed.limits_T[queries]
    return AttentionPlan(
        rows=(batch, length, num_keys),
        keys=_key_slots(packed, num_keys, on_cpu),
        mask=_mask(limits_T.view(batch, length), num_keys, num_heads // num_kv_heads, on_cpu),
        queries=queries,
        answers=answers,
        padding_T1=_padding(packed, on_cpu),
    )


def paged_attention(q_TNH: Tensor, kv_2SKH: Tensor, plan: AttentionPlan) -> Tensor:
    """Each token's softmax attention over the keys of its row before its limit: (T, N * H).

    The output of padding is zero.

    Args:
        q_TNH: Rotated queries.
        kv_2SKH: Keys and values of a layer, those of this forward's tokens included. What other
            slots than the rows' own hold never matters, not even NaN.
        plan: From `plan_attention`.

    Example:
        >>> packed = PackedTokens(
        ...     positions_T=torch.tensor([0]), slots_T=torch.tensor([1]),
        ...     limits_T=torch.tensor([1]), starts_B=torch.tensor([0]),
        ...     counts_B=torch.tensor([1]), ends_B=torch.tensor([1]),
        ...     pages_BP=torch.tensor([[1]]), page_size=1, max_count=1, max_end=1,
        ... )
        >>> plan = plan_attention(packed, num_heads=2, num_kv_heads=1)
        >>> kv = torch.zeros(2, 4, 1, 2)
        >>> kv[1, 1] = torch.tensor([3.0, 4.0])
        >>> paged_attention(torch.ones(1, 2, 2), kv, plan)
        tensor([[3., 4., 3., 4.]])
    """
    batch, length, num_keys = plan.rows
    if batch * length * num_keys == 0:
        return q_TNH.new_zeros(q_TNH.shape[0], q_TNH.shape[1] * q_TNH.shape[2])
    if isinstance(plan.keys, slice):
        kv_2SKH = kv_2SKH[:, plan.keys]
    else:
        kv_2SKH = kv_2SKH.index_select(1, plan.keys)
    # Views by `unflatten` would cost a small model a twentieth of its step.
    k_BSKH, v_BSKH = kv_2SKH.view(2, batch, num_keys, *kv_2SKH.shape[2:]).unbind()
    if plan.queries is not None:
        q_TNH = q_TNH.index_select(0, plan.queries)
    q_BLNH = q_TNH.reshape(batch, length, *q_TNH.shape[1:])
    out_TE = attention(q_BLNH, k_BSKH, v_BSKH, plan.mask).flatten(0, 1)
    if plan.answers is not None:
        out_TE = out_TE.index_select(0, plan.answers)
    return out_TE if plan.padding_T1 is None else out_TE.masked_fill(plan.padding_T1, 0)


def _rows_of_tokens(packed: PackedTokens, on_cpu: bool) -> tuple[Tensor | None, Tensor | None]:
    """The token of each of the B * max_count queries, and the query of each token."""
    num_tokens, length = len(packed.limits_T), packed.max_count
    counts_B, starts_B = packed.counts_B, packed.starts_B
    if on_cpu and len(counts_B) * length == num_tokens and bool((counts_B == length).all()):
        return None, None
    device = counts_B.device
    queries_BL = starts_B[:, None] + torch.arange(length, device=device)
    token_T = torch.arange(num_tokens, device=device)
    row_T = torch.searchsorted(counts_B.cumsum(0), token_T, right=True)
    row_T = row_T.clamp_max(len(counts_B) - 1)
    answers_T = row_T * length + (token_T - starts_B[row_T]).clamp_max(length - 1)
    # A query that no token answers to is that of any token; nobody reads its answer.
    return queries_BL.clamp_max(num_tokens - 1).flatten(), answers_T


def _padding(packed: PackedTokens, on_cpu: bool) -> Tensor | None:
    num_tokens, used = len(packed.limits_T), packed.counts_B.sum()
    if on_cpu and int(used) == num_tokens:
        return None
    return (torch.arange(num_tokens, device=used.device) >= used)[:, None]


def _key_slots(packed: PackedTokens, num_keys: int, on_cpu: bool) -> Tensor | slice:
    """The slot of each position of each row; after a row's end, its last one again."""
    size, last_B1 = packed.page_size, packed.ends_B[:, None] - 1
    if on_cpu and len(last_B1) == 1:
        pages_P = packed.pages_BP[0, : -(-num_keys // size)]
        if bool((pages_P.diff() == 1).all()):
            first = int(pages_P[0]) * size if len(pages_P) else 0
            return slice(first, first + num_keys)
    # A slot that was never written may hold NaN, which a weight of zero does not undo.
    position_S = torch.arange(num_keys, device=last_B1.device)
    position_BS = torch.minimum(position_S, last_B1.clamp_min(0))
    page_BS = packed.pages_BP.gather(1, position_BS // size)
    # The pages of a row without keys may be anything.
    return (page_BS * size + position_BS % size).where(last_B1 >= 0, 0).flatten()


def _mask(limits_BL: Tensor, num_keys: int, groups: int, on_cpu: bool) -> AttentionMask | None:
    batch, length = limits_BL.shape
    if limits_BL.numel() * num_keys == 0 or (on_cpu and bool((limits_BL >= num_keys).all())):
        return None
    position_S = torch.arange(num_keys, device=limits_BL.device)
    # A row of the mask that hides all would make NaN.
    limits_BL = limits_BL.clamp_min(1)

    def visible(start: int, end: int) -> Tensor:
        visible_BLS = position_S < limits_BL[:, start:end, None]
        if not on_cpu:
            return visible_BLS
        # There, each layer would make this of a bool mask.
        return torch.zeros(visible_BLS.shape).masked_fill_(~visible_BLS, -torch.inf)

    return AttentionMask(visible, (batch, length, num_keys), groups)
