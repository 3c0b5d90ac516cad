"""RMSNorm of a residual stream.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add a layer's output to the residual stream and normalise the sum for the next one.

    Args:
        x_TD: What the last part of the model put out.
        residual_TD: The stream so far; None at its start, where `x_TD` is the sum.
        weight_D: Scale of each dimension.
        eps: Added to the mean square.

    Returns:
        The normalised sum and the sum, both (T, D) and rounded to the dtype of x.

    Example:
        >>> import torch
        >>> normed, total = add_rms_norm(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2), 0.0)
        >>> normed, total
        (tensor([[1., 1.]]), tensor([[2., 2.]]))
    """
    sum_TD = x_TD if residual_TD is None else residual_TD + x_TD
    return F.rms_norm(sum_TD, weight_D.shape, weight_D, eps), sum_TD
