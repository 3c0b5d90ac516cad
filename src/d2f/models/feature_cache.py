"""A cache of layers' outputs of earlier steps, for forwards that compute few tokens anew.

Shapes: L slots of a sequence, S slots of the cache, R tokens of the response, T those computed
anew, N layers, K key/value heads, H head dimension, D hidden size, E any.

The slots of a sequence hold its response, then its prompt, then padding: attention is full, so that
only a token's position says where it stands, and where the prompt starts follows from the response
length alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f.models.spec import ModelSpec
from d2f.ops.packed import PackedTokens

SAME = 1 - 1e-6
"""Vectors more alike than this differ by rounding only."""
_PAGE_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """The tokens that a forward computes anew; all others keep the features of earlier ones.

    Example:
        >>> Refresh(response_length=16, prompt=False, response=False, num_tokens=4).num_queries(48)
        4
        >>> Refresh(response_length=16, prompt=True, response=True).num_queries(48)
        48
    """

    response_length: int
    """Length of the response (R)."""
    prompt: bool
    """Whether the whole prompt is computed."""
    response: bool
    """Whether the whole response is computed."""
    num_tokens: int = 0
    """Number of tokens of a response not computed whole that each layer computes anew: those whose
    values changed most."""

    def num_queries(self, length: int) -> int:
        """T, of L slots: how many go through a layer's projections and feed-forward network."""
        response = self.response_length if self.response else self.num_tokens
        return response + (length - self.response_length if self.prompt else 0)

    def span(self, length: int) -> slice:
        """The slots among which those computed anew lie, and whose values are computed."""
        start = 0 if self.response or self.num_tokens > 0 else self.response_length
        return slice(start, length if self.prompt else self.response_length)

    @property
    def chooses(self) -> bool:
        """Each layer chooses the tokens of the response that it computes."""
        return not self.response and self.num_tokens > 0

    def choose(self, new_LE: Tensor, old_LE: Tensor) -> Tensor:
        """The slots to compute anew where they are chosen: (T,).

        Args:
            new_LE: Values of the span now, all heads of a token side by side.
            old_LE: Values of the span in the cache.
        """
        end = self.response_length
        chosen_R = least_similar(new_LE[:end], old_LE[:end], self.num_tokens)
        if not self.prompt:
            return chosen_R
        return torch.cat([chosen_R, torch.arange(end, len(new_LE), device=chosen_R.device)])


def least_similar(new_LE: Tensor, old_LE: Tensor, count: int) -> Tensor:
    """The `count` rows of the least cosine similarity.

    Equals go by position, and so do vectors that differ by rounding only, which most do in the
    first layer.
    """
    similarity_L = F.cosine_similarity(new_LE.float(), old_LE.float(), dim=-1).clamp_max(SAME)
    # Not topk, which breaks ties as it likes.
    return similarity_L.sort(stable=True).indices[:count]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerFeatures:
    """The last features of each token in one layer; views of the cache, written in place."""

    kv_2SKH: Tensor
    """Keys, rotated, and values."""
    attention_LD: Tensor
    """Output of the attention after its projection, without the residual."""
    mlp_LD: Tensor
    """Output of the feed-forward network, without the residual."""


class FeatureCache:
    """Keys, values, attention outputs and feed-forward outputs of one sequence in all layers.

    It serves any sequence of up to `num_slots` slots, one after the other: what an earlier one left
    is never read, as the first forward of a sequence computes all of it.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> FeatureCache(tiny_spec("Dream"), num_slots=64).features(1, 40).mlp_LD.shape
        torch.Size([40, 32])
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        num_slots: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        num_pages = -(-num_slots // _PAGE_SIZE)
        self.num_slots = num_pages * _PAGE_SIZE
        shape = (spec.num_layers, 2, self.num_slots)
        kv = spec.num_kv_heads, spec.head_dim
        self.kv_N2SKH = torch.empty((*shape, *kv), device=device, dtype=dtype)
        self.outputs_N2SD = torch.empty((*shape, spec.hidden_size), device=device, dtype=dtype)
        self._pages_1P = torch.arange(num_pages, device=device, dtype=torch.int32)[None]

    def layer(self, index: int) -> Tensor:
        """Keys and values of one layer: (2, S, K, H)."""
        return self.kv_N2SKH[index]

    def features(self, index: int, length: int) -> LayerFeatures:
        """The features of a layer for a sequence of `length` slots."""
        attention_LD, mlp_LD = self.outputs_N2SD[index, :, :length].unbind()
        return LayerFeatures(kv_2SKH=self.layer(index), attention_LD=attention_LD, mlp_LD=mlp_LD)

    def queries(self, num_queries: int, count_1: Tensor, length: int) -> PackedTokens:
        """Plan `num_queries` queries that see the first `count_1` of `length` slots.

        What is planned for them serves all layers, whichever tokens they are: here a place in the
        cache stands for a position, as attention takes it.
        """
        place_T = torch.arange(num_queries, device=count_1.device)
        return PackedTokens(
            positions_T=place_T,
            slots_T=place_T,
            limits_T=count_1.repeat(num_queries),
            starts_B=torch.zeros_like(count_1),
            counts_B=torch.full_like(count_1, num_queries),
            ends_B=count_1,
            pages_BP=self._pages_1P,
            page_size=_PAGE_SIZE,
            max_count=num_queries,
            max_end=length,
        )
