"""The attentions that a layer can be given: dense, in tiles, over pages, with partial refresh.

Shapes: B sequences, L positions of each, T tokens of a step, D hidden size, H head size, N query
heads, K key/value heads, S cache slots, E outputs of a projection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2f.models.cache import PagedCache
from d2f.models.feature_cache import FeatureCache, LayerFeatures, Refresh
from d2f.models.layer import Layer, StepLayer, add_norm
from d2f.ops.attention import AttentionMask, attention
from d2f.ops.backend import Backend
from d2f.ops.rope import apply_rope
from d2f.ops.tiled_attention import tiled_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Tables = tuple[Tensor, Tensor]
"""Cosines and sines of the rotation."""


class Dense:
    """Attention of whole sequences under a mask, in plain torch with gradients.

    Args:
        rope: Tables of the rotation, (B or 1, L, 1, H) each.
        mask: Who sees whom; None: all see all.
    """

    backend = None

    def __init__(self, rope: Tables, mask: AttentionMask | None) -> None:
        self.rope, self.mask = rope, mask

    def __call__(self, layer: Layer, h_BLD: Tensor) -> Tensor:
        """Gather the values that each position attends to: (B, L, N * H)."""
        return attention(*self._rotated(layer, h_BLD), self.mask)

    def _rotated(self, layer: Layer, h_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BLNH, k_BLKH, v_BLKH = layer.qkv.heads(h_BLD)
        return apply_rope(q_BLNH, *self.rope), apply_rope(k_BLKH, *self.rope), v_BLKH


class Tiled(Dense):
    """The same in tiles (FlexAttention), which needs no mask of L²; to be compiled.

    Args:
        rope: Tables of the rotation.
        tiles: From `tiled_mask`.
    """

    def __init__(self, rope: Tables, tiles: BlockMask) -> None:
        super().__init__(rope, None)
        self.tiles = tiles

    def __call__(self, layer: Layer, h_BLD: Tensor) -> Tensor:
        """Gather the values that each position attends to: (B, L, N * H)."""
        return tiled_attention(*self._rotated(layer, h_BLD), self.tiles)


class Paged:
    """Attention of a step's tokens over cached keys and values, among which their own are written.

    Args:
        backend: The operations to use.
        rope: Tables of the rotation, (T, H) each.
        slots_T: The cache slot of each token.
        cache: Keys and values of the layers.
        plan: What `backend.plan_attention` made of who sees whom.
        v_TE: The values of the tokens where they are known already.
    """

    def __init__(
        self,
        backend: Backend,
        rope: Tables,
        slots_T: Tensor,
        cache: PagedCache | FeatureCache,
        plan: Any,
        v_TE: Tensor | None = None,
    ) -> None:
        self.backend, self.rope, self.slots_T = backend, rope, slots_T
        self.cache, self.plan, self.v_TE = cache, plan, v_TE

    def __call__(self, layer: StepLayer, h_TD: Tensor) -> Tensor:
        """Gather the values that each token attends to: (T, N * H)."""
        backend, kv_2SKH = self.backend, self.cache.layer(layer.index)
        qkv_TE = layer.qkv(h_TD, backend, self.v_TE)
        q_TNH = backend.rope_and_write(
            qkv_TE, *self.rope, kv_2SKH, self.slots_T, layer.qkv.num_heads
        )
        return backend.paged_attention(q_TNH, kv_2SKH, self.plan)

    def step(
        self, layer: StepLayer, x_TD: Tensor, residual_TD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run a layer; see `LayerProgram.compute`."""
        return layer.compute(x_TD, residual_TD, self)


class Refreshed:
    """Layers that add cached features to their input, after computing those of some tokens anew.

    `rope` are tables of the rotation, (L, H) each; `plan` is what `backend.plan_attention` made of
    as many queries as `refresh` computes, whose features are written to the `cache`.
    """

    def __init__(
        self, backend: Backend, rope: Tables, cache: FeatureCache, refresh: Refresh, plan: Any
    ) -> None:
        self.backend, self.rope, self.cache = backend, rope, cache
        self.refresh, self.plan = refresh, plan

    def step(
        self, layer: StepLayer, out_LD: Tensor, residual_LD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run a layer on the tokens to refresh; gives `LayerProgram.compute`'s results for all."""
        length = len(out_LD)
        features = self.cache.features(layer.index, length)
        h_LD, x_LD = add_norm(layer.attention_norm, out_LD, residual_LD, self.backend)
        if self.refresh.num_queries(length) > 0:
            self._compute(layer, h_LD, x_LD, features)
        return features.mlp_LD, x_LD + features.attention_LD

    def _compute(
        self, layer: StepLayer, h_LD: Tensor, x_LD: Tensor, features: LayerFeatures
    ) -> None:
        """Bring a layer's features up to date with its input x and its normalised form h."""
        span = self.refresh.span(len(h_LD))
        slots_T = torch.arange(span.start, span.stop, device=h_LD.device)
        h_TD, x_TD, *rope = (tensor[span] for tensor in (h_LD, x_LD, *self.rope))
        v_TE = None
        if self.refresh.chooses:
            values_LKH = features.kv_2SKH[1, span]
            v_LE = layer.qkv.value(h_TD, self.backend)
            slots_T = self.refresh.choose(v_LE, values_LKH.flatten(1))
            values_LKH.copy_(v_LE.view_as(values_LKH))
            h_TD, x_TD, *rope, v_TE = (
                tensor.index_select(0, slots_T) for tensor in (h_TD, x_TD, *rope, v_LE)
            )
        cos_TH, sin_TH = rope
        attend = Paged(self.backend, (cos_TH, sin_TH), slots_T, self.cache, self.plan, v_TE)
        attention_TD, out_TD, _ = layer.inner(h_TD, x_TD, attend)
        features.attention_LD.index_copy_(0, slots_T, attention_TD)
        features.mlp_LD.index_copy_(0, slots_T, out_TD)
