"""Algorithm 2 of the paper line by line: the oracle of the pipeline.

One sequence, plain Python state, no cache: every forward computes the prompt and all open blocks
under the block-causal mask. Slow and obvious on purpose; it shares no code with the pipeline but
the choice of a token, its probability and rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from d2f.decoding.alternatives import Alternatives, find_alternatives, read_alternatives
from d2f.decoding.batch import BlockState, BlockView, Decoded, DecodingBatch, RowRequest
from d2f.decoding.strategies import Options
from d2f.decoding.workspace import Workspace
from d2f.diffusion.layout import BlockLayout
from d2f.models.transformer import Transformer
from d2f.ops.sampling import CONFIDENCE_CODES, choose_tokens


@dataclass(kw_only=True, eq=False)
class Block(Decoded):
    """One block of the response."""

    state: BlockState = BlockState.SEMI_ACTIVE

    def __post_init__(self) -> None:
        self.probabilities = [None] * len(self.tokens)
        self.alternatives = [()] * len(self.tokens)

    @property
    def share(self) -> float:
        """Decoded share."""
        return sum(token is not None for token in self.tokens) / len(self.tokens)


class Candidate(NamedTuple):
    """The token that a forward proposes for one position."""

    token: int
    probability: float
    rank: float
    alternatives: Alternatives = ()


class ReferenceSequence(DecodingBatch):
    """Algorithm 2 on one prompt."""

    def __init__(
        self,
        model: Transformer,
        asked: Sequence[RowRequest],
        workspace: Workspace | None = None,
        options: Options | None = None,
    ) -> None:
        assert len(asked) == 1, "the oracle decodes one sequence at a time"
        super().__init__(asked)
        self.model, self.policy = model, self.settings.policy
        self.prompt, self.limit = list(self.settings.prompt), self.settings.max_new_tokens
        self.blocks: list[Block] = []
        self.eos_seen = False
        self.all_finite = True
        """Whether all probabilities were finite."""

    def step(self) -> None:
        """One pass of the algorithm's loop."""
        self._open_block()
        self._activate_blocks()
        candidates = self._forward()
        self._cache_blocks()
        self._accept(candidates)
        self._retire_blocks()
        self.done[0] = self._is_done()

    def _num_opened_tokens(self) -> int:
        return sum(len(block.tokens) for block in self.blocks)

    def _open_block(self) -> None:
        share = self.blocks[-1].share if self.blocks else 1.0
        live = sum(block.state is not BlockState.CACHED for block in self.blocks)
        window = self.policy.max_live_blocks
        room = self.limit - self._num_opened_tokens()
        if room <= 0 or self.eos_seen or share < self.policy.add_threshold:
            return
        if window is not None and live >= window:
            return
        self.blocks.append(Block(tokens=[None] * min(self.policy.block_size, room)))

    def _activate_blocks(self) -> None:
        share_before = 1.0
        for block in self.blocks:
            ready = share_before >= self.policy.activate_threshold
            if ready and block.state is BlockState.SEMI_ACTIVE:
                block.state = BlockState.FULLY_ACTIVE
            share_before = block.share

    def _forward(self) -> dict[tuple[int, int], Candidate]:
        """The candidate of every masked position, by (block, offset)."""
        mask = self.model.spec.mask_token_id
        assert mask is not None
        response = [token for block in self.blocks for token in block.tokens]
        ids = self.prompt + [mask if token is None else token for token in response]
        layout = BlockLayout(prompt_length=len(self.prompt), block_size=self.policy.block_size)
        with torch.inference_mode():
            ids_1L = torch.tensor([ids], device=self.model.device)
            logits_LV = self.model.logits(ids_1L, layout)[0]
        candidates: dict[tuple[int, int], Candidate] = {}
        for number, block in enumerate(self.blocks):
            for offset, token in enumerate(block.tokens):
                if token is None:
                    position = len(self.prompt) + number * self.policy.block_size + offset
                    candidates[number, offset] = self._choose(logits_LV[position], position)
        self.all_finite &= all(math.isfinite(found.probability) for found in candidates.values())
        live = sum(len(b.tokens) for b in self.blocks if b.state is not BlockState.CACHED)
        self.num_query_tokens[0] += live + (0 if self.num_forwards[0] else len(self.prompt))
        return candidates

    def _choose(self, logits_V: torch.Tensor, position: int) -> Candidate:
        key = (self.settings.seed, position, self.num_forwards[0])
        seed_1, position_1, step_1 = (torch.tensor([k], device=logits_V.device) for k in key)
        mask = self.model.spec.mask_token_id
        sampling = self.settings.sampling(seed_1, position_1, step_1)
        confidence_1 = None
        if self.policy.confidence != "probability":
            confidence_1 = torch.full_like(seed_1, CONFIDENCE_CODES[self.policy.confidence])
        choice = choose_tokens(
            logits_V[None],
            mask_token_id=mask,
            confidence_M=confidence_1,
            sampling=sampling,
        )
        alternatives: Alternatives = ()
        if self.settings.num_alternatives:
            count = min(self.settings.num_alternatives, len(logits_V))
            numbers_1A = find_alternatives(logits_V[None], count, mask, sampling)
            [alternatives] = read_alternatives(numbers_1A.cpu().numpy())
        token, probability, rank = (values_1.item() for values_1 in choice)
        return Candidate(int(token), probability, rank, alternatives)

    def _cache_blocks(self) -> None:
        for block in self.blocks:
            if block.state is BlockState.COMPLETE:
                block.state = BlockState.CACHED

    def _accept(self, candidates: dict[tuple[int, int], Candidate]) -> None:
        self.num_forwards[0] += 1
        # The pipeline compares in fp32, where the probability was computed.
        threshold = float(torch.tensor(self.policy.confidence_threshold, dtype=torch.float32))
        for number, block in enumerate(self.blocks):
            mine = {o: value for (n, o), value in candidates.items() if n == number}
            if not mine:
                continue
            chosen = [o for o, candidate in mine.items() if candidate.probability > threshold]
            if not chosen and block.state is BlockState.FULLY_ACTIVE:
                chosen = [max(mine, key=lambda o: mine[o].rank)]
            for offset in chosen:
                block.tokens[offset] = mine[offset].token
                block.probabilities[offset] = mine[offset].probability
                block.alternatives[offset] = mine[offset].alternatives
                self.eos_seen |= mine[offset].token in self.settings.eos_token_ids

    def _retire_blocks(self) -> None:
        for block in self.blocks:
            if block.share < 1:
                break
            if block.state is not BlockState.CACHED:
                block.state = BlockState.COMPLETE

    def _is_done(self) -> bool:
        if self.settings.early_stop:
            for block in self.blocks:
                for token in block.tokens:
                    if token is None:
                        return False
                    if token in self.settings.eos_token_ids:
                        return True
        all_decoded = all(block.share == 1 for block in self.blocks)
        return all_decoded and (self.eos_seen or self._num_opened_tokens() >= self.limit)

    def decoded(self, row: int) -> Decoded:
        """The response as far as it is decoded."""
        told = self.settings.num_alternatives > 0
        return Decoded(
            tokens=[token for block in self.blocks for token in block.tokens],
            probabilities=[one for block in self.blocks for one in block.probabilities],
            alternatives=[one for block in self.blocks for one in block.alternatives if told],
        )

    def finite(self) -> list[bool]:
        """Whether all logits so far were finite."""
        return [self.all_finite]

    def view(self, row: int) -> list[BlockView]:
        """The open blocks as they stand."""
        return [block.block(block.state) for block in self.blocks]
