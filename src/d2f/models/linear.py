"""The linear parts of a model: each owns its weights, their layout and the kernel that reads them.

Shapes: T tokens (whole sequences have B and L instead), D inputs, E outputs, F intermediate size,
M selected positions, V vocabulary, H head size.

Every part is called with the input and a backend. Without a backend it computes whole sequences in
plain torch, with gradients. With one it computes the tokens of a decoding step, which is bound by
reading weights: projections of the same input are then one product, since three small products take
longer than one large one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2f.models.spec import ModelSpec
from d2f.ops.backend import Backend
from d2f.ops.linear import linear_fp32


class Linear(nn.Linear):
    """A projection, `x @ weight.T + bias`.

    Example:
        >>> Linear(4, 6)(torch.ones(2, 4)).shape
        torch.Size([2, 6])
    """

    def forward(self, x_TD: Tensor, backend: Backend | None = None) -> Tensor:
        """The product: (T, E)."""
        if backend is None:
            return F.linear(x_TD, self.weight, self.bias)
        return backend.linear(x_TD, self.weight, self.bias)


@dataclass(frozen=True, kw_only=True, eq=False)
class JoinedLinear:
    """Several projections of one input as one matrix."""

    weight_ED: Tensor
    bias_E: Tensor | None

    def product(self, x_TD: Tensor, backend: Backend) -> Tensor:
        """The outputs of all projections side by side: (T, E)."""
        return backend.linear(x_TD, self.weight_ED, self.bias_E)

    def gated(self, x_TD: Tensor, backend: Backend) -> Tensor:
        """`silu(gate) * up`, where the two projections are a gate and what it scales: (T, F)."""
        return backend.gated_linear(x_TD, self.weight_ED)


def join(projections: Sequence[nn.Module]) -> JoinedLinear | None:
    """Lay the weights of several projections out as one matrix, of which theirs become views.

    So no weight is kept twice, and each projection goes on working by itself.

    Returns:
        The joined projections; None where they cannot be joined: an adapter stands beside one of
        them, or their types differ, or some have a bias and others have none.

    Example:
        >>> one, other = Linear(4, 2), Linear(4, 3)
        >>> joined = join([one, other])
        >>> joined.weight_ED.shape, one.weight.data_ptr() == joined.weight_ED.data_ptr()
        (torch.Size([5, 4]), True)
    """
    parts = [part for part in projections if isinstance(part, Linear)]
    if len(parts) < len(projections) or len({part.weight.dtype for part in parts}) > 1:
        return None
    biases = [part.bias for part in parts if part.bias is not None]
    if biases and len(biases) < len(parts):
        return None
    weight_ED = _joined([part.weight for part in parts])
    return JoinedLinear(weight_ED=weight_ED, bias_E=_joined(biases) if biases else None)


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
        # Joined before, by another engine on the same model.
        if first.untyped_storage().data_ptr() == parameters[-1].untyped_storage().data_ptr():
            return first.detach().as_strided(shape, first.stride())
    joined = torch.cat([parameter.detach() for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = joined[start : start + len(parameter)]
        start += len(parameter)
    return joined


class QKV(nn.Module):
    """The projections to queries, keys and values."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width = spec.hidden_size
        self.num_heads, self.head_dim = spec.num_heads, spec.head_dim
        query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj: nn.Module = Linear(width, query, bias=spec.qkv_bias)
        self.k_proj: nn.Module = Linear(width, kv, bias=spec.qkv_bias)
        self.v_proj: nn.Module = Linear(width, kv, bias=spec.qkv_bias)
        self.joined: JoinedLinear | None = None

    def join(self) -> None:
        """Lay the weights out for decoding steps."""
        self.joined = join([self.q_proj, self.k_proj, self.v_proj])

    def heads(self, h_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of whole sequences, not rotated: (B, L, heads, H) each."""
        q, k, v = (
            projection(h_BLD).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v

    def forward(self, h_TD: Tensor, backend: Backend, v_TE: Tensor | None = None) -> Tensor:
        """Queries, keys and values of a step's tokens side by side, not rotated: (T, E).

        `v_TE` are the values where they are known already.
        """
        if v_TE is None and self.joined is not None:
            return self.joined.product(h_TD, backend)
        q_TE, k_TE = self.q_proj(h_TD, backend), self.k_proj(h_TD, backend)
        v_TE = self.v_proj(h_TD, backend) if v_TE is None else v_TE
        return torch.cat([q_TE, k_TE, v_TE], dim=-1)


class GateUp(nn.Module):
    """The first half of the feed-forward network, `silu(gate) * up`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        sizes = spec.hidden_size, spec.intermediate_size
        self.gate_proj: nn.Module = Linear(*sizes, bias=False)
        self.up_proj: nn.Module = Linear(*sizes, bias=False)
        self.joined: JoinedLinear | None = None

    def join(self) -> None:
        """Lay the weights out for decoding steps."""
        self.joined = join([self.gate_proj, self.up_proj])

    def forward(self, h_TD: Tensor, backend: Backend | None = None) -> Tensor:
        """What the down projection reads: (T, F)."""
        if backend is None:
            return F.silu(self.gate_proj(h_TD)) * self.up_proj(h_TD)
        if self.joined is not None:
            return self.joined.gated(h_TD, backend)
        parts = [self.gate_proj(h_TD, backend), self.up_proj(h_TD, backend)]
        return backend.swiglu(torch.cat(parts, dim=-1))


class Embedding(nn.Embedding):
    """The table of a vector per token, which is the head's weight too where the two are tied."""

    def score(self, aligned_MD: Tensor, backend: Backend | None = None) -> Tensor:
        """Logits in fp32: (M, V)."""
        return _score(aligned_MD, self.weight, backend)


class Head(nn.Linear):
    """The projection to a logit per token."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec.hidden_size, spec.vocab_size, bias=False)

    def score(self, aligned_MD: Tensor, backend: Backend | None = None) -> Tensor:
        """Logits in fp32: (M, V)."""
        return _score(aligned_MD, self.weight, backend)


def _score(aligned_MD: Tensor, weight_VD: Tensor, backend: Backend | None) -> Tensor:
    product = linear_fp32 if backend is None else backend.linear_fp32
    return product(aligned_MD, weight_VD)
