"""Residual sum and RMSNorm in one kernel.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2f.ops.triton.launch import begin, early_start


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, sum_ptr, x_stride, residual_stride, D, eps,
    ADDS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    # Nobody writes the weights, so they may be read before the wait.
    weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
    begin(EARLY)
    x = tl.load(x_ptr + token * x_stride + column, inside, other=0.0)
    if ADDS:
        residual = tl.load(residual_ptr + token * residual_stride + column, inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + token * D + column, x, inside)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / D + eps)
    normed = x * scale * weight
    tl.store(normed_ptr + token * D + column, normed.to(normed_ptr.dtype.element_ty), inside)


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Do as `d2f.ops.norm.add_rms_norm`; rows may lie apart, the numbers of a row may not."""
    num_tokens, width = x_TD.shape
    normed_TD = torch.empty((num_tokens, width), dtype=x_TD.dtype, device=x_TD.device)
    sum_TD = x_TD if residual_TD is None else torch.empty_like(normed_TD)
    other_TD = x_TD if residual_TD is None else residual_TD
    block = triton.next_power_of_2(width)
    _add_rms_norm_kernel[(num_tokens,)](
        x_TD, other_TD, weight_D, normed_TD, sum_TD, x_TD.stride(0), other_TD.stride(0), width, eps,
        ADDS=residual_TD is not None, BLOCK=block, num_warps=min(max(block // 256, 1), 16),
        **early_start(x_TD),
    )  # fmt: skip
    return normed_TD, sum_TD
