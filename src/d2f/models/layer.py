"""The one layer of all models: pre-norm attention, then SwiGLU.

Shapes: T tokens (whole sequences have B and L instead), D hidden size.

Training, decoding over pages and partial refresh run the same algebra. They differ in the attention
(`d2f.models.attend`), which a layer is given, and in what its linear parts do with a backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from d2f.models.linear import QKV, GateUp, Linear
from d2f.models.spec import ModelSpec
from d2f.ops.backend import Backend
from d2f.ops.norm import add_rms_norm


class Attention(Protocol):
    """How the tokens of a forward see each other, and what its operations run on."""

    @property
    def backend(self) -> Backend | None:
        """The operations of a decoding step; None: plain torch with gradients."""

    def __call__(self, layer: Layer, h_TD: Tensor) -> Tensor:
        """What the tokens gather with a layer's heads from normalised inputs: (T, N * H)."""


class RMSNorm(nn.RMSNorm):
    """RMSNorm that adds to the residual stream first."""

    def add(
        self, x_TD: Tensor, residual_TD: Tensor | None, backend: Backend | None
    ) -> tuple[Tensor, Tensor]:
        """The normalised sum and the sum, (T, D) each; `residual_TD` None: x is the sum."""
        operation = add_rms_norm if backend is None else backend.add_rms_norm
        assert self.eps is not None
        return operation(x_TD, residual_TD, self.weight, self.eps)


class Layer(nn.Module):
    """One pre-norm block.

    Args:
        spec: The model's sizes.
        index: Number of the layer, by which caches know it.
    """

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        self.index = index
        self.attention_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.qkv = QKV(spec)
        self.o_proj: nn.Module = Linear(
            spec.num_heads * spec.head_dim, spec.hidden_size, bias=False
        )
        self.mlp_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.gate_up = GateUp(spec)
        self.down_proj: nn.Module = Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def compute(
        self, x_TD: Tensor, residual_TD: Tensor | None, attend: Attention
    ) -> tuple[Tensor, Tensor]:
        """Run the layer on a residual stream whose last addend is still apart.

        Args:
            x_TD: What the layer before put out, or the embeddings.
            residual_TD: The stream without it; None where x is all of it.
            attend: The attention.

        Returns:
            What this layer puts out last, and the stream without it: (T, D) each.
        """
        h_TD, x_TD = self.attention_norm.add(x_TD, residual_TD, attend.backend)
        _, out_TD, residual_TD = self.inner(h_TD, x_TD, attend)
        return out_TD, residual_TD

    def inner(self, h_TD: Tensor, x_TD: Tensor, attend: Attention) -> tuple[Tensor, Tensor, Tensor]:
        """Run attention and feed-forward network on the stream x and its normalised form h.

        Returns:
            The output of the attention, the output of the feed-forward network, and the stream
            between the two, which holds the first and lacks the second: (T, D) each.
        """
        backend = attend.backend
        attention_TD = self.o_proj(attend(self, h_TD), backend)
        h_TD, x_TD = self.mlp_norm.add(attention_TD, x_TD, backend)
        return attention_TD, self.down_proj(self.gate_up(h_TD, backend), backend), x_TD

    def forward(self, x_BLD: Tensor, attend: Attention, *, compiled: bool = False) -> Tensor:
        """The layer's output for whole sequences, residuals included: (B, L, D)."""
        # Around this stand the hooks of engines that gather a layer's weights; a graph has none.
        outermost = compiled and not torch.compiler.is_compiling()
        return (_compiled_whole() if outermost else Layer.whole)(self, x_BLD, attend)

    def whole(self, x_BLD: Tensor, attend: Attention) -> Tensor:
        """The same without compiling."""
        out_BLD, residual_BLD = self.compute(x_BLD, None, attend)
        return residual_BLD + out_BLD

    def join(self) -> None:
        """Lay out the projections that read the same input as one matrix, where that can be."""
        self.qkv.join()
        self.gate_up.join()


@functools.cache
def _compiled_whole() -> Callable[..., Tensor]:
    # One function for all layers: those with the same shapes share what was compiled.
    return torch.compile(Layer.whole, dynamic=False)
