"""The gate of the feed-forward network in one kernel, alone and with the projection of few tokens.

Shapes: T tokens, D inputs, F intermediate size, F2 = 2 * F.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2f.ops.triton.launch import begin, early_start, gdc_launch_dependents, gdc_wait
from d2f.ops.triton.linear import (
    AHEAD,
    Tiling,
    choose_tiling,
    linear,
    multiply,
    prefetch,
    token_tile,
)

BLOCK = 1024


@triton.jit
def _gated(gate, up):
    """`silu(gate) * up`, rounded to their type."""
    wide = gate.to(tl.float32)
    # Below -80 the result is as good as zero, and the exponential would overflow. It is rounded
    # before the product, as two operations round it.
    active = (wide / (1.0 + tl.exp(-tl.maximum(wide, -80.0)))).to(gate.dtype).to(tl.float32)
    return (active * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, stride, F, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    begin(EARLY)
    gate_up_ptr += token * stride + column
    gate = tl.load(gate_up_ptr, inside, other=0.0)
    up = tl.load(gate_up_ptr + F, inside, other=0.0)
    tl.store(out_ptr + token * F + column, _gated(gate, up), inside)


def swiglu(gate_up_TF2: Tensor) -> Tensor:
    """Do as `d2f.ops.swiglu.swiglu`; rows may lie apart, the numbers of a row may not."""
    num_tokens, width = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    out_TF = torch.empty((num_tokens, width), dtype=gate_up_TF2.dtype, device=gate_up_TF2.device)
    _swiglu_kernel[(num_tokens, triton.cdiv(width, BLOCK))](
        gate_up_TF2, out_TF, gate_up_TF2.stride(0), width, BLOCK=BLOCK, **early_start(gate_up_TF2)
    )
    return out_TF


@triton.jit(do_not_specialize=["T"])
def _gated_linear_kernel(
    x_ptr, weight_ptr, out_ptr, x_stride, T,
    F: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Do as `_linear_kernel`, but with a program's rows half from the gate, half from the up part.

    The weights are read once, in one product of both halves: two of half as many rows would read
    the input twice from shared memory.
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
    tl.store(out_ptrs, _gated(gate, up), is_token)


def gated_linear(x_TD: Tensor, weight_F2D: Tensor) -> Tensor:
    """Do as `d2f.ops.swiglu.gated_linear`; this is fast where T is small.

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
