"""Autoregressive decoding with a key/value cache: one token per forward.

Shapes: B sequences, L positions of the longest prompt, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
from d2f.ops.sampling import choose_tokens


class AutoregressiveBatch:
    """A batch decoded one token at a time; the prefill yields the first token."""

    def __init__(self, model: Transformer, sequences: Sequences) -> None:
        self.model, self.sequences = model, sequences
        device = model.device
        self.prompt_BL, self.length_B = pad_prompts(sequences.prompts, device)
        self.rows = list(range(len(sequences)))
        self.tokens: list[list[int]] = [[] for _ in self.rows]
        self.queries = [0] * len(self.rows)
        self.last_B = torch.zeros_like(self.length_B)
        self.done = [False] * len(self.rows)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.num_steps = 0
        self.cache = KVCache(
            model.spec,
            num_sequences=len(self.rows),
            num_slots=max(
                len(p) + n for p, n in zip(sequences.prompts, sequences.max_new_tokens, strict=True)
            ),
            device=device,
            dtype=model.dtype,
        )

    @torch.inference_mode()
    def step(self) -> None:
        """One forward: the prompts at first, then one token of each unfinished sequence."""
        hidden_BD = self._prefill() if self.num_steps == 0 else self._decode()
        logits_BV = self.model.head(hidden_BD)
        if self.sequences.temperature > 0:
            seed_B = torch.tensor(
                [self.sequences.seeds[r] for r in self.rows], device=logits_BV.device
            )
            step_B = torch.full_like(seed_B, self.num_steps)
            sampling = self.sequences.sampling(seed_B, self.length_B, step_B)
            self.last_B, best_B, _ = choose_tokens(logits_BV, mask_token_id=None, sampling=sampling)
        else:
            best_B, self.last_B = logits_BV.max(-1)
        self.finite = self.finite & best_B.isfinite().all()
        self.num_steps += 1
        for row, token in enumerate(self.last_B.tolist()):
            if not self.done[row]:
                self.tokens[row].append(token)
                ended = token in self.sequences.eos_token_ids
                limit = self.sequences.max_new_tokens[self.rows[row]]
                self.done[row] = ended or len(self.tokens[row]) >= limit

    def _prefill(self) -> Tensor:
        position_1L = torch.arange(self.prompt_BL.shape[1], device=self.prompt_BL.device)[None]
        inside_BL = position_1L < self.length_B[:, None]
        hidden_BLD = self.model(
            self.prompt_BL,
            position_1L,
            torch.where(inside_BL, position_1L, PADDING_BLOCK).to(torch.int32),
            cache=self.cache,
            slots_BL=torch.where(inside_BL, position_1L, -1),
            num_read_slots=self.prompt_BL.shape[1],
        )
        for row, length in enumerate(self.length_B.tolist()):
            self.queries[row] += length
        last_B11 = (self.length_B - 1)[:, None, None].expand(-1, -1, hidden_BLD.shape[-1])
        return hidden_BLD.gather(1, last_B11)[:, 0]

    def _decode(self) -> Tensor:
        # The token chosen last stands at `length_B`; a finished sequence writes nothing.
        position_B1 = self.length_B[:, None]
        blocks_B1, slots_B1 = position_B1, position_B1
        if any(self.done):
            done_B1 = torch.tensor(self.done, device=position_B1.device)[:, None]
            blocks_B1 = torch.where(done_B1, PADDING_BLOCK, position_B1)
            slots_B1 = torch.where(done_B1, -1, position_B1)
        longest = max(
            len(self.sequences.prompts[r]) + len(t)
            for r, t in zip(self.rows, self.tokens, strict=True)
        )
        hidden_B1D = self.model(
            self.last_B[:, None],
            position_B1,
            blocks_B1.to(torch.int32),
            cache=self.cache,
            slots_BL=slots_B1,
            num_read_slots=longest,
        )
        self.length_B = self.length_B + 1
        for row, done in enumerate(self.done):
            self.queries[row] += not done
        return hidden_B1D[:, 0]

    def finished(self) -> list[bool]:
        """Which sequences are done."""
        return list(self.done)

    def results(self, rows: list[int]) -> list[GenerationResult]:
        """The responses of finished sequences."""
        if rows:
            check_finite(self.finite)
        return [self._result(row) for row in rows]

    def _result(self, row: int) -> GenerationResult:
        token_ids, reason = cut_at_eos(self.tokens[row], self.sequences.eos_token_ids)
        return GenerationResult(
            token_ids=token_ids,
            num_forwards=len(token_ids),
            num_prefill_forwards=0,
            num_query_tokens=self.queries[row],
            finish_reason=reason,
        )

    def view(self, row: int) -> list[BlockView]:
        """All tokens so far as one cached block."""
        return [BlockView(state=BlockState.CACHED, token_ids=tuple(self.tokens[row]))]

    def select(self, rows: list[int]) -> None:
        """Go on with these sequences only."""
        index_M = torch.tensor(rows, device=self.model.device)
        self.length_B, self.last_B = self.length_B[index_M], self.last_B[index_M]
        for name in ("rows", "tokens", "queries", "done"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in rows])
        self.cache.select(index_M)
