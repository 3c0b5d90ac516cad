"""What the layers computed in earlier steps, for forwards that compute few tokens anew.

Shapes: B sequences (one), L slots of a sequence, S slots of the cache, M tokens computed anew,
N layers, K key/value heads, H head dimension, D hidden size; … stands for any further ones.

The slots of a sequence are its prompt, padded in front, and its response behind it; attention is
full, so that only a token's position says where it stands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f.models.spec import ModelSpec

SAME = 1 - 1e-6
"""Vectors more alike than this differ by rounding only."""


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """Which tokens a forward computes anew; all others keep the features of earlier ones.

    Example:
        >>> Refresh(boundary=32, prompt=False, response=False, num_tokens=4).num_queries(48)
        4
        >>> Refresh(boundary=32, prompt=True, response=True).num_queries(48)
        48
    """

    boundary: int
    """First slot of the response."""
    prompt: bool
    """The whole prompt."""
    response: bool
    """The whole response."""
    num_tokens: int = 0
    """Where the response is not computed whole: as many of it in each layer, those whose values
    changed most."""

    def num_queries(self, length: int) -> int:
        """M, of L slots: how many go through a layer's projections and feed-forward network."""
        response = length - self.boundary if self.response else self.num_tokens
        return response + (self.boundary if self.prompt else 0)

    def span(self, length: int) -> slice:
        """The slots among which those computed anew lie, and whose values are computed."""
        start = 0 if self.prompt else self.boundary
        return slice(start, length if self.response or self.num_tokens > 0 else self.boundary)

    def rows(self, new_BLKH: Tensor, old_BLKH: Tensor) -> Tensor | None:
        """The tokens to compute anew, counted from the start of the span: (B, M); None: all.

        Args:
            new_BLKH: Values of the span now.
            old_BLKH: Values of the span in the cache.
        """
        if self.response or self.num_tokens == 0:
            return None
        skipped = self.boundary if self.prompt else 0
        rows_BM = least_similar(new_BLKH[:, skipped:], old_BLKH[:, skipped:], self.num_tokens)
        if not self.prompt:
            return rows_BM
        prompt_1L = torch.arange(self.boundary, device=rows_BM.device)[None]
        return torch.cat([prompt_1L.expand(len(rows_BM), -1), rows_BM + skipped], dim=1)


def least_similar(new_BLKH: Tensor, old_BLKH: Tensor, count: int) -> Tensor:
    """The `count` tokens whose vectors of all heads have the least cosine similarity: (B, count).

    Equals go by position, and so do vectors that differ by rounding only, which most do in the
    first layer.

    Example:
        >>> old_BLKH = torch.tensor([[1.0, 0], [1, 0], [1, 0]]).view(1, 3, 1, 2)
        >>> new_BLKH = torch.tensor([[2.0, 0], [0, 1], [1, 1]]).view(1, 3, 1, 2)
        >>> least_similar(new_BLKH, old_BLKH, 2)
        tensor([[1, 2]])
    """
    new_BLE, old_BLE = new_BLKH.flatten(2).float(), old_BLKH.flatten(2).float()
    similarity_BL = F.cosine_similarity(new_BLE, old_BLE, dim=-1).clamp_max(SAME)
    # Not topk, which breaks ties as it likes.
    return similarity_BL.sort(dim=1, stable=True).indices[:, :count]


def take(x_BL: Tensor, rows_BM: Tensor | None) -> Tensor:
    """Rows of x (B, L, …): (B, M, …); None: all.

    Example:
        >>> take(torch.tensor([[[5.0], [6.0]]]), torch.tensor([[1]]))
        tensor([[[6.]]])
    """
    if rows_BM is None:
        return x_BL
    index_BM = rows_BM.view(*rows_BM.shape, *(1 for _ in x_BL.shape[2:]))
    return x_BL.gather(1, index_BM.expand(-1, -1, *x_BL.shape[2:]))


def put(x_BL: Tensor, rows_BM: Tensor | None, source_BM: Tensor) -> None:
    """Write rows of x (B, L, …) in place from (B, M, …); None: all.

    Example:
        >>> x = torch.zeros(1, 2, 1)
        >>> put(x, torch.tensor([[1]]), torch.ones(1, 1, 1))
        >>> x.flatten()
        tensor([0., 1.])
    """
    if rows_BM is None:
        x_BL.copy_(source_BM)
        return
    index_BM = rows_BM.view(*rows_BM.shape, *(1 for _ in x_BL.shape[2:]))
    x_BL.scatter_(1, index_BM.expand_as(source_BM), source_BM)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerFeatures:
    """What one layer computed last for each token; views of the cache, written in place."""

    keys_BLKH: Tensor
    """Rotated."""
    values_BLKH: Tensor
    attention_BLD: Tensor
    """Output of the attention after its projection, without the residual."""
    mlp_BLD: Tensor
    """Output of the feed-forward network, without the residual."""


class FeatureCache:
    """Keys, values, attention outputs and feed-forward outputs of one sequence in all layers.

    It serves any sequence of up to `num_slots` slots, one after the other: what an earlier one left
    is never read, as the first forward of a sequence computes all of it.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> FeatureCache(tiny_spec("Dream"), num_slots=64).layer(1, 40).keys_BLKH.shape
        torch.Size([1, 40, 2, 8])
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        num_slots: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.num_slots = num_slots
        layers, heads, head_dim = spec.num_layers, spec.num_kv_heads, spec.head_dim
        self._kv_N2BSKH = torch.empty(
            (layers, 2, 1, num_slots, heads, head_dim), device=device, dtype=dtype
        )
        self._outputs_N2BSD = torch.empty(
            (layers, 2, 1, num_slots, spec.hidden_size), device=device, dtype=dtype
        )

    def layer(self, index: int, length: int) -> LayerFeatures:
        """The features of a layer for a sequence of `length` slots."""
        keys_BLKH, values_BLKH = self._kv_N2BSKH[index, :, :, :length].unbind()
        attention_BLD, mlp_BLD = self._outputs_N2BSD[index, :, :, :length].unbind()
        return LayerFeatures(
            keys_BLKH=keys_BLKH,
            values_BLKH=values_BLKH,
            attention_BLD=attention_BLD,
            mlp_BLD=mlp_BLD,
        )
