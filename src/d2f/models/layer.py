"""The one layer of all models: pre-norm attention, then SwiGLU.

Shapes: T tokens (whole sequences have B and L instead), D hidden size.

Training, decoding over pages and partial refresh run the same program. They differ in the attention
(`d2f.models.attend`), which the program is given, and in its parts: modules that compute whole
sequences with gradients, or what these give for decoding steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from d2f.models.linear import QKV, GateUp, Linear, StepGateUp, StepQKV
from d2f.models.spec import ModelSpec
from d2f.ops.backend import Backend
from d2f.ops.norm import add_rms_norm


class Attention(Protocol):
    """The rule by which a forward's tokens see each other, and the backend of its operations."""

    @property
    def backend(self) -> Backend | None:
        """The operations of a decoding step; None: plain torch with gradients."""

    def __call__(self, layer: Any, h_TD: Tensor) -> Tensor:
        """Gather with a layer's heads from the tokens' normalised inputs: (T, N * H)."""


def add_norm(
    norm: nn.RMSNorm, x_TD: Tensor, residual_TD: Tensor | None, backend: Backend | None
) -> tuple[Tensor, Tensor]:
    """Add x to the stream; the normalised sum and the sum, (T, D) each (None: x is the sum)."""
    operation = add_rms_norm if backend is None else backend.add_rms_norm
    return operation(x_TD, residual_TD, norm.weight, norm.eps)  # type: ignore[arg-type]


class LayerProgram:
    """The algebra of a layer, on parts that are modules or were made for steps."""

    attention_norm: Any
    qkv: Any
    o_proj: Any
    mlp_norm: Any
    gate_up: Any
    down_proj: Any

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
        h_TD, x_TD = add_norm(self.attention_norm, x_TD, residual_TD, attend.backend)
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
        h_TD, x_TD = add_norm(self.mlp_norm, attention_TD, x_TD, backend)
        return attention_TD, self.down_proj(self.gate_up(h_TD, backend), backend), x_TD


class Layer(LayerProgram, nn.Module):
    """One pre-norm block, with the weights of its parts.

    Args:
        spec: The model's sizes.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        query = spec.num_heads * spec.head_dim
        self.attention_norm = nn.RMSNorm(spec.hidden_size, spec.norm_eps)
        self.qkv = QKV(spec)
        self.o_proj = Linear(query, spec.hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(spec.hidden_size, spec.norm_eps)
        self.gate_up = GateUp(spec)
        self.down_proj = Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x_BLD: Tensor, attend: Attention, *, compiled: bool = False) -> Tensor:
        """The layer's output for whole sequences, residuals included: (B, L, D)."""
        # Around this stand the hooks of engines that gather a layer's weights; a graph has none.
        outermost = compiled and not torch.compiler.is_compiling()
        return (_compiled_whole() if outermost else Layer.whole)(self, x_BLD, attend)

    def whole(self, x_BLD: Tensor, attend: Attention) -> Tensor:
        """Do the same without compiling."""
        out_BLD, residual_BLD = self.compute(x_BLD, None, attend)
        return residual_BLD + out_BLD


class StepLayer(LayerProgram):
    """A layer in a decoding step; it shares the layer's weights.

    Args:
        layer: Whose parts to make ready.
        index: Its number, by which caches know it.
    """

    def __init__(self, layer: Layer, index: int) -> None:
        self.index = index
        self.attention_norm = layer.attention_norm
        self.qkv = StepQKV(layer.qkv)
        self.o_proj = layer.o_proj.for_steps()
        self.mlp_norm = layer.mlp_norm
        self.gate_up = StepGateUp(layer.gate_up)
        self.down_proj = layer.down_proj.for_steps()


@functools.cache
def _compiled_whole() -> Callable[..., Tensor]:
    # One function for all layers: those with the same shapes share what was compiled.
    return torch.compile(Layer.whole, dynamic=False)
