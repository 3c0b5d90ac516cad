"""Pipelined parallel decoding with an exact key/value cache (paper, section 4).

Shapes: B sequences, N blocks of the longest response, K block size, R = N * K response positions,
L tokens of a forward, M positions that need logits.

Each forward carries, of every sequence, the blocks that are open and not yet cached: COMPLETE ones,
whose final tokens it turns into cache, and active ones, which it refines. The first also carries
the prompt. Slots are positions: live blocks overwrite their slots at each step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2f.decoding import rules
from d2f.decoding.batch import (
    BlockState,
    BlockView,
    GenerationResult,
    Sequences,
    check_finite,
    cut_at_eos,
    pad_prompts,
)
from d2f.diffusion.layout import PADDING_BLOCK
from d2f.models.cache import KVCache
from d2f.models.transformer import Transformer
from d2f.ops.sampling import Choice, choose_tokens


class PipelinedBatch:
    """A batch decoded by the pipeline; `serial` is this with both block thresholds at 1."""

    def __init__(self, model: Transformer, sequences: Sequences) -> None:
        spec, device = model.spec, model.device
        assert spec.mask_token_id is not None
        self.model, self.policy, self.sequences = model, sequences.policy, sequences
        self.prompt_BL, self.prompt_length_B = pad_prompts(sequences.prompts, device)
        size = self.policy.block_size
        limit_B = torch.tensor(sequences.max_new_tokens, device=device)
        self.limit_B = limit_B
        self.total_B = (limit_B + size - 1) // size
        num_blocks = int(self.total_B.max())
        response_R = torch.arange(num_blocks * size, device=device)
        self.valid_BR = response_R < limit_B[:, None]
        self.tokens_BR = torch.full_like(self.valid_BR, spec.mask_token_id, dtype=torch.long)
        zero_B = torch.zeros_like(limit_B)
        self.opened_B, self.cached_B = zero_B, zero_B
        # Position of the first token that is not cached: the prompt's first, then a block's.
        self.start_B = zero_B
        self.fully_BN = torch.zeros(len(sequences), num_blocks, dtype=torch.bool, device=device)
        self.eos_seen_B = zero_B.bool()
        self.seed_B = torch.tensor(sequences.seeds, device=device)
        self.forwards_B, self.queries_B = zero_B, zero_B
        self.done_B = zero_B.bool()
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.eos_E = torch.tensor(sequences.eos_token_ids, dtype=torch.long, device=device)
        self.cache = KVCache(
            spec,
            num_sequences=len(sequences),
            num_slots=int((self.prompt_length_B + limit_B).max()),
            device=device,
            dtype=model.dtype,
        )

    @torch.inference_mode()
    def step(self) -> None:
        """Open and activate blocks, run one forward, accept tokens, retire blocks."""
        share_BN = self._share()
        self.opened_B = rules.open_blocks(
            share_BN,
            self.opened_B,
            self.cached_B,
            self.total_B,
            self.eos_seen_B,
            add_threshold=self.policy.add_threshold,
            max_live_blocks=self.policy.max_live_blocks,
        )
        self.fully_BN = rules.activate(
            share_BN, self.fully_BN, activate_threshold=self.policy.activate_threshold
        )
        complete_B = rules.completed_blocks(share_BN, self.opened_B)
        token_BR, confidence_BR, rank_BR, candidate_BR = self._forward(complete_B)
        self.cached_B = complete_B
        accepted_BNK = rules.accept(
            self._grid(candidate_BR),
            self._grid(confidence_BR),
            self._grid(rank_BR),
            self.fully_BN,
            confidence_threshold=self.policy.confidence_threshold,
        )
        accepted_BR = accepted_BNK.flatten(1)
        self.tokens_BR = torch.where(accepted_BR, token_BR, self.tokens_BR)
        self.eos_seen_B = self.eos_seen_B | (accepted_BR & self._is_eos()).any(-1)
        self.forwards_B = self.forwards_B + ~self.done_B
        self.done_B = self.done_B | self._finished()

    def _forward(self, complete_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One model call; candidates, probability and rank, and where there are any: (B, R)."""
        size, prompt_B = self.policy.block_size, self.prompt_length_B
        end_B = prompt_B + torch.minimum(self.opened_B * size, self.limit_B)
        count_B = torch.where(self.done_B, 0, end_B - self.start_B)
        self.queries_B = self.queries_B + count_B
        num_tokens, num_read_slots = torch.stack([count_B.max(), end_B.max()]).tolist()

        position_BL = self.start_B[:, None] + torch.arange(num_tokens, device=end_B.device)
        inside_BL = position_BL < (self.start_B + count_B)[:, None]
        response_BL = position_BL - prompt_B[:, None]
        index_BL = response_BL.clamp(0, self.tokens_BR.shape[1] - 1)
        ids_BL = self.tokens_BR.gather(1, index_BL)
        if self.prompt_BL.shape[1] > 0:
            prompt_index_BL = position_BL.clamp_max(self.prompt_BL.shape[1] - 1)
            ids_BL = torch.where(response_BL < 0, self.prompt_BL.gather(1, prompt_index_BL), ids_BL)
        block_BL = (response_BL.div(size, rounding_mode="floor") + 1).clamp_min(0)
        block_BL = torch.where(inside_BL, block_BL, PADDING_BLOCK).to(torch.int32)

        hidden_BLD = self.model(
            ids_BL,
            position_BL,
            block_BL,
            cache=self.cache,
            slots_BL=torch.where(inside_BL, position_BL, -1),
            num_read_slots=num_read_slots,
        )
        aligned_BLD = self.model.align(hidden_BLD, position_BL, self.cache)
        start_B = prompt_B + complete_B * size
        self.cache.keep_boundary(hidden_BLD, torch.where(self.done_B, 0, start_B - self.start_B))
        self.start_B = start_B

        masked_BR = (self.tokens_BR == self.model.spec.mask_token_id) & self.valid_BR
        needed_BL = inside_BL & (response_BL >= 0) & masked_BR.gather(1, index_BL)
        row_M, column_M = needed_BL.nonzero(as_tuple=True)
        token_M, confidence_M, rank_M = self._choose(
            self.model.head(aligned_BLD[row_M, column_M]), row_M, position_BL[row_M, column_M]
        )
        self.finite = self.finite & confidence_M.isfinite().all()
        at_M = (row_M, index_BL[row_M, column_M])
        candidate_BR = torch.zeros_like(masked_BR).index_put_(at_M, torch.ones_like(row_M).bool())
        confidence_BR = torch.zeros_like(masked_BR, dtype=torch.float32)
        return (
            self.tokens_BR.index_put(at_M, token_M),
            confidence_BR.index_put(at_M, confidence_M),
            confidence_BR.index_put(at_M, rank_M),
            candidate_BR,
        )

    def _choose(self, logits_MV: Tensor, row_M: Tensor, position_M: Tensor) -> Choice:
        seed_M, step_M = self.seed_B[row_M], self.forwards_B[row_M]
        return choose_tokens(
            logits_MV,
            mask_token_id=self.model.spec.mask_token_id,
            confidence_M=self.sequences.confidence(seed_M),
            sampling=self.sequences.sampling(seed_M, position_M, step_M),
        )

    def _grid(self, x_BR: Tensor) -> Tensor:
        return x_BR.unflatten(1, (-1, self.policy.block_size))

    def _decoded(self) -> Tensor:
        return (self.tokens_BR != self.model.spec.mask_token_id) & self.valid_BR

    def _is_eos(self) -> Tensor:
        return torch.isin(self.tokens_BR, self.eos_E) & self.valid_BR

    def _share(self) -> Tensor:
        return rules.decoded_share(self._grid(self._decoded()), self._grid(self.valid_BR))

    def _finished(self) -> Tensor:
        decoded_BR = self._decoded()
        opened_BR = (
            torch.arange(decoded_BR.shape[1], device=decoded_BR.device)
            < (self.opened_B * self.policy.block_size)[:, None]
        )
        waiting_B = (opened_BR & self.valid_BR & ~decoded_BR).any(-1)
        no_more_B = self.eos_seen_B | (self.opened_B >= self.total_B)
        return rules.finished(
            decoded_BR,
            self._is_eos(),
            ~waiting_B & no_more_B,
            early_stop=self.sequences.early_stop,
        )

    def finished(self) -> list[bool]:
        """Which sequences are done."""
        return self.done_B.tolist()

    def results(self, rows: list[int]) -> list[GenerationResult]:
        """The responses of finished sequences."""
        if not rows:
            return []
        check_finite(self.finite)
        index_M = torch.tensor(rows, device=self.tokens_BR.device)
        count_B = torch.minimum(self.opened_B * self.policy.block_size, self.limit_B)
        figures_B3 = torch.stack([count_B, self.forwards_B, self.queries_B], dim=1)
        results = []
        for tokens, (count, forwards, queries) in zip(
            self.tokens_BR[index_M].tolist(), figures_B3[index_M].tolist(), strict=True
        ):
            token_ids, reason = cut_at_eos(tokens[:count], self.sequences.eos_token_ids)
            results.append(
                GenerationResult(
                    token_ids=token_ids,
                    num_forwards=forwards,
                    num_prefill_forwards=0,
                    num_query_tokens=queries,
                    finish_reason=reason,
                )
            )
        return results

    def view(self, row: int) -> list[BlockView]:
        """The open blocks of a sequence as they stand."""
        mask, cached = self.model.spec.mask_token_id, int(self.cached_B[row])
        share_N, fully_N = self._share()[row].tolist(), self.fully_BN[row].tolist()
        complete = int(rules.completed_blocks(self._share(), self.opened_B)[row])
        grid_NK, valid_NK = self._grid(self.tokens_BR)[row], self._grid(self.valid_BR)[row]
        views = []
        for index in range(int(self.opened_B[row])):
            state = BlockState.SEMI_ACTIVE
            if index < cached:
                state = BlockState.CACHED
            elif index < complete:
                state = BlockState.COMPLETE
            elif fully_N[index] or share_N[index] >= 1:
                state = BlockState.FULLY_ACTIVE
            tokens = grid_NK[index][valid_NK[index]].tolist()
            views.append(
                BlockView(state=state, token_ids=tuple(None if t == mask else t for t in tokens))
            )
        return views

    def select(self, rows: list[int]) -> None:
        """Go on with these sequences only."""
        index_M = torch.tensor(rows, device=self.model.device)
        for name in (
            "prompt_BL", "prompt_length_B", "limit_B", "total_B", "valid_BR", "tokens_BR",
            "opened_B", "cached_B", "start_B", "fully_BN", "eos_seen_B", "seed_B",
            "forwards_B", "queries_B", "done_B",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name)[index_M])
        self.cache.select(index_M)
