"""The gate of the feed-forward network.

Shapes: T tokens, D inputs, F intermediate size, F2 = 2 * F.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from d2f.ops.linear import product


def swiglu(gate_up_TF2: Tensor) -> Tensor:
    """`silu(gate) * up` of the packed projection, the gate's F numbers first: (T, F).

    Example:
        >>> import torch
        >>> swiglu(torch.tensor([[0.0, 100.0, 5.0, 2.0]]))
        tensor([[  0., 200.]])
    """
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)


def gated_linear(x_TD: Tensor, weight_F2D: Tensor) -> Tensor:
    """The projection and its gate: the gate's F rows of the weight stand first. Gives (T, F).

    Example:
        >>> import torch
        >>> gated_linear(torch.tensor([[1.0]]), torch.tensor([[100.0], [2.0]]))
        tensor([[200.]])
    """
    return swiglu(product(x_TD, weight_F2D))
