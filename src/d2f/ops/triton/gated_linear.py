"""The gate and up projection of few tokens with SwiGLU, in one kernel that reads the weights once.

Shapes: T tokens, D inputs, F intermediate size, F2 = 2 * F.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2f.ops.triton.launch import early_start, gdc_launch_dependents, gdc_wait
from d2f.ops.triton.linear import (
    AHEAD,
    Tiling,
    choose_tiling,
    linear,
    multiply,
    prefetch,
    token_tile,
)
from d2f.ops.triton.swiglu import gated, swiglu


@triton.jit(do_not_specialize=["T"])
def _gated_linear_kernel(
    x_ptr, weight_ptr, out_ptr, x_stride, T,
    F: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """As `_linear_kernel`; half of a program's rows are of the gate, half the same of the up part.

    One product of both halves: two of half as many rows read the input twice from shared memory.
    """
    HALF: tl.constexpr = ROWS // 2
    local = tl.arange(0, ROWS)
    row = local // HALF * F + tl.program_id(0) * HALF + local % HALF
    token = tl.arange(0, TOKENS)
    depth = tl.arange(0, DEPTH)
    if EARLY:
        gdc_launch_dependents()
        prefetch(weight_ptr, row, 2 * F, D, AHEAD)
        gdc_wait()
    weight_ptrs = weight_ptr + row.to(tl.int64)[:, None] * D + depth[None, :]
    x_ptrs = x_ptr + token.to(tl.int64)[None, :] * x_stride + depth[:, None]
    is_token = token[None, :] < T
    acc = multiply(weight_ptrs, x_ptrs, is_token, D, DEPTH, STAGES)
    both = acc.to(out_ptr.dtype.element_ty).reshape(2, HALF, TOKENS)
    gate, up = tl.split(both.permute(1, 2, 0))
    own = tl.program_id(0) * HALF + tl.arange(0, HALF)
    out_ptrs = out_ptr + token.to(tl.int64)[None, :] * F + own[:, None]
    tl.store(out_ptrs, gated(gate, up), is_token)


def gated_linear(x_TD: Tensor, weight_F2D: Tensor) -> Tensor:
    """As `d2f.ops.swiglu.gated_linear`; fast where T is small.

    The numbers of a row must be adjacent; weights must be contiguous.
    """
    tiling = choose_tiling(x_TD, weight_F2D)
    # Of one token the product is not worth a kernel of its own: measured, nothing is gained.
    if tiling is None or len(x_TD) == 1 or len(weight_F2D) % tiling.rows:
        return swiglu(linear(x_TD, weight_F2D))
    return tiled_gated_linear(x_TD, weight_F2D, tiling)


def tiled_gated_linear(x_TD: Tensor, weight_F2D: Tensor, tiling: Tiling) -> Tensor:
    """The same, cut into programs as `tiling` says; its rows must divide those of the weights."""
    assert x_TD.stride(1) == 1 and weight_F2D.is_contiguous(), "rows must be contiguous"
    num_rows, width = len(weight_F2D) // 2, weight_F2D.shape[1]
    out_TF = torch.empty((len(x_TD), num_rows), dtype=x_TD.dtype, device=x_TD.device)
    _gated_linear_kernel[(len(weight_F2D) // tiling.rows,)](
        x_TD, weight_F2D, out_TF, x_TD.stride(0), len(x_TD),
        F=num_rows, D=width, TOKENS=token_tile(len(x_TD)), ROWS=tiling.rows, DEPTH=tiling.depth,
        STAGES=tiling.stages, AHEAD=AHEAD, num_warps=tiling.warps, **early_start(x_TD),
    )  # fmt: skip
    return out_TF
