"""The linear parts of a model: each owns its weights, their layout and the kernel that reads them.

Shapes: T tokens (whole sequences have B and L instead), D inputs, E outputs, F intermediate size,
M selected positions, V vocabulary, H head size.

The modules hold the weights and compute whole sequences in plain torch, with gradients. What a
module gives `for_steps` computes the tokens of a decoding step with the operations of a backend. It
is a plain object, as the attributes of modules cost more than a small model's products; and since a
step is bound by reading weights, projections of the same input are one product there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2f.models.spec import ModelSpec
from d2f.ops.backend import Backend
from d2f.ops.linear import linear_fp32


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StepLinear:
    """A projection in a step, or several of one input with their outputs side by side."""

    weight_ED: Tensor
    bias_E: Tensor | None

    def __call__(self, x_TD: Tensor, backend: Backend) -> Tensor:
        """The product: (T, E)."""
        return backend.linear(x_TD, self.weight_ED, self.bias_E)

    def gated(self, x_TD: Tensor, backend: Backend) -> Tensor:
        """`silu(gate) * up`, where the two projections are a gate and what it scales: (T, F)."""
        return backend.gated_linear(x_TD, self.weight_ED)


class Linear(nn.Linear):
    """A projection, `x @ weight.T + bias`.

    Example:
        >>> Linear(4, 6)(torch.ones(2, 4)).shape
        torch.Size([2, 6])
    """

    def forward(self, x_TD: Tensor, backend: Backend | None = None) -> Tensor:
        """The product: (T, E). A backend is for `StepLinear` alone."""
        return F.linear(x_TD, self.weight, self.bias)

    def for_steps(self) -> StepLinear:
        """The projection of a step's tokens; it shares the weights."""
        return StepLinear(weight_ED=self.weight, bias_E=self.bias)


def join(projections: Sequence[nn.Module]) -> StepLinear | None:
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
    return StepLinear(weight_ED=weight_ED, bias_E=_joined(biases) if biases else None)


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
        self.num_heads, self.num_kv_heads = spec.num_heads, spec.num_kv_heads
        self.head_dim, self.eps = spec.head_dim, spec.norm_eps
        query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj: nn.Module = Linear(width, query, bias=spec.qkv_bias)
        self.k_proj: nn.Module = Linear(width, kv, bias=spec.qkv_bias)
        self.v_proj: nn.Module = Linear(width, kv, bias=spec.qkv_bias)
        self.q_norm = nn.RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = nn.RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None

    def heads(self, h_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of whole sequences, not rotated: (B, L, heads, H) each."""
        q, k, v = (
            projection(h_BLD).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            # Under autocast heads are narrower than weights, which no fused kernel takes.
            q, k = (
                F.rms_norm(x, (self.head_dim,), norm.weight.to(x.dtype), self.eps)
                for x, norm in ((q, self.q_norm), (k, self.k_norm))
            )
        return q, k, v


class StepQKV:
    """The projections to queries, keys and values in a step, joined where that can be."""

    def __init__(self, qkv: QKV) -> None:
        parts: list[Any] = [qkv.q_proj, qkv.k_proj, qkv.v_proj]
        self.num_heads = qkv.num_heads
        self._heads = qkv.num_heads, qkv.num_kv_heads, qkv.num_kv_heads
        self._head_dim = qkv.head_dim
        self._norms: list[tuple[Tensor, float]] | None = None
        if qkv.q_norm is not None and qkv.k_norm is not None:
            self._norms = [(norm.weight, qkv.eps) for norm in (qkv.q_norm, qkv.k_norm)]
        self._joined = join(parts)
        self._query, self._key, self.value = (part.for_steps() for part in parts)

    def __call__(self, h_TD: Tensor, backend: Backend, v_TE: Tensor | None = None) -> Tensor:
        """Queries, keys and values side by side, not rotated: (T, E).

        `v_TE` are the values where they are known already, from `value`.
        """
        if v_TE is None and self._joined is not None:
            qkv_TE = self._joined(h_TD, backend)
        else:
            q_TE, k_TE = self._query(h_TD, backend), self._key(h_TD, backend)
            v_TE = self.value(h_TD, backend) if v_TE is None else v_TE
            qkv_TE = torch.cat([q_TE, k_TE, v_TE], dim=-1)
        return qkv_TE if self._norms is None else self._normalised(qkv_TE, backend)

    def _normalised(self, qkv_TE: Tensor, backend: Backend) -> Tensor:
        """The same with the heads of queries and keys normalised."""
        assert self._norms is not None
        sizes = [count * self._head_dim for count in self._heads]
        q_TE, k_TE, v_TE = qkv_TE.split(sizes, dim=-1)
        parts = [
            backend.add_rms_norm(x_TE.reshape(-1, self._head_dim), None, *norm)[0].view_as(x_TE)
            for x_TE, norm in zip((q_TE, k_TE), self._norms, strict=True)
        ]
        return torch.cat([*parts, v_TE], dim=-1)


class GateUp(nn.Module):
    """The first half of the feed-forward network, `silu(gate) * up`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        sizes = spec.hidden_size, spec.intermediate_size
        self.gate_proj: nn.Module = Linear(*sizes, bias=False)
        self.up_proj: nn.Module = Linear(*sizes, bias=False)

    def forward(self, h_BLD: Tensor, backend: Backend | None = None) -> Tensor:
        """Compute the down projection's input: (B, L, F). A backend is for `StepGateUp` alone."""
        return F.silu(self.gate_proj(h_BLD)) * self.up_proj(h_BLD)


class StepGateUp:
    """The first half of the feed-forward network in a step, joined where that can be."""

    def __init__(self, gate_up: GateUp) -> None:
        parts: list[Any] = [gate_up.gate_proj, gate_up.up_proj]
        self._joined = join(parts)
        self._parts = [part.for_steps() for part in parts]

    def __call__(self, h_TD: Tensor, backend: Backend) -> Tensor:
        """Compute the down projection's input: (T, F)."""
        if self._joined is not None:
            return self._joined.gated(h_TD, backend)
        return backend.swiglu(torch.cat([part(h_TD, backend) for part in self._parts], dim=-1))


class _Table:
    weight: Tensor

    def score(self, aligned_MD: Tensor, backend: Backend | None = None) -> Tensor:
        """Logits in fp32: (M, V)."""
        product = linear_fp32 if backend is None else backend.linear_fp32
        return product(aligned_MD, self.weight)


class Embedding(_Table, nn.Embedding):
    """The table of a vector per token, which is the head's weight too where the two are tied."""


class Head(_Table, nn.Linear):
    """The projection to a logit per token."""
