"""Autoregressive decoding with a key/value cache: one token per forward.

Shapes: B rows, T packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2f.decoding.batch import BlockState, BlockView, decoded_prefix
from d2f.decoding.paged import PagedDecoder
from d2f.decoding.rows import HostRow, RowRequest, Rows, RowState
from d2f.decoding.step import StepShape, make_record


class AutoregressiveDecoder(PagedDecoder):
    """One token per row and step; the forward that reads the prompt yields the first.

    Blocks mean nothing here but where a token is stored.
    """

    one_token = True
    num_recomputed = 1  # The last token's hidden state is needed.

    def begin(self, row: HostRow, num_cached: int) -> tuple[RowState[int], list[bool]]:
        """All tokens so far are computed that are not cached, the last one in any case."""
        end = len(row.asked.prompt) + len(decoded_prefix(row.tokens))
        return row.state._replace(start=min(num_cached, end - 1), end=end), []

    def span(self, row: HostRow, ahead: int) -> tuple[int, int]:
        """Return a step's span; each step ahead appends one token, which the next one computes."""
        end = row.state.end + ahead
        return (end - 1 if ahead else row.state.start), min(end, row.longest)

    def num_candidates(self, row: HostRow) -> int:
        """Return 1: each step decodes one token."""
        return 1

    def growth(self, asked: RowRequest) -> int:
        """Return 1: each step moves the end by one token."""
        return 1

    def blocks(self, row: HostRow) -> list[BlockView]:
        """The decoded tokens as one block."""
        decoded = slice(len(decoded_prefix(row.tokens)))
        return [row.block(BlockState.CACHED, decoded)]

    def step(self, rows: Rows, shape: StepShape) -> Tensor:
        """Compute what is not cached, append one token."""
        packing = self.pack(rows, shape)
        hidden_TD = self.forward(packing)
        runs_B, counts_B = packing.runs_B, packing.packed.counts_B
        # Of a row that sits out this may be -1, which is some token all the same.
        last_B = packing.packed.starts_B + (counts_B - 1)
        row_B = torch.arange(shape.num_rows, device=last_B.device)
        size_B, end_B = rows.facts.size, rows.state.end
        choice, alternatives_MA = self.choose(hidden_TD[last_B], rows, shape, row_B, end_B, runs_B)

        index_B = end_B - rows.facts.prompt
        grid_BR = rows.tokens_BNK.flatten(1)
        unused_B = rows.tokens_BNK.shape[2] - size_B
        place_B1 = torch.addcmul(index_B, index_B // size_B, unused_B)[:, None]
        place_B1 = place_B1.clamp(0, grid_BR.shape[1] - 1)
        token_B1 = torch.where(
            runs_B[:, None], choice.token_M[:, None], grid_BR.gather(1, place_B1)
        )
        grid_BR.scatter_(1, place_B1, token_B1)

        next_B, ran_B = end_B + 1, runs_B.long()
        done_B = (token_B1 == rows.eos_BE).any(-1) | (next_B >= rows.facts.bound)
        rows.update(
            runs_B,
            rows.state._replace(
                done=done_B.long(),
                start=end_B,
                end=next_B,
                forwards=rows.state.forwards + ran_B,
                queries=rows.state.queries + counts_B,
            ),
        )
        return make_record(
            rows, ran_B, row_B, index_B, runs_B, choice.token_M, choice.probability_M,
            alternatives_MA,
        )  # fmt: skip
