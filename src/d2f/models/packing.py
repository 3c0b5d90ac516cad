"""Projections that read the same input, laid out as one matrix.

A decoding step is bound by reading weights; three small products take longer than one large one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedProjection:
    """Weight (E, D) and bias (E,) of several projections, one after the other."""

    weight_ED: Tensor
    bias_E: Tensor | None


def pack_projections(projections: Sequence[nn.Module]) -> PackedProjection | None:
    """Lay the weights of several linear layers out as one matrix, of which theirs become views.

    So no weight is kept twice, and the layers go on working by themselves. None where they cannot
    be packed: an adapter stands beside one of them, or their types differ.

    Example:
        >>> one, other = nn.Linear(4, 2), nn.Linear(4, 3)
        >>> packed = pack_projections([one, other])
        >>> packed.weight_ED.shape, one.weight.data_ptr() == packed.weight_ED.data_ptr()
        (torch.Size([5, 4]), True)
    """
    layers = [layer for layer in projections if type(layer) is nn.Linear]
    if len(layers) < len(projections) or len({layer.weight.dtype for layer in layers}) > 1:
        return None
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if biases and len(biases) < len(layers):
        return None
    weight_ED = _joined([layer.weight for layer in layers])
    return PackedProjection(weight_ED=weight_ED, bias_E=_joined(biases) if biases else None)


@torch.no_grad()
def _joined(parameters: Sequence[Tensor]) -> Tensor:
    first = parameters[0]
    total = sum(len(p) for p in parameters)
    shape, at = (total, *first.shape[1:]), first.data_ptr()
    for parameter in parameters:
        if not parameter.is_contiguous() or parameter.data_ptr() != at:
            break
        at += parameter.numel() * parameter.element_size()
    else:
        # Packed before, by another engine on the same model.
        if first.untyped_storage().data_ptr() == parameters[-1].untyped_storage().data_ptr():
            return first.detach().as_strided(shape, first.stride())
    joined = torch.cat([parameter.detach() for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = joined[start : start + len(parameter)]
        start += len(parameter)
    return joined
