"""The loss of hidden states under a large vocabulary, without the logits of a whole batch.

Shapes: M counted positions, C positions of a chunk, D and E hidden sizes of student and teacher,
V vocabulary.

Logits of 4,000 positions over 126,000 tokens fill 2 GB in fp32, and a plain loss keeps several such
matrices until the backward pass. Here the head is applied to some positions at a time, and the
gradient of their logits is turned into that of their hidden states at once, in the forward pass:
nothing is computed twice, and what stays is as small as the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2f.ops.linear import matmul_wide

DEFAULT_MEMORY_BYTES = 384 * 2**20
"""256 positions at a time for LLaDA-8B: enough for a GPU to compute longer than it reads the head,
and with the hidden states' gradient still below 0.5 GB."""

LOGIT_BYTES = 12
"""Most memory per position and token of the vocabulary: three matrices in fp32."""

# Rows of a chunk are a multiple of this where they exceed it, as matrix products have tiles.
_TILE = 64
# Rows of a trained head whose gradient is computed at once: 0.13 GB in fp32 at width 4096.
_HEAD_ROWS = 8192


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherStates:
    """A teacher's hidden states at the counted positions, and its head."""

    hidden_ME: Tensor
    """Aligned hidden states; no gradient flows into them."""
    head_VE: Tensor
    """Weight of its head; may be the student's own."""


