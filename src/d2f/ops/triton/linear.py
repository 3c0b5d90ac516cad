"""Products of few tokens with a weight matrix, bound by the time to read the weights once.

Shapes: T tokens, D inputs, E outputs; of the head, M tokens, V outputs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from d2f.ops import linear as plain
from d2f.ops.triton.launch import early_start, gdc_launch_dependents, gdc_wait

MOST_TOKENS = 128
"""Beyond these the product is no longer bound by reading, and the library's is as fast."""


class Tiling(NamedTuple):
    """How a product is cut into programs."""

    rows: int
    """Outputs of a program."""
    depth: int
    """Inputs of a step."""
    stages: int
    """Steps that are in flight."""
    warps: int
    splits: int
    """Programs that share the inputs of the same outputs."""


@triton.jit
def _prefetch(weight_ptr, row, first, E, D, WIDTH: tl.constexpr):
    """Bring the first weights of a program into the L2 cache, a request per 128 bytes."""
    line: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
    column = tl.minimum(first + tl.arange(0, WIDTH // line) * line, D - 1)
    place = weight_ptr + tl.minimum(row, E - 1).to(tl.int64)[:, None] * D + column[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [place.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["T"])
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrived_ptr,
    x_stride,
    T,
    E,
    D,
    STEPS: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    BIASED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    depth = tl.arange(0, DEPTH)
    first = split * STEPS * DEPTH
    if EARLY:
        gdc_launch_dependents()
        # Nobody writes the weights, so they may be on their way before the input is there.
        _prefetch(weight_ptr, row, first, E, D, AHEAD)
        gdc_wait()
    # Rows after the last are the last again; they are not stored.
    weight_ptrs = weight_ptr + tl.minimum(row, E - 1).to(tl.int64)[:, None] * D + depth[None, :]
    x_ptrs = x_ptr + token.to(tl.int64)[None, :] * x_stride + depth[:, None]
    is_token = token[None, :] < T
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        start = first + step * DEPTH
        if EVEN:
            weight = tl.load(weight_ptrs + start, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, is_token, other=0.0)
        else:
            inside = start + depth < D
            weight = tl.load(weight_ptrs + start, inside[None, :], other=0.0)
            x = tl.load(x_ptrs + start, is_token & inside[:, None], other=0.0)
        acc = tl.dot(weight, x, acc, input_precision="ieee")

    last = True
    if SPLITS > 1:
        acc, last = _join(acc, is_token, parts_ptr, arrived_ptr, tile, split, SPLITS)
    if last:
        if BIASED:
            acc += tl.load(bias_ptr + row, row < E, other=0.0).to(tl.float32)[:, None]
        out_ptrs = out_ptr + token.to(tl.int64)[None, :] * E + row[:, None]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), is_token & (row < E)[:, None])


@triton.jit
def _join(acc, is_token, parts_ptr, arrived_ptr, tile, split, SPLITS: tl.constexpr):
    """The sum of all splits of a tile, for the program that comes last; and whether it is that."""
    ROWS: tl.constexpr = acc.shape[0]
    TOKENS: tl.constexpr = acc.shape[1]
    place = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    tile_ptrs = parts_ptr + tile.to(tl.int64) * (SPLITS * ROWS * TOKENS) + place
    tl.store(tile_ptrs + split * (ROWS * TOKENS), acc, is_token, cache_modifier=".cg")
    # All threads have stored before one of them says so.
    tl.debug_barrier()
    last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        # Always in the same order, whoever comes last.
        acc = tl.zeros((ROWS, TOKENS), tl.float32)
        for part in tl.static_range(SPLITS):
            part_ptrs = tile_ptrs + part * (ROWS * TOKENS)
            acc += tl.load(part_ptrs, is_token, other=0.0, cache_modifier=".cg")
        tl.store(arrived_ptr + tile, 0)
    return acc, last


def linear(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of a flat batch; fast where T is small.

    The numbers of a row must be adjacent; weights must be contiguous.
    """
    tiling = choose_tiling(x_TD, weight_ED)
    if tiling is None:
        return F.linear(x_TD, weight_ED, bias_E)
    return tiled_linear(x_TD, weight_ED, bias_E, x_TD.dtype, tiling)


def linear_fp32(x_MD: Tensor, weight_VD: Tensor) -> Tensor:
    """As `d2f.ops.linear.linear_fp32`, of a flat batch and without gradients."""
    tiling = choose_tiling(x_MD, weight_VD)
    if tiling is None:
        return plain.linear_fp32(x_MD, weight_VD)
    return tiled_linear(x_MD, weight_VD, None, torch.float32, tiling)


def choose_tiling(x_TD: Tensor, weight_ED: Tensor) -> Tiling | None:
    """How to cut this product; None: leave it to the library.

    The rule follows measurements on an H100: programs whose number is just below a multiple of its
    132 multiprocessors, with 50 to 100 KB of weights on their way to each.
    """
    num_tokens, (num_rows, width) = len(x_TD), weight_ED.shape
    if x_TD.dtype not in (torch.bfloat16, torch.float16) or num_tokens > MOST_TOKENS or width % 8:
        return None
    if num_tokens <= 16:
        return Tiling(rows=32, depth=256, stages=4, warps=4, splits=1)
    if num_tokens <= 64:
        return Tiling(64, 128, 4, 4, _even_splits(triton.cdiv(num_rows, 64), width // 128))
    return Tiling(128, 64, 5, 4, _even_splits(triton.cdiv(num_rows, 128), width // 64))


def _even_splits(num_tiles: int, num_steps: int) -> int:
    """The fewest splits that keep nine tenths of the multiprocessors busy to the end."""
    processors = 132
    for splits in range(1, 9):
        programs = num_tiles * splits
        rounds = triton.cdiv(programs, processors)
        if num_steps % splits == 0 and programs >= 0.9 * rounds * processors:
            return splits
    return 1


def tiled_linear(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, dtype: torch.dtype, tiling: Tiling
) -> Tensor:
    """The product in `dtype`, cut into programs as `tiling` says."""
    assert x_TD.stride(1) == 1 and weight_ED.is_contiguous(), "rows must be contiguous"
    (num_tokens, width), num_rows = x_TD.shape, len(weight_ED)
    tokens = max(triton.next_power_of_2(num_tokens), 16)
    tiles = triton.cdiv(num_rows, tiling.rows)
    steps = triton.cdiv(triton.cdiv(width, tiling.depth), tiling.splits)
    out_TE = torch.empty((num_tokens, num_rows), dtype=dtype, device=x_TD.device)
    parts, arrived = out_TE, out_TE
    if tiling.splits > 1:
        size = (tiles, tiling.splits, tiling.rows, tokens)
        parts = torch.empty(size, dtype=torch.float32, device=x_TD.device)
        arrived = _arrived(x_TD.device, max(triton.next_power_of_2(tiles), 1024))
    early = early_start(x_TD)
    _linear_kernel[(tiles, tiling.splits)](
        x_TD,
        weight_ED,
        bias_E,
        out_TE,
        parts,
        arrived,
        x_TD.stride(0),
        num_tokens,
        num_rows,
        width,
        STEPS=steps,
        SPLITS=tiling.splits,
        EVEN=width % tiling.depth == 0 and steps * tiling.splits * tiling.depth == width,
        BIASED=bias_E is not None,
        TOKENS=tokens,
        ROWS=tiling.rows,
        DEPTH=tiling.depth,
        STAGES=tiling.stages,
        AHEAD=512,
        num_warps=tiling.warps,
        **early,
    )
    return out_TE


@functools.cache
def _arrived(device: torch.device, count: int) -> Tensor:
    """How many programs of each tile are done: all zero between two kernels.

    Kernels of one stream follow each other, so they share it.
    """
    return torch.zeros(count, dtype=torch.int32, device=device)
