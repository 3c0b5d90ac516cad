"""Products of few tokens with a weight matrix, bound by the time to read the weights once.

Shapes: T tokens, D inputs, E outputs; of the head, M tokens, V outputs.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from d2f.ops import linear as plain
from d2f.ops.triton.launch import begin, early_start, gdc_launch_dependents, gdc_wait

MOST_TOKENS = 64
"""Beyond these the product is no longer bound by reading, and the library's is as fast."""
DEPTH = 128
"""Inputs of a step where a tile holds several tokens."""
AHEAD = 512
"""Inputs whose weights a program asks for before it waits for the kernel before it."""


class Tiling(NamedTuple):
    """The sizes by which a product is cut into programs."""

    rows: int
    """Outputs of a program."""
    depth: int
    """Inputs of a step."""
    stages: int
    """Steps that are in flight."""
    warps: int


@triton.jit
def prefetch(weight_ptr, row, E, D: tl.constexpr, WIDTH: tl.constexpr):
    """Bring the first weights of a program into the L2 cache, a request per 128 bytes."""
    line: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
    column = tl.minimum(tl.arange(0, WIDTH // line) * line, D - 1)
    place = weight_ptr + tl.minimum(row, E - 1).to(tl.int64)[:, None] * D + column[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [place.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def multiply(
    weight_ptrs, x_ptrs, is_token, D: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr
):
    """A tile of weights, given by its first DEPTH inputs, times the tokens, in fp32."""
    depth = tl.arange(0, DEPTH)
    acc = tl.zeros((weight_ptrs.shape[0], x_ptrs.shape[1]), tl.float32)
    for start in tl.range(0, D, DEPTH, num_stages=STAGES):
        if D % DEPTH == 0:
            weight = tl.load(weight_ptrs + start, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, is_token, other=0.0)
        else:
            inside = start + depth < D
            weight = tl.load(weight_ptrs + start, inside[None, :], other=0.0)
            x = tl.load(x_ptrs + start, is_token & inside[:, None], other=0.0)
        acc = tl.dot(weight, x, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["T"])
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, x_stride, T, E,
    D: tl.constexpr, BIASED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    depth = tl.arange(0, DEPTH)
    if EARLY:
        gdc_launch_dependents()
        # Nobody writes the weights, so they may be on their way before the input is there.
        prefetch(weight_ptr, row, E, D, AHEAD)
        gdc_wait()
    # Rows after the last are the last again; they are not stored.
    weight_ptrs = weight_ptr + tl.minimum(row, E - 1).to(tl.int64)[:, None] * D + depth[None, :]
    x_ptrs = x_ptr + token.to(tl.int64)[None, :] * x_stride + depth[:, None]
    is_token = token[None, :] < T
    acc = multiply(weight_ptrs, x_ptrs, is_token, D, DEPTH, STAGES)
    if BIASED:
        acc += tl.load(bias_ptr + row, row < E, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + token.to(tl.int64)[None, :] * E + row[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), is_token & (row < E)[:, None])


@triton.jit
def _one_token_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, E,
    D: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The same of one token, without tensor cores, which would multiply 15 more for nothing."""
    begin(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    weight_ptrs = weight_ptr + tl.minimum(row, E - 1).to(tl.int64)[:, None] * D + depth[None, :]
    acc = tl.zeros((ROWS, DEPTH), tl.float32)
    for start in tl.range(0, D, DEPTH, num_stages=STAGES):
        if D % DEPTH == 0:
            weight = tl.load(weight_ptrs + start, eviction_policy="evict_first")
            x = tl.load(x_ptr + start + depth)
        else:
            inside = start + depth < D
            weight = tl.load(weight_ptrs + start, inside[None, :], other=0.0)
            x = tl.load(x_ptr + start + depth, inside, other=0.0)
        acc += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    total = tl.sum(acc, axis=1)
    if BIASED:
        total += tl.load(bias_ptr + row, row < E, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, total.to(out_ptr.dtype.element_ty), row < E)


def linear(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of a flat batch; fast where T is small.

    The numbers of a row must be adjacent; weights must be contiguous.
    """
    tiling = choose_tiling(x_TD, weight_ED)
    if tiling is None:
        return F.linear(x_TD, weight_ED, bias_E)
    return tiled_linear(x_TD, weight_ED, bias_E, x_TD.dtype, tiling)


def linear_fp32(x_MD: Tensor, weight_VD: Tensor) -> Tensor:
    """Do as `d2f.ops.linear.linear_fp32`, for a flat batch and without gradients."""
    tiling = choose_tiling(x_MD, weight_VD)
    if tiling is None:
        return plain.linear_fp32(x_MD, weight_VD)
    return tiled_linear(x_MD, weight_VD, None, torch.float32, tiling)


def choose_tiling(x_TD: Tensor, weight_ED: Tensor) -> Tiling | None:
    """Choose how to cut this product; None leaves it to the library.

    The rule follows measurements on an H100 with the layers of an 8B model.
    """
    num_tokens, (num_rows, width) = len(x_TD), weight_ED.shape
    if x_TD.dtype not in (torch.bfloat16, torch.float16) or width % 8 or num_tokens > MOST_TOKENS:
        return None
    if num_tokens == 1:
        depth = math.gcd(width, 2048)
        if depth < 256:
            depth = min(triton.next_power_of_2(width), 512)
        rows = 4 if depth == 2048 else 8
        return Tiling(rows=rows, depth=depth, stages=1, warps=8 if depth > 512 else 4)
    rows = 64 if num_rows >= 4096 else 32 if num_rows >= 2048 else 16
    tokens = token_tile(num_tokens)
    # Of each step, the weights and the input lie in shared memory, where the rest needs room too.
    room = (_shared_memory(x_TD.device) - 2**14) // (DEPTH * x_TD.element_size())
    while room // (rows + tokens) < 2:
        rows //= 2
    return Tiling(rows=rows, depth=DEPTH, stages=min(room // (rows + tokens), 8), warps=4)


def token_tile(num_tokens: int) -> int:
    """Tokens of a program's tile: no dot is narrower than 16."""
    return max(triton.next_power_of_2(num_tokens), 16)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may use; where kernels are interpreted, as on a Hopper GPU."""
    if device.type != "cuda":
        return 227 * 1024
    utils = triton.runtime.driver.active.utils
    return utils.get_device_properties(device.index)["max_shared_mem"]


def tiled_linear(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, dtype: torch.dtype, tiling: Tiling
) -> Tensor:
    """The product in `dtype`, cut into programs as `tiling` says."""
    assert x_TD.stride(1) == 1 and weight_ED.is_contiguous(), "rows must be contiguous"
    (num_tokens, width), num_rows = x_TD.shape, len(weight_ED)
    out_TE = torch.empty((num_tokens, num_rows), dtype=dtype, device=x_TD.device)
    grid = (triton.cdiv(num_rows, tiling.rows),)
    options = {
        "D": width,
        "BIASED": bias_E is not None,
        "ROWS": tiling.rows,
        "DEPTH": tiling.depth,
        "STAGES": tiling.stages,
        "num_warps": tiling.warps,
    }
    if num_tokens == 1:
        _one_token_kernel[grid](
            x_TD, weight_ED, bias_E, out_TE, num_rows, **options, **early_start(x_TD)
        )
        return out_TE
    _linear_kernel[grid](
        x_TD, weight_ED, bias_E, out_TE, x_TD.stride(0), num_tokens, num_rows,
        TOKENS=token_tile(num_tokens), AHEAD=AHEAD, **options, **early_start(x_TD),
    )  # fmt: skip
    return out_TE
