"""The model: an embedding, layers under one of several attentions, and a head.

Shapes: B sequences, L tokens of each, T packed tokens of all, M selected positions, D hidden size,
V vocabulary, H head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2f.diffusion.layout import PADDING_BLOCK, BlockLayout, causal_blocks, visible
from d2f.errors import ConfigError
from d2f.models.attend import Dense, Paged, Refreshed, Tables, Tiled
from d2f.models.cache import PagedCache
from d2f.models.feature_cache import FeatureCache, Refresh
from d2f.models.layer import Layer, StepLayer, add_norm
from d2f.models.linear import Embedding, Head
from d2f.models.spec import ModelSpec, published_modules
from d2f.ops.attention import AttentionMask
from d2f.ops.backend import Backend
from d2f.ops.packed import PackedTokens
from d2f.ops.rope import rope_frequencies, rope_tables

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Transformer(nn.Module):
    """A model of any family (`d2f.models.families`).

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
        self.embed = Embedding.from_pretrained(table_VD, freeze=False)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.num_layers))
        self.norm = nn.RMSNorm(spec.hidden_size, spec.norm_eps)
        self.lm_head = (
            None if spec.tie_embeddings else Head(spec.hidden_size, spec.vocab_size, bias=False)
        )
        self._frequency_H: Tensor | None = None
        self._step_layers: list[StepLayer] = []

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
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
        rope = self._rope(positions_BL)
        attend = Dense(rope, self._mask(blocks_BL, first_BL)) if mask is None else Tiled(rope, mask)
        recompute = recompute and torch.is_grad_enabled()
        x_BLD = self.embed(ids_BL)
        for layer in self.layers:
            if recompute:
                x_BLD = checkpoint(layer, x_BLD, attend, compiled=compiled, use_reentrant=False)
            else:
                x_BLD = layer(x_BLD, attend, compiled=compiled)
        return self.norm(x_BLD)

    @property
    def has_steps(self) -> bool:
        """Whether `prepare_steps` has been called."""
        return bool(self._step_layers)

    def prepare_steps(self) -> None:
        """Make the layers ready for steps; some parameters become views of joined ones.

        To be called before `forward_packed` and `forward_refresh`, and again when weights were
        replaced or moved to another device or type.
        """
        # Plain objects, not modules: they hold the same weights, not more of them.
        layers = cast(Iterable[Layer], self.layers)
        self._step_layers = [StepLayer(layer, i) for i, layer in enumerate(layers)]

    def forward_packed(
        self, ids_T: Tensor, packed: PackedTokens, cache: PagedCache, backend: Backend
    ) -> Tensor:
        """Final hidden states (T, D) of tokens that read and write a cache, not yet aligned.

        Args:
            ids_T: Token ids.
            packed: Where each token belongs and what it sees.
            cache: Keys and values of earlier forwards; those of these tokens are written.
            backend: The operations to use. `prepare_steps` must have been called.
        """
        spec = self.spec
        plan = backend.plan_attention(packed, spec.num_heads, spec.num_kv_heads)
        rope = self._flat_rope(packed.positions_T)
        return self._run(ids_T, Paged(backend, rope, packed.slots_T, cache, plan))

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
            backend: The operations to use. `prepare_steps` must have been called.
        """
        spec, length = self.spec, len(ids_L)
        queries = cache.queries(refresh.num_queries(length), count_1, length)
        plan = backend.plan_attention(queries, spec.num_heads, spec.num_kv_heads)
        rope = self._flat_rope(positions_L)
        return self._run(ids_L, Refreshed(backend, rope, cache, refresh, plan))

    def _run(self, ids_T: Tensor, attend: Paged | Refreshed) -> Tensor:
        """Final hidden states (T, D) of a step."""
        assert self._step_layers, "prepare_steps must be called first"
        x_TD: Tensor = self.embed(ids_T)
        residual_TD: Tensor | None = None
        for layer in self._step_layers:
            x_TD, residual_TD = attend.step(layer, x_TD, residual_TD)
        return add_norm(self.norm, x_TD, residual_TD, attend.backend)[0]

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

    def head(self, aligned_MD: Tensor, backend: Backend | None = None) -> Tensor:
        """Logits (M, V) in fp32 of aligned hidden states.

        Without a backend leading dimensions are kept, and gradients flow.
        """
        table = self.embed if self.lm_head is None else self.lm_head
        return table.score(aligned_MD, backend)

    @property
    def head_weight_VD(self) -> Tensor:
        """Weight of the head, (V, D), for a loss that differentiates it in chunks."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    @property
    def step_bytes(self) -> int:
        """Bytes of the weights that a step reads: all but the table of embeddings."""
        layers = sum(p.nbytes for p in self.layers.parameters())
        return layers + self.norm.weight.nbytes + self.head_weight_VD.nbytes

    @property
    def step_products(self) -> int:
        """Multiplications by weights that a step does per token, those of the head included."""
        layers = sum(p.numel() for p in self.layers.parameters() if p.ndim == 2)
        return layers + self.head_weight_VD.numel()

    def logits(
        self, ids_BL: Tensor, layout: BlockLayout | None = None, lengths_B: Tensor | None = None
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

    def _flat_rope(self, positions_T: Tensor) -> Tables:
        """Tables of the rotation of a step's tokens: (T, H) each."""
        cos, sin = self._rope(positions_T[None])
        return cos[0, :, 0], sin[0, :, 0]

    def _rope(self, positions_BL: Tensor) -> Tables:
        """Tables of the rotation: (B, L, 1, H) each."""
        full = self.spec.architecture.rope_full_precision
        dtype = torch.float32 if full else self.dtype
        return rope_tables(positions_BL, self._frequencies(), dtype)

    def _frequencies(self) -> Tensor:
        """Return the frequencies of the rotation, on the model's device."""
        # They are made on first use, not in __init__: models are built on the meta device, and
        # rounding them with the weights to bf16 would spoil the positions.
        spec, frequency_H = self.spec, self._frequency_H
        if frequency_H is None or frequency_H.device != self.device:
            frequency_H = rope_frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling)
            self._frequency_H = frequency_H = frequency_H.to(self.device)
        return frequency_H


def filled_model(spec: ModelSpec, value_of: Callable[[str, Tensor], Tensor]) -> Transformer:
    """A model with frozen parameters `value_of(our name, parameter on the meta device)`.

    One that is a parameter itself is taken as it is. They are asked for in published order.
    """
    with torch.device("meta"):
        model = Transformer(spec)
    for ours in published_modules(spec).values():
        module = model.get_submodule(ours)
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            value = value_of(f"{ours}.{attribute}", parameter)
            frozen = not isinstance(value, nn.Parameter)
            setattr(module, attribute, nn.Parameter(value, False) if frozen else value)
    return model


def published_parameters(model: Transformer) -> dict[str, tuple[nn.Module, str]]:
    """Published tensor name -> the module that holds it and its attribute there."""
    places = {}
    for published, ours in published_modules(model.spec).items():
        module = model.get_submodule(ours)
        for attribute, _ in module.named_parameters(recurse=False):
            places[f"{published}.{attribute}"] = (module, attribute)
    return places
