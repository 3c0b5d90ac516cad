"""The gate of the feed-forward network in one kernel.

Shapes: T tokens, F intermediate size, F2 = 2 * F.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2f.ops.triton.launch import begin, early_start

BLOCK = 1024


@triton.jit
def gated(gate, up):
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
    tl.store(out_ptr + token * F + column, gated(gate, up), inside)


def swiglu(gate_up_TF2: Tensor) -> Tensor:
    """As `d2f.ops.swiglu.swiglu`; rows may lie apart, the numbers of a row may not."""
    num_tokens, width = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    out_TF = torch.empty((num_tokens, width), dtype=gate_up_TF2.dtype, device=gate_up_TF2.device)
    _swiglu_kernel[(num_tokens, triton.cdiv(width, BLOCK))](
        gate_up_TF2, out_TF, gate_up_TF2.stride(0), width, BLOCK=BLOCK, **early_start(gate_up_TF2)
    )
    return out_TF
