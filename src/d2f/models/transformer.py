"""The one transformer core: pre-norm decoder with rotary attention and SwiGLU.

Shapes: B sequences, L tokens of each, T packed tokens of all, M selected positions, D hidden size,
E outputs of a packed projection, V vocabulary, H head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2f.diffusion.layout import PADDING_BLOCK, BlockLayout, causal_blocks, visible
from d2f.errors import ConfigError
from d2f.models.cache import PagedCache
from d2f.models.feature_cache import FeatureCache, LayerFeatures, Refresh
from d2f.models.packing import PackedProjection, pack_projections
from d2f.models.spec import ModelSpec
from d2f.ops.attention import AttentionMask, attention
from d2f.ops.backend import Backend
from d2f.ops.linear import linear_fp32
from d2f.ops.packed import PackedTokens
from d2f.ops.rope import apply_rope, rope_frequencies, rope_tables
from d2f.ops.tiled_attention import tiled_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Layer(nn.Module):
    """One pre-norm block: attention, then SwiGLU."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width, head_dim = spec.hidden_size, spec.head_dim
        query, kv = spec.num_heads * head_dim, spec.num_kv_heads * head_dim
        self.head_dim = head_dim
        self.attention_norm = nn.RMSNorm(width, spec.norm_eps)
        self.q_proj = nn.Linear(width, query, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(width, kv, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(width, kv, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(query, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, spec.norm_eps)
        self.gate_proj = nn.Linear(width, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(width, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, width, bias=False)

    def forward(
        self,
        x_BLD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: AttentionMask | BlockMask | None,
        *,
        compiled: bool = False,
    ) -> Tensor:
        """The layer's output for whole sequences, residuals included: (B, L, D)."""
        # Around this stand the hooks of engines that gather a layer's weights; a graph has none.
        outermost = compiled and not torch.compiler.is_compiling()
        compute = _compiled_compute() if outermost else Layer.compute
        return compute(self, x_BLD, rope, mask)

    def compute(
        self,
        x_BLD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: AttentionMask | BlockMask | None,
    ) -> Tensor:
        """The same without compiling."""
        q, k, v = self.project(x_BLD, rope)
        if mask is None or isinstance(mask, AttentionMask):
            mixed_BLE = attention(q, k, v, mask)
        else:
            mixed_BLE = tiled_attention(q, k, v, mask)
        x_BLD = x_BLD + self.o_proj(mixed_BLE)
        return x_BLD + self.mlp(x_BLD)

    def project(self, x_BLD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, of the new tokens: (B, L, heads, H) each."""
        h_BLD = self.attention_norm(x_BLD)
        q, k, v = (
            projection(h_BLD).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return apply_rope(q, *rope), apply_rope(k, *rope), v

    def pack(self) -> None:
        """Lay out the projections that read the same input as one matrix, where that can be."""
        # Not attributes of the module: they are views of its parameters, not more of them.
        self.__dict__["_qkv"] = pack_projections([self.q_proj, self.k_proj, self.v_proj])
        self.__dict__["_gate_up"] = pack_projections([self.gate_proj, self.up_proj])

    def packed_qkv(self, h_TD: Tensor, backend: Backend) -> Tensor:
        """Queries, keys and values side by side, not rotated: (T, E)."""
        packed: PackedProjection | None = self.__dict__["_qkv"]
        if packed is not None:
            return backend.linear(h_TD, packed.weight_ED, packed.bias_E)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return torch.cat([self.product(p, h_TD, backend) for p in projections], dim=-1)

    def gated(self, h_TD: Tensor, backend: Backend) -> Tensor:
        """What the down projection reads: (T, F)."""
        packed: PackedProjection | None = self.__dict__["_gate_up"]
        if packed is not None:
            return backend.gated_linear(h_TD, packed.weight_ED)
        gate_up = [self.product(p, h_TD, backend) for p in (self.gate_proj, self.up_proj)]
        return backend.swiglu(torch.cat(gate_up, dim=-1))

    def product(self, projection: nn.Module, x_TD: Tensor, backend: Backend) -> Tensor:
        """One projection: (T, E)."""
        if type(projection) is nn.Linear:
            return backend.linear(x_TD, projection.weight, projection.bias)
        return projection(x_TD)

    def mlp(self, x_BLD: Tensor) -> Tensor:
        """The gated feed-forward network, without its residual."""
        h_BLD = self.mlp_norm(x_BLD)
        return self.down_proj(F.silu(self.gate_proj(h_BLD)) * self.up_proj(h_BLD))


@functools.cache
def _compiled_compute() -> Callable[..., Tensor]:
    # One function for all layers: those with the same shapes share what was compiled.
    return torch.compile(Layer.compute, dynamic=False)


class Transformer(nn.Module):
    """A LLaDA, Dream, Llama or Qwen2 model.

    Two calls make the waist that decoding builds on: `forward` gives hidden states, `head` logits
    for the positions that need them, with `align` between them for architectures whose head
    predicts the next position. `logits` does all three without a cache.

    Example:
        >>> from d2f.testing import tiny_model
        >>> tiny_model("Dream").logits(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 96])
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        # Not drawn here, as `build_model` and checkpoints fill it: on the meta device the draw of
        # nn.Embedding would import torch's compiler, which takes two seconds.
        table_VD = torch.empty(spec.vocab_size, spec.hidden_size)
        self.embed = nn.Embedding.from_pretrained(table_VD, freeze=False)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.num_layers))
        self.norm = nn.RMSNorm(spec.hidden_size, spec.norm_eps)
        self.lm_head = (
            None
            if spec.tie_embeddings
            else nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.embed.weight.dtype

    def forward(
        self,
        ids_BL: Tensor,
        positions_BL: Tensor | None = None,
        blocks_BL: Tensor | None = None,
        *,
        first_BL: Tensor | None = None,
        mask: BlockMask | None = None,
        recompute: bool = False,
        compiled: bool = False,
    ) -> Tensor:
        """Final hidden states (B, L, D) of whole sequences, not yet aligned.

        Args:
            ids_BL: Token ids.
            positions_BL: Position of each token; None: 0, 1, ….
            blocks_BL: Block number of each token (B or 1, L); padding carries `PADDING_BLOCK`.
                None: all tokens see each other, which needs no mask.
            first_BL: With `blocks_BL`, the smallest block number that each token sees, where
                several samples stand in a row; None: all of them.
            mask: Instead of these two, what `tiled_mask` makes of them: no mask of L² then, but
                the layers, or the caller, must be compiled.
            recompute: Keep of each layer its input only, and compute the layer once more in the
                backward pass (activation checkpointing). Without gradients it changes nothing.
            compiled: Compile the layers, all as one function, rather than the whole model; new
                shapes are compiled anew. Nothing changes where the caller is compiled.
        """
        if positions_BL is None:
            positions_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device)[None]
        x_BLD = self.embed(ids_BL)
        rope = rope_tables(positions_BL, self._frequencies(), self._rope_dtype())
        attended = self._mask(blocks_BL, first_BL) if mask is None else mask
        recompute = recompute and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                x_BLD = checkpoint(
                    layer, x_BLD, rope, attended, compiled=compiled, use_reentrant=False
                )
            else:
                x_BLD = layer(x_BLD, rope, attended, compiled=compiled)
        return self.norm(x_BLD)

    def pack(self) -> None:
        """Lay out the weights for `forward_packed`; the parameters become views of the packed ones.

        To be called again when weights were moved to another device or type.
        """
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.pack()

    def forward_packed(
        self, ids_T: Tensor, packed: PackedTokens, cache: PagedCache, backend: Backend
    ) -> Tensor:
        """Final hidden states (T, D) of tokens that read and write a cache, not yet aligned.

        Args:
            ids_T: Token ids.
            packed: Where each token belongs and what it sees.
            cache: Keys and values of earlier forwards; those of these tokens are written.
            backend: The operations to use. `pack` must have been called.
        """
        spec = self.spec
        cos, sin = rope_tables(packed.positions_T[None], self._frequencies(), self._rope_dtype())
        cos_TH, sin_TH = cos[0, :, 0], sin[0, :, 0]
        plan = backend.plan_attention(packed, spec.num_heads, spec.num_kv_heads)
        x_TD, residual_TD = self.embed(ids_T), None
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            kv_2SKH = cache.layer(index)
            h_TD, residual_TD = backend.add_rms_norm(
                x_TD, residual_TD, layer.attention_norm.weight, spec.norm_eps
            )
            q_TNH = backend.rope_and_write(
                layer.packed_qkv(h_TD, backend),
                cos_TH,
                sin_TH,
                kv_2SKH,
                packed.slots_T,
                spec.num_heads,
            )
            mixed_TE = backend.paged_attention(q_TNH, kv_2SKH, plan)
            x_TD = layer.product(layer.o_proj, mixed_TE, backend)
            h_TD, residual_TD = backend.add_rms_norm(
                x_TD, residual_TD, layer.mlp_norm.weight, spec.norm_eps
            )
            x_TD = layer.product(layer.down_proj, layer.gated(h_TD, backend), backend)
        return backend.add_rms_norm(x_TD, residual_TD, self.norm.weight, spec.norm_eps)[0]

    def forward_refresh(
        self,
        ids_L: Tensor,
        positions_L: Tensor,
        count_1: Tensor,
        cache: FeatureCache,
        refresh: Refresh,
        backend: Backend,
    ) -> Tensor:
        """Final hidden states (L, D) where only some tokens are computed, not yet aligned.

        Every layer adds the features in the cache to its input, those of the tokens to refresh
        after they were computed from that input under full attention.

        Args:
            ids_L: Token ids: response, prompt, padding.
            positions_L: Position of each token in its sequence.
            count_1: How many of the slots are no padding.
            cache: The features of earlier forwards; those computed here are written.
            refresh: Which tokens are computed; all of them in the first forward of a sequence.
            backend: The operations to use. `pack` must have been called.
        """
        spec, length = self.spec, len(ids_L)
        cos, sin = rope_tables(positions_L[None], self._frequencies(), self._rope_dtype())
        num_queries = refresh.num_queries(length)
        queries = cache.queries(num_queries, count_1, length)
        plan = backend.plan_attention(queries, spec.num_heads, spec.num_kv_heads)
        out_LD, residual_LD = self.embed(ids_L), None
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            features = cache.layer(index, length)
            h_LD, x_LD = backend.add_rms_norm(
                out_LD, residual_LD, layer.attention_norm.weight, spec.norm_eps
            )
            if num_queries > 0:
                tables = (cos[0, :, 0], sin[0, :, 0])
                self._refresh(layer, (h_LD, x_LD), tables, plan, features, refresh, backend)
            residual_LD, out_LD = x_LD + features.attention_LD, features.mlp_LD
        return backend.add_rms_norm(out_LD, residual_LD, self.norm.weight, spec.norm_eps)[0]

    def _refresh(
        self,
        layer: Layer,
        inputs: tuple[Tensor, Tensor],
        tables: tuple[Tensor, Tensor],
        plan: Any,
        features: LayerFeatures,
        refresh: Refresh,
        backend: Backend,
    ) -> None:
        """Bring a layer's features up to date with its inputs, normalised and as they are."""
        span = refresh.span(len(inputs[0]))
        slots_T = torch.arange(span.start, span.stop, device=self.device)
        h_TD, x_TD, cos_TH, sin_TH = (tensor[span] for tensor in (*inputs, *tables))
        if refresh.chooses:
            values_LKH = features.kv_2SKH[1, span]
            v_LE = layer.product(layer.v_proj, h_TD, backend)
            slots_T = refresh.choose(v_LE, values_LKH.flatten(1))
            values_LKH.copy_(v_LE.view_as(values_LKH))
            h_TD, x_TD, cos_TH, sin_TH, v_TE = (
                tensor.index_select(0, slots_T) for tensor in (h_TD, x_TD, cos_TH, sin_TH, v_LE)
            )
            qk = [layer.product(p, h_TD, backend) for p in (layer.q_proj, layer.k_proj)]
            qkv_TE = torch.cat([*qk, v_TE], dim=-1)
        else:
            qkv_TE = layer.packed_qkv(h_TD, backend)
        q_TNH = backend.rope_and_write(
            qkv_TE, cos_TH, sin_TH, features.kv_2SKH, slots_T, self.spec.num_heads
        )
        mixed_TE = backend.paged_attention(q_TNH, features.kv_2SKH, plan)
        out_TD = layer.product(layer.o_proj, mixed_TE, backend)
        features.attention_LD.index_copy_(0, slots_T, out_TD)
        h_TD, _ = backend.add_rms_norm(out_TD, x_TD, layer.mlp_norm.weight, self.spec.norm_eps)
        out_TD = layer.product(layer.down_proj, layer.gated(h_TD, backend), backend)
        features.mlp_LD.index_copy_(0, slots_T, out_TD)

    def align(self, hidden_BLD: Tensor, positions_BL: Tensor | None = None) -> Tensor:
        """The hidden state that predicts the token at each position of a sequence: (B, L, D).

        Where the architecture predicts the next position, that is the state before. Position 0 has
        none before it and uses its own, as Dream's published code does. With `positions_BL` there
        may be several samples in a row, each with a position 0.
        """
        if not self.spec.architecture.shifted:
            return hidden_BLD
        before_BLD = torch.cat([hidden_BLD[:, :1], hidden_BLD[:, :-1]], dim=1)
        if positions_BL is None:
            return before_BLD
        return torch.where((positions_BL == 0)[:, :, None], hidden_BLD, before_BLD)

    def head(self, aligned_MD: Tensor) -> Tensor:
        """Logits (M, V) in fp32 of aligned hidden states; leading dimensions are kept."""
        return linear_fp32(aligned_MD, self.head_weight_VD)

    @property
    def head_weight_VD(self) -> Tensor:
        """Weight of the head: (V, D)."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def logits(
        self,
        ids_BL: Tensor,
        layout: BlockLayout | None = None,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L, V), fp32: row p scores the token at p, whatever the architecture.

        Args:
            ids_BL: Token ids.
            layout: Block-causal attention over these blocks; None: the model's own attention,
                full for diffusion models, causal for autoregressive ones.
            lengths_B: Real tokens of each row; later ones are padding and never change a row.

        Raises:
            ConfigError: A layout was given to an autoregressive model.
        """
        blocks_BL = None
        if self.spec.architecture.causal:
            if layout is not None:
                raise ConfigError(
                    f"{self.spec.architecture.name} attends causally; it takes no block layout"
                )
            blocks_BL = causal_blocks(ids_BL.shape[1], ids_BL.device)
        elif layout is not None:
            blocks_BL = layout.block_numbers(ids_BL.shape[1], ids_BL.device)
        if lengths_B is not None:
            inside_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device) < lengths_B[:, None]
            zero_BL = torch.zeros_like(ids_BL, dtype=torch.int32)
            blocks_BL = zero_BL if blocks_BL is None else blocks_BL.expand_as(ids_BL)
            blocks_BL = torch.where(inside_BL, blocks_BL, PADDING_BLOCK)
        return self.head(self.align(self(ids_BL, blocks_BL=blocks_BL)))

    def _mask(self, blocks_BL: Tensor | None, first_BL: Tensor | None) -> AttentionMask | None:
        if blocks_BL is None:
            return None

        def seen(start: int, end: int) -> Tensor:
            first_BR = None if first_BL is None else first_BL[:, start:end]
            return visible(blocks_BL[:, start:end], blocks_BL, first_BR)

        size = (len(blocks_BL), blocks_BL.shape[1], blocks_BL.shape[1])
        groups = self.spec.num_heads // self.spec.num_kv_heads
        return AttentionMask(seen, size, groups)

    def _rope_dtype(self) -> torch.dtype:
        return torch.float32 if self.spec.architecture.rope_full_precision else self.dtype

    def _frequencies(self) -> Tensor:
        # Made on first use, not in __init__: models are built on the meta device, and rounding
        # them with the weights to bf16 would spoil the positions.
        frequency_H = self.__dict__.get("_frequency_H")
        if frequency_H is None or frequency_H.device != self.device:
            spec = self.spec
            frequency_H = rope_frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling)
            frequency_H = frequency_H.to(self.device)
            self.__dict__["_frequency_H"] = frequency_H
        return frequency_H
