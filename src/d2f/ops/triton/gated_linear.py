"""The gate and up projection of few tokens with SwiGLU, in one kernel that reads the weights once.

Shapes: T tokens, D inputs, F intermediate size, F2 = 2 * F.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2f.ops.triton.launch import begin, early_start, gdc_launch_dependents, gdc_wait
from d2f.ops.triton.linear import AHEAD, Tiling, choose_tiling, linear, prefetch, token_tile
from d2f.ops.triton.swiglu import gated, swiglu


@triton.jit(do_not_specialize=["T"])
def _gated_linear_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    T,
    F: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """As `_linear_kernel`; a program owns ROWS rows of the gate and the same of the up part."""
    up_ptr = weight_ptr + F * D
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    depth = tl.arange(0, DEPTH)
    if EARLY:
        gdc_launch_dependents()
        prefetch(weight_ptr, row, F, D, AHEAD)
        prefetch(up_ptr, row, F, D, AHEAD)
        gdc_wait()
    place = tl.minimum(row, F - 1).to(tl.int64)[:, None] * D + depth[None, :]
    x_ptrs = x_ptr + token.to(tl.int64)[None, :] * x_stride + depth[:, None]
    is_token = token[None, :] < T
    gate_acc = tl.zeros((ROWS, TOKENS), tl.float32)
    up_acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.range(0, D, DEPTH, num_stages=STAGES):
        if D % DEPTH == 0:
            gate = tl.load(weight_ptr + place + start, eviction_policy="evict_first")
            up = tl.load(up_ptr + place + start, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, is_token, other=0.0)
        else:
            inside = start + depth < D
            gate = tl.load(weight_ptr + place + start, inside[None, :], other=0.0)
            up = tl.load(up_ptr + place + start, inside[None, :], other=0.0)
            x = tl.load(x_ptrs + start, is_token & inside[:, None], other=0.0)
        gate_acc = tl.dot(gate, x, gate_acc, input_precision="ieee")
        up_acc = tl.dot(up, x, up_acc, input_precision="ieee")
    out_ptrs = out_ptr + token.to(tl.int64)[None, :] * F + row[:, None]
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptrs, gated(gate_acc.to(dtype), up_acc.to(dtype)), is_token & (row < F)[:, None])


@triton.jit
def _one_token_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    F: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The same of one token, as `linear._one_token_kernel`."""
    begin(EARLY)
    up_ptr = weight_ptr + F * D
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    place = tl.minimum(row, F - 1).to(tl.int64)[:, None] * D + depth[None, :]
    gate_acc = tl.zeros((ROWS, DEPTH), tl.float32)
    up_acc = tl.zeros((ROWS, DEPTH), tl.float32)
    for start in tl.range(0, D, DEPTH, num_stages=STAGES):
        if D % DEPTH == 0:
            gate = tl.load(weight_ptr + place + start, eviction_policy="evict_first")
            up = tl.load(up_ptr + place + start, eviction_policy="evict_first")
            x = tl.load(x_ptr + start + depth)
        else:
            inside = start + depth < D
            gate = tl.load(weight_ptr + place + start, inside[None, :], other=0.0)
            up = tl.load(up_ptr + place + start, inside[None, :], other=0.0)
            x = tl.load(x_ptr + start + depth, inside, other=0.0)
        x = x.to(tl.float32)[None, :]
        gate_acc += gate.to(tl.float32) * x
        up_acc += up.to(tl.float32) * x
    dtype = out_ptr.dtype.element_ty
    out = gated(tl.sum(gate_acc, axis=1).to(dtype), tl.sum(up_acc, axis=1).to(dtype))
    tl.store(out_ptr + row, out, row < F)


def gated_linear(x_TD: Tensor, weight_F2D: Tensor) -> Tensor:
    """As `d2f.ops.swiglu.gated_linear`; fast where T is small.

    The numbers of a row must be adjacent; weights must be contiguous.
    """
    tiling = choose_tiling(x_TD, weight_F2D, parts=2)
    if tiling is None:
        return swiglu(linear(x_TD, weight_F2D))
    return tiled_gated_linear(x_TD, weight_F2D, tiling)


def tiled_gated_linear(x_TD: Tensor, weight_F2D: Tensor, tiling: Tiling) -> Tensor:
    """The same, cut into programs as `tiling` says."""
    assert x_TD.stride(1) == 1 and weight_F2D.is_contiguous(), "rows must be contiguous"
    num_tokens, num_rows = len(x_TD), len(weight_F2D) // 2
    out_TF = torch.empty((num_tokens, num_rows), dtype=x_TD.dtype, device=x_TD.device)
    grid = (triton.cdiv(num_rows, tiling.rows),)
    options = {
        "F": num_rows,
        "D": weight_F2D.shape[1],
        "ROWS": tiling.rows,
        "DEPTH": tiling.depth,
        "STAGES": tiling.stages,
        "num_warps": tiling.warps,
        **early_start(x_TD),
    }
    if num_tokens == 1:
        _one_token_kernel[grid](x_TD, weight_F2D, out_TF, **options)
    else:
        tokens = token_tile(num_tokens)
        _gated_linear_kernel[grid](
            x_TD,
            weight_F2D,
            out_TF,
            x_TD.stride(0),
            num_tokens,
            TOKENS=tokens,
            AHEAD=AHEAD,
            **options,
        )
    return out_TF
