"""Fast-dLLM's samplers: several tokens of a block at once, with approximate caches or without.

Shapes: B = 1 sequence, K positions of a block, T tokens of a forward, M = K positions, D hidden
size.

Block after block is decoded. `parallel` computes the whole sequence in each forward. The others do
so where a block begins, which already decodes tokens of it; further forwards compute from the
block's begin to the sequence's end (`prefix-cache`) or the block alone (`dual-cache`), and take the
keys and values of everything else as that first forward left them. As published, there is at least
one such forward for each block, even if the first one decoded all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from d2f.decoding.batch import BlockState, BlockView, RowRequest
from d2f.decoding.canvas import Block, Canvas, CanvasBatch
from d2f.decoding.strategies import FastOptions
from d2f.decoding.transfer import keep_above, keep_by_factor
from d2f.decoding.workspace import Workspace
from d2f.models.transformer import Transformer

THRESHOLD = 0.9


class FastBatch(CanvasBatch):
    """One sequence decoded in parallel within blocks.

    Args:
        model: The model; packed.
        asked: Of one sequence.
        workspace: Where buffers and captured steps are.
        options: With a threshold, predictions of at least this probability are kept, and the
            surest one. With a factor, the n surest predictions are kept for the largest n with
            (n + 1) (1 - the n-th probability) < factor, at least one.
    """

    cache: ClassVar[str | None] = None
    """The part of the sequence that is not computed again: None, "prefix" or "dual"."""

    def __init__(
        self,
        model: Transformer,
        asked: Sequence[RowRequest],
        workspace: Workspace,
        options: FastOptions,
    ) -> None:
        assert len(asked) == 1, "it decodes one sequence at a time"
        super().__init__(asked)
        self.workspace, self.limit = workspace, self.settings.max_new_tokens
        self.block_length = min(options.block_length, self.limit)
        self.factor = None if options.factor is None else float(options.factor)
        self.threshold = THRESHOLD if options.threshold is None else options.threshold
        self.gap = self.start = 0
        """Places in the response: of its first mask, and where the block that is decoded begins."""
        self.block_over = True
        """The next forward begins a block."""
        self.shift = int(model.spec.architecture.shifted)
        with torch.inference_mode():
            self.canvas = Canvas(model, asked, workspace, keeps_cache=self.cache is not None)
            self.start_1, self.boundary_1D = workspace.buffers(
                "fast",
                lambda: (
                    torch.zeros(1, device=model.device, dtype=torch.long),
                    torch.zeros(1, model.spec.hidden_size, device=model.device, dtype=model.dtype),
                ),
            )

    @torch.inference_mode()
    def step(self) -> None:
        """One forward, and the predictions it makes sure of."""
        size, length = self.block_length, self.canvas.counts[0]
        if self.cache is None or self.block_over:
            self.start = self.gap // size * size
            self._run("full", self._whole)
            computed = length
        elif self.cache == "prefix":
            computed = self.limit - self.start
            padded = min(self.workspace.padded(computed), self.canvas.num_tokens)
            self._run(("prefix", padded), lambda: self._part(padded))
        else:
            computed = min(size, self.limit - self.start)
            self._run("dual", lambda: self._part(size))
        gaps, ends, _ = self.canvas.report()
        self.num_forwards[0] += 1
        self.num_query_tokens[0] += computed
        [self.gap], [end] = gaps, ends
        self.block_over = self.gap >= self.start + size and (
            self.cache is None or not self.block_over
        )
        stops = self.settings.early_stop and end < self.gap
        self.done[0] = stops or (self.gap >= self.limit and self.block_over)

    def _run(self, kind: object, step: Callable[[], None]) -> None:
        rule = (self.threshold, self.factor, self.settings.filters)
        self.canvas.run(("fast", self.cache, kind, self.block_length, rule), step)

    # --------------------------------------------------------------------- parts of a step

    def _block(self) -> tuple[Block, Tensor, Tensor]:
        """The block that is decoded, and the absolute positions of its begin and end."""
        _, prompt_1, _, limit_1, _ = self.canvas.buffers.facts_5B.unbind()
        end_1 = torch.minimum(self.start_1 + self.block_length, limit_1)
        block = self.canvas.block(self.start_1, end_1, self.block_length)
        return block, prompt_1 + self.start_1, prompt_1 + end_1

    def _whole(self) -> None:
        gap_1, size = self.canvas.buffers.report_3B[0], self.block_length
        self.start_1.copy_(gap_1 // size * size)
        block, first_1, _ = self._block()
        hidden_TD = self.canvas.forward()
        if self.cache is not None and self.shift:
            # Further forwards do not compute what predicts the block's first token.
            self.boundary_1D.copy_(hidden_TD[(first_1 - 1).clamp_min(0)])
        self._keep(self.canvas.aligned(hidden_TD, block), block)

    def _part(self, num_tokens: int) -> None:
        block, first_1, end_1 = self._block()
        stop_1 = end_1 if self.cache == "dual" else self.canvas.buffers.facts_5B[2]
        hidden_TD = self.canvas.forward_part(first_1, stop_1, num_tokens)
        index_M = torch.arange(self.block_length, device=hidden_TD.device)
        aligned_MD = hidden_TD[(index_M - self.shift).clamp(0, num_tokens - 1)]
        if self.shift:
            # Position 0 has nothing before it.
            before_M1 = ((index_M == 0) & (first_1 > 0))[:, None]
            aligned_MD = torch.where(before_M1, self.boundary_1D, aligned_MD)
        self._keep(aligned_MD, block)

    def _keep(self, aligned_MD: Tensor, block: Block) -> None:
        choice, alternatives_MA = self.canvas.choose(aligned_MD, block)
        candidate_BK = block.candidate_BK
        probability_BK = choice.probability_M.view_as(candidate_BK)
        if self.factor is not None:
            kept_BK = keep_by_factor(candidate_BK, probability_BK, self.factor)
        else:
            kept_BK = keep_above(candidate_BK, probability_BK, self.threshold)
        self.canvas.take(block, choice, alternatives_MA, kept_BK)

    def view(self, row: int) -> list[BlockView]:
        """The blocks up to the one that is decoded."""
        decoded, views = self.canvas.decoded(row), []
        for start in range(0, min(self.gap + 1, self.limit), self.block_length):
            place = slice(start, start + self.block_length)
            active = None in decoded.tokens[place]
            state = BlockState.FULLY_ACTIVE if active else BlockState.COMPLETE
            views.append(decoded.block(state, place))
        return views


class PrefixCacheBatch(FastBatch):
    """`FastBatch` that computes from the block's begin to the sequence's end."""

    cache = "prefix"


class DualCacheBatch(FastBatch):
    """`FastBatch` that computes the block alone."""

    cache = "dual"
