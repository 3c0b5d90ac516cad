"""Products whose result must not be rounded to the model's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Since torch 2.8; before, the weights are converted at each call.
_WIDENS = "dtype" in torch.ops.aten.mm.overloads()


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
    if x_MD.is_cuda and _WIDENS:
        flat_MD = x_MD.reshape(-1, x_MD.shape[-1])
        logits_MV = torch.mm(flat_MD, weight_VD.T, out_dtype=torch.float32)
        return logits_MV.unflatten(0, x_MD.shape[:-1])
    return F.linear(x_MD.float(), weight_VD.float())


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