def chunked_loss(
    hidden_MD: Tensor,
    head_VD: Tensor,
    target: Tensor | TeacherStates,
    weight_M: Tensor,
    objective: str,
    *,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the positions' losses, and the loss of each (M,) without gradient.

    The same as `position_loss` of the heads' logits times the weights, summed: softmax and loss
    are computed in fp32, the products in autocast's dtype, or the heads' where it is off. A frozen
    head costs neither time nor memory for a gradient. Gradients are first-order only.

    Args:
        hidden_MD: The student's aligned hidden states at the counted positions; M may be 0.
        head_VD: Weight of the student's head, trained or frozen.
        target: The teacher, or token ids (M,) for `cross_entropy`.
        weight_M: Weight of each position, denominators included (`distillation_weights` and its
            like); no gradient flows into it.
        objective: One of `OBJECTIVES`.
        memory_bytes: What the logits and what is computed from them may take. It sets how many
            positions a chunk has (see `chunk_size`), at least one.

    Example:
        >>> hidden, head = torch.zeros(2, 4, requires_grad=True), torch.ones(3, 4)
        >>> loss, loss_M = chunked_loss(
        ...     hidden, head, torch.tensor([0, 2]), torch.tensor([1.0, 0.0]), "cross_entropy")
        >>> loss_M
        tensor([1.0986, 1.0986])
    """
    device = hidden_MD.device.type
    dtype = head_VD.dtype
    # As autocast itself does, which leaves fp64 alone.
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    # Inside a Function gradients are off; whether the caller wants any must be asked here.
    plan = _Plan(objective, chunk_size(len(head_VD), memory_bytes), dtype, torch.is_grad_enabled())
    given, head_VE = target, None
    if isinstance(target, TeacherStates):
        given, head_VE = target.hidden_ME, target.head_VE
    with torch.autocast(device, enabled=False):
        return _ChunkedLoss.apply(hidden_MD, head_VD, given, head_VE, weight_M, plan)


def chunk_size(vocab_size: int, memory_bytes: int) -> int:
    """Positions whose logits, with what is computed from them, fit into this memory; at least 1."""
    rows = max(memory_bytes // (LOGIT_BYTES * vocab_size), 1)
    return rows - rows % _TILE if rows > _TILE else rows


class _Plan(NamedTuple):
    objective: str
    size: int
    dtype: torch.dtype
    trains: bool


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients for an upstream gradient of 1; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        head_VD: Tensor,
        target_M: Tensor,
        teacher_head_VE: Tensor | None,
        weight_M: Tensor,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(plan.dtype, torch.float32)
        for_hidden, for_head = (plan.trains and needed for needed in ctx.needs_input_grad[:2])
        w_VD = head_VD.to(plan.dtype)
        t_VE = None
        if teacher_head_VE is not None:
            # Usually one head for both; it must not be rounded twice.
            t_VE = w_VD if teacher_head_VE is head_VD else teacher_head_VE.to(plan.dtype)
        loss_M = hidden_MD.new_empty(len(hidden_MD), dtype=wide)
        grad_MD = torch.empty_like(hidden_MD) if for_hidden else None
        # A sum over chunks: in fp32, as its terms are many and small.
        grad_VD = torch.zeros_like(head_VD, dtype=wide) if for_head else None
        for start in range(0, len(hidden_MD), plan.size):
            rows = slice(start, start + plan.size)
            x_CD = hidden_MD[rows].to(plan.dtype)
            target_C = target_M[rows]
            if t_VE is not None:
                target_C = matmul_wide(target_C.to(plan.dtype), t_VE.T).log_softmax(dim=-1)
            log_p_CV = matmul_wide(x_CD, w_VD.T).log_softmax(dim=-1)
            loss_M[rows], slope_CV = _loss_and_slope(log_p_CV, target_C, plan.objective)
            # Names keep memory: what is done with must go before the next matrix is made.
            del log_p_CV, target_C
            slope_CV = slope_CV.to(plan.dtype)
            # The weights are small, so they are multiplied in after the rounding, where it is
            # cheaper too.
            weight_C1 = weight_M[rows, None]
            if grad_MD is not None:
                grad_MD[rows] = matmul_wide(slope_CV, w_VD) * weight_C1
            if grad_VD is not None:
                _add_head_gradient(grad_VD, slope_CV, (x_CD * weight_C1).to(plan.dtype))
            del slope_CV
        ctx.save_for_backward(grad_MD, grad_VD)
        ctx.head_dtype = head_VD.dtype
        ctx.mark_non_differentiable(loss_M)
        return (weight_M * loss_M).sum(), loss_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_MD, grad_VD = ctx.saved_tensors
        if grad_MD is not None:
            grad_MD = (grad_MD * upstream).to(grad_MD.dtype)
        if grad_VD is not None:
            grad_VD = (grad_VD * upstream).to(ctx.head_dtype)
        return grad_MD, grad_VD, None, None, None, None


def _add_head_gradient(grad_VD: Tensor, slope_CV: Tensor, x_CD: Tensor) -> None:
    """Add a chunk's term, which need not exist whole beside the sum."""
    slopes = slope_CV.split(_HEAD_ROWS, dim=1)
    for part_SD, slope_CS in zip(grad_VD.split(_HEAD_ROWS), slopes, strict=True):
        part_SD += matmul_wide(slope_CS.T, x_CD)


def _loss_and_slope(log_p_CV: Tensor, target_C: Tensor, objective: str) -> tuple[Tensor, Tensor]:
    """Losses (C,), and their gradient with respect to the student's logits (C, V).

    `target_C` is token ids, or the teacher's log-probabilities (C, V). Both matrices are
    overwritten: at most one more of their size exists beside them.
    """
    if objective == "cross_entropy":
        index_C1 = target_C.long()[:, None]
        loss_C = -log_p_CV.gather(1, index_C1)[:, 0]
        p_CV = log_p_CV.exp_()
        return loss_C, p_CV.scatter_add_(1, index_C1, p_CV.new_full(index_C1.shape, -1.0))
    log_q_CV = target_C
    if objective == "reverse_kl":
        gap_CV = log_q_CV.neg_().add_(log_p_CV)
        p_CV = log_p_CV.exp_()
        loss_C = (p_CV * gap_CV).sum(dim=-1)
        return loss_C, gap_CV.sub_(loss_C[:, None]).mul_(p_CV)
    q_CV = log_q_CV.exp()
    # Logits of a head are finite, so the teacher's logarithms are, and 0 log 0 needs no care.
    forward = objective == "forward_kl"
    gap_CV = log_q_CV.sub_(log_p_CV) if forward else log_q_CV.copy_(log_p_CV).neg_()
    loss_C = gap_CV.mul_(q_CV).sum(dim=-1)
    return loss_C, log_p_CV.exp_().sub_(q_CV)
