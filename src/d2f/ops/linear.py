"""Products with the weights of a layer, and those whose result must not be rounded to their dtype.

Shapes: T packed tokens, M rows of the input, D inputs, E outputs, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Since torch 2.8; before, the weights are converted at each call.
_WIDENS = "dtype" in torch.ops.aten.mm.overloads()
PART_BYTES = 2**20
"""Widened weights that a core of the CPU takes at a time: what its cache holds beside the rest."""
WHOLE_ROWS = 64
"""Parts are multiples of this: the library may add up what is left of fewer in another order."""
MOST_TURNED = 192
"""Most rows of a product in bf16 that a CPU computes with the weights on the left."""


def linear(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` in the dtype of the inputs: (T, E). Without gradients.

    Example:
        >>> linear(torch.ones(1, 2), torch.ones(3, 2), torch.ones(3))
        tensor([[3., 3., 3.]])
    """
    if bias_E is not None:
        return F.linear(x_TD, weight_ED, bias_E)
    return product(x_TD, weight_ED).contiguous()


def product(x_MD: Tensor, weight_ED: Tensor) -> Tensor:
    """`x @ weight.T` in the dtype of the inputs, laid out in memory as it came: (M, E).

    For few rows of bf16 on a CPU torch has faster ways to it than `F.linear`: a product with a
    vector for one row, and for several the weights on the left. In all of them the sums are fp32
    and rounded once.

    Example:
        >>> product(torch.ones(1, 2).bfloat16(), torch.ones(3, 2).bfloat16())
        tensor([[2., 2., 2.]], dtype=torch.bfloat16)
    """
    if not x_MD.is_cpu or x_MD.dtype != torch.bfloat16 or not 0 < len(x_MD) <= MOST_TURNED:
        return F.linear(x_MD, weight_ED)
    if len(x_MD) == 1:
        return torch.mv(weight_ED, x_MD[0])[None]
    return torch.mm(weight_ED, x_MD.T).T


def linear_fp32(x_MD: Tensor, weight_VD: Tensor) -> Tensor:
    """`x @ weight.T` as fp32, with fp32 accumulation and no rounding of the result between.

    Under autocast, and where gradients flow, the product runs in the training dtype instead.

    Example:
        >>> linear_fp32(torch.ones(1, 2, dtype=torch.bfloat16),
        ...             torch.ones(3, 2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    trained = torch.is_grad_enabled() and (x_MD.requires_grad or weight_VD.requires_grad)
    if weight_VD.dtype == torch.float32 or trained:
        return F.linear(x_MD, weight_VD).float()
    flat_MD = x_MD.reshape(-1, x_MD.shape[-1])
    if x_MD.is_cuda and _WIDENS:
        logits_MV = torch.mm(flat_MD, weight_VD.T, out_dtype=torch.float32)
    elif x_MD.is_cpu:
        logits_MV = _in_parts(flat_MD.float(), weight_VD)
    else:
        logits_MV = F.linear(flat_MD.float(), weight_VD.float())
    return logits_MV.unflatten(0, x_MD.shape[:-1])


def _in_parts(x_MD: Tensor, weight_VD: Tensor) -> Tensor:
    """`x @ weight.T` in fp32, widening only as many weights at a time as a CPU's cache holds.

    Written to memory and read again, the widened weights would take five times as long as the
    product.
    """
    vocab_size, width = weight_VD.shape
    fitting = PART_BYTES * torch.get_num_threads() // (width * torch.float32.itemsize)
    part = max(fitting - fitting % WHOLE_ROWS, WHOLE_ROWS)
    logits_MV = x_MD.new_empty(len(x_MD), vocab_size)
    wide_PD = x_MD.new_empty(min(part, vocab_size), width)
    for at in range(0, vocab_size, part):
        some_PD = weight_VD[at : at + part]
        wide_PD = wide_PD[: len(some_PD)].copy_(some_PD)
        torch.mm(x_MD, wide_PD.T, out=logits_MV[:, at : at + part])
    return logits_MV


def matmul_wide(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """`a @ b` as fp32 at least, not rounded to a narrower dtype between where the device can.

    Neither autocast nor gradients: for those who write their own backward pass.

    Example:
        >>> matmul_wide(torch.ones(1, 2, dtype=torch.bfloat16),
        ...             torch.ones(2, 3, dtype=torch.bfloat16))
        tensor([[2., 2., 2.]])
    """
    if a_MK.dtype.itemsize >= torch.float32.itemsize:
        return a_MK @ b_KN
    if a_MK.is_cuda and _WIDENS:
        return torch.mm(a_MK, b_KN, out_dtype=torch.float32)
    return (a_MK @ b_KN).float()
