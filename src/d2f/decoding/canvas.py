"""Prompts and whole responses of a batch at fixed places in memory, for captured steps.

Shapes: B sequences, T packed tokens of all of them, K positions of a block, M = B * K of all
blocks, R positions of the longest response, A alternatives, E EOS tokens, P pages of a sequence,
D hidden size.

The tokens lie packed, sequence after sequence, padding at the end. Every token sees all tokens of
its sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2f.decoding.alternatives import choose_with_alternatives
from d2f.decoding.batch import Decoded, DecodingBatch, RowRequest
from d2f.decoding.workspace import Workspace
from d2f.models.cache import PagedCache, ScratchCache
from d2f.models.transformer import Transformer
from d2f.ops.packed import PackedTokens
from d2f.ops.sampling import Choice

PAGE_SIZE = 16
_FAR = 1 << 40
"""Position beyond every other."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CanvasBuffers:
    """The tensors that a canvas keeps on the device."""

    ids_T: Tensor
    """Token ids; behind the last a place for what is not to be kept."""
    probability_T: Tensor
    """Probability with which each token was accepted, fp32; 0 where none was accepted."""
    alternatives_TA: Tensor
    """Most probable tokens at each position as numbers, if asked for; 0 where none was accepted."""
    tokens_3T: Tensor
    """Position, slot and limit of each token, as `PackedTokens` has them."""
    facts_5B: Tensor
    """First token, prompt's length, whole length, response's length and seed of each sequence."""
    pages_BP: Tensor
    eos_E: Tensor
    step_1: Tensor
    """Forwards so far."""
    report_3B: Tensor
    """The response's first mask, its first EOS, and whether all its probabilities were finite."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """K positions of each response."""

    response_BK: Tensor
    """Places in the response."""
    place_BK: Tensor
    """Places among the T tokens."""
    candidate_BK: Tensor
    """Whether a token is needed at each of these places."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """A response that another canvas goes on with, as the buffers have it."""

    ids_R: Tensor
    probability_R: Tensor
    alternatives_RA: Tensor
    finite: bool


class Canvas:
    """The tokens of a batch and what is done with all of them alike.

    Args:
        model: The model; packed.
        asked: What the sequences of the batch are asked for.
        workspace: Where its buffers are.
        keeps_cache: Each layer keeps the keys and values of its last forward.
        kept: What other canvases kept of these responses; None: nothing is decoded yet.
    """

    def __init__(
        self,
        model: Transformer,
        asked: Sequence[RowRequest],
        workspace: Workspace,
        *,
        keeps_cache: bool = False,
        kept: Sequence[Kept] | None = None,
    ) -> None:
        assert model.spec.mask_token_id is not None
        self.model, self.asked = model, asked
        self.workspace, self.backend = workspace, workspace.backend
        self.mask_token_id = model.spec.mask_token_id
        self.counts = [len(one.prompt) + one.max_new_tokens for one in asked]
        self.num_tokens = workspace.padded(sum(self.counts))
        self.width = workspace.padded(max(self.counts))
        self.response_width = workspace.padded(max(one.max_new_tokens for one in asked))
        num_pages = -(-self.width // PAGE_SIZE)
        num_eos = len(asked[0].eos_token_ids)
        self.num_alternatives = min(asked[0].num_alternatives, model.spec.vocab_size)
        self.key: Hashable = (
            "canvas", len(asked), self.num_tokens, self.width, self.response_width, num_eos,
            keeps_cache, self.num_alternatives,
        )  # fmt: skip
        device = model.device

        def make() -> CanvasBuffers:
            def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
                return torch.zeros(shape, device=device, dtype=dtype)

            batch = len(asked)
            return CanvasBuffers(
                ids_T=zeros(self.num_tokens + 1),
                probability_T=zeros(self.num_tokens + 1, dtype=torch.float32),
                alternatives_TA=zeros(self.num_tokens + 1, self.num_alternatives),
                tokens_3T=zeros(3, self.num_tokens),
                facts_5B=zeros(5, batch),
                pages_BP=zeros(batch, num_pages, dtype=torch.int32),
                eos_E=zeros(num_eos),
                step_1=zeros(1),
                report_3B=zeros(3, batch),
            )

        self.buffers = workspace.buffers(self.key, make)
        # By powers of two, so that all lengths together take no more than twice the longest's room.
        capacity = 1 << (len(asked) * num_pages).bit_length()
        kind = PagedCache if keeps_cache else ScratchCache
        self.cache = workspace.buffers(
            (kind, capacity),
            lambda: kind(
                model.spec,
                num_pages=capacity,
                page_size=PAGE_SIZE,
                device=device,
                dtype=model.dtype,
            ),
        )
        self._decoded: list[Decoded] | None = None
        """Decoded responses; None where they must be read first."""
        self._write()
        for place, known in zip(self._places(), kept or [], strict=bool(kept)):
            self.buffers.ids_T[place].copy_(known.ids_R)
            self.buffers.probability_T[place].copy_(known.probability_R)
            self.buffers.alternatives_TA[place].copy_(known.alternatives_RA)
        if kept:
            self.buffers.report_3B[2].copy_(torch.tensor([known.finite for known in kept]))

    def _write(self) -> None:
        """Fill the buffers; the responses are masks."""
        buffers, ids = self.buffers, list[int]()
        for one in self.asked:
            ids += [*one.prompt, *[self.mask_token_id] * one.max_new_tokens]
        count_B = torch.tensor(self.counts)
        first_B = count_B.cumsum(0) - count_B
        prompt_B = torch.tensor([len(one.prompt) for one in self.asked])
        seed_B = torch.tensor([one.seed for one in self.asked])
        row_U = torch.arange(len(count_B)).repeat_interleave(count_B)
        position_U = torch.arange(len(row_U)) - first_B[row_U]
        pages_BP = torch.arange(buffers.pages_BP.numel(), dtype=torch.int32) + 1
        pages_BP = pages_BP.view(buffers.pages_BP.shape)
        slot_U = pages_BP[row_U, position_U // PAGE_SIZE].long() * PAGE_SIZE
        slot_U += position_U % PAGE_SIZE
        tokens_3T = torch.zeros(3, self.num_tokens, dtype=torch.long)
        tokens_3T[:, : len(ids)] = torch.stack([position_U, slot_U, count_B[row_U]])
        ids_T = torch.zeros(self.num_tokens + 1, dtype=torch.long)
        ids_T[: len(ids)] = torch.tensor(ids)
        limit_B = count_B - prompt_B
        buffers.ids_T.copy_(ids_T)
        buffers.probability_T.zero_()
        buffers.alternatives_TA.zero_()
        buffers.tokens_3T.copy_(tokens_3T)
        buffers.facts_5B.copy_(torch.stack([first_B, prompt_B, count_B, limit_B, seed_B]))
        buffers.pages_BP.copy_(pages_BP)
        buffers.eos_E.copy_(torch.tensor(self.asked[0].eos_token_ids, dtype=torch.long))
        buffers.step_1.zero_()
        buffers.report_3B.zero_()
        buffers.report_3B[2].fill_(1)

    def _places(self) -> list[slice]:
        """Return the place of each response among the tokens."""
        ends = itertools.accumulate(self.counts)
        return [
            slice(end - one.max_new_tokens, end) for end, one in zip(ends, self.asked, strict=True)
        ]

    # --------------------------------------------------------------------- parts of a step

    def forward(self) -> Tensor:
        """Final hidden states (T, D) of all tokens, computed anew."""
        buffers = self.buffers
        position_T, slot_T, limit_T = buffers.tokens_3T.unbind()
        first_B, _, count_B, _, _ = buffers.facts_5B.unbind()
        packed = PackedTokens(
            positions_T=position_T,
            slots_T=slot_T,
            limits_T=limit_T,
            starts_B=first_B,
            counts_B=count_B,
            ends_B=count_B,
            pages_BP=buffers.pages_BP,
            page_size=PAGE_SIZE,
            max_count=self.width,
            max_end=self.width,
        )
        return self.model.forward_packed(buffers.ids_T[:-1], packed, self.cache, self.backend)

    def forward_part(self, start_1: Tensor, stop_1: Tensor, num_tokens: int) -> Tensor:
        """Final hidden states of the positions from start to stop, padded to `num_tokens`.

        Of the only sequence. They see, and overwrite, what earlier forwards cached.
        """
        buffers, device = self.buffers, start_1.device
        count_1, at_T = buffers.facts_5B[2], torch.arange(num_tokens, device=device)
        position_T = start_1 + at_T
        inside_T = position_T < stop_1
        packed = PackedTokens(
            positions_T=position_T.where(inside_T, 0),
            slots_T=(position_T + PAGE_SIZE).where(inside_T, 0),
            limits_T=count_1.where(inside_T, 0),
            starts_B=buffers.facts_5B[0],
            counts_B=stop_1 - start_1,
            ends_B=count_1,
            pages_BP=buffers.pages_BP,
            page_size=PAGE_SIZE,
            max_count=num_tokens,
            max_end=self.width,
        )
        ids_T = buffers.ids_T[position_T.clamp_max(self.num_tokens)]
        return self.model.forward_packed(ids_T, packed, self.cache, self.backend)

    def block(self, start_B: Tensor, end_B: Tensor, length: int) -> Block:
        """The positions of the responses from start to end, K = `length` of them or fewer."""
        first_B, prompt_B = self.buffers.facts_5B[0], self.buffers.facts_5B[1]
        response_BK = start_B[:, None] + torch.arange(length, device=start_B.device)
        place_BK = (first_B + prompt_B)[:, None] + response_BK
        place_BK = place_BK.clamp_max(self.num_tokens)
        masked_BK = self.buffers.ids_T[place_BK] == self.mask_token_id
        return Block(
            response_BK=response_BK,
            place_BK=place_BK,
            candidate_BK=masked_BK & (response_BK < end_B[:, None]),
        )

    def aligned(self, hidden_TD: Tensor, block: Block) -> Tensor:
        """The hidden states that predict a block's tokens, after a forward of all: (B * K, D)."""
        place_BK = block.place_BK
        if self.model.spec.architecture.shifted:
            place_BK = torch.maximum(place_BK - 1, self.buffers.facts_5B[0][:, None])
        return hidden_TD[place_BK.flatten().clamp_max(self.num_tokens - 1)]

    def choose(
        self, aligned_MD: Tensor, block: Block, confidence: int | None = None
    ) -> tuple[Choice, Tensor]:
        """Tokens for a block's candidates with their probability and rank, M = B * K of each.

        `confidence` is the code of what ranks them; None: the probability. With them come their
        alternatives as numbers: (M, A).
        """
        seed_BK = self.buffers.facts_5B[4][:, None].expand_as(block.response_BK)
        position_M = (self.buffers.facts_5B[1][:, None] + block.response_BK).flatten()
        # Kernels read numbers that lie side by side.
        seed_M = seed_BK.flatten().contiguous()
        step_M = self.buffers.step_1.expand_as(position_M).contiguous()
        return choose_with_alternatives(
            aligned_MD,
            self.model,
            self.backend,
            mask_token_id=self.mask_token_id,
            count=self.num_alternatives,
            sampling=lambda part: self.asked[0].sampling(
                seed_M[part], position_M[part], step_M[part]
            ),
            confidence_M=None if confidence is None else torch.full_like(seed_M, confidence),
            needed_M=block.candidate_BK.flatten(),
        )

    def take(self, block: Block, choice: Choice, alternatives_MA: Tensor, kept_BK: Tensor) -> None:
        """Write the tokens that are kept, and the report; the forward is over."""
        buffers = self.buffers
        # What is not kept goes to a place of its own, as a block's end may lie in another's tokens.
        place_M = block.place_BK.where(kept_BK, self.num_tokens).flatten()
        buffers.ids_T.index_copy_(0, place_M, choice.token_M)
        buffers.probability_T.index_copy_(0, place_M, choice.probability_M)
        if self.num_alternatives:
            buffers.alternatives_TA.index_copy_(0, place_M, alternatives_MA)
        buffers.step_1.add_(1)

        first_B, prompt_B, _, limit_B, _ = buffers.facts_5B.unbind()
        index_R = torch.arange(self.response_width, device=first_B.device)
        place_BR = ((first_B + prompt_B)[:, None] + index_R).clamp_max(self.num_tokens)
        ids_BR = buffers.ids_T[place_BR]
        inside_BR = index_R < limit_B[:, None]
        masked_BR = inside_BR & (ids_BR == self.mask_token_id)
        eos_BR = inside_BR & (ids_BR[..., None] == buffers.eos_E).any(-1)
        finite_B = choice.probability_M.isfinite().view_as(kept_BK).all(-1)
        finite_B = finite_B.long() & buffers.report_3B[2]
        buffers.report_3B.copy_(
            torch.stack([_first(masked_BR, index_R), _first(eos_BR, index_R), finite_B])
        )

    # -------------------------------------------------------------------------- on the host

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run a step made of these parts; `key` tells it from others on canvases of this shape."""
        self._decoded = None
        self.workspace.run((self.key, key), step)

    def report(self) -> tuple[list[int], list[int], list[bool]]:
        """Return each sequence's first mask and first EOS, if any, and whether all was finite."""
        gaps, ends, finite = self.buffers.report_3B.tolist()
        return gaps, ends, [bool(flag) for flag in finite]

    def decoded(self, row: int) -> Decoded:
        """A response as far as it is decoded."""
        if self._decoded is None:
            buffers, mask = self.buffers, self.mask_token_id
            ids_T, probability_T = buffers.ids_T.cpu(), buffers.probability_T.cpu()
            found_TA = buffers.alternatives_TA.cpu()
            self._decoded = [
                Decoded.read(ids_T[place], probability_T[place], found_TA[place], mask)
                for place in self._places()
            ]
        return self._decoded[row]

    def keep(self, rows: Sequence[int]) -> list[Kept]:
        """Return what another canvas needs to go on with these responses."""
        buffers, places, finite = self.buffers, self._places(), self.report()[2]
        return [
            Kept(
                ids_R=buffers.ids_T[places[row]].clone(),
                probability_R=buffers.probability_T[places[row]].clone(),
                alternatives_RA=buffers.alternatives_TA[places[row]].clone(),
                finite=finite[row],
            )
            for row in rows
        ]


def _first(flag_BR: Tensor, index_R: Tensor) -> Tensor:
    """Find each row's first flag that is set; beyond every position if none is: (B,)."""
    return index_R.where(flag_BR, _FAR).amin(-1)


class CanvasBatch(DecodingBatch):
    """A batch whose sequences lie on a canvas."""

    canvas: Canvas

    def decoded(self, row: int) -> Decoded:
        """The response of a sequence as far as it is decoded."""
        return self.canvas.decoded(row)

    def finite(self) -> list[bool]:
        """Say for each sequence whether all its logits so far were finite."""
        return self.canvas.report()[2]
