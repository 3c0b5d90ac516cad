"""The gate of the feed-forward network.

Shapes: T tokens, F intermediate size, F2 = 2 * F.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up_TF2: Tensor) -> Tensor:
    """`silu(gate) * up` of the packed projection, the gate's F numbers first: (T, F).

    Example:
        >>> import torch
        >>> swiglu(torch.tensor([[0.0, 100.0, 5.0, 2.0]]))
        tensor([[  0., 200.]])
    """
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)
