"""Autoregressive decoding with a key/value cache: one token per forward.

Shapes: B rows, T packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2f.decoding.paged import PagedDecoder, StepShape, make_record
from d2f.decoding.rows import Rows, RowStart


class AutoregressiveDecoder(PagedDecoder):
    """One token per row and step; the forward that reads the prompt yields the first.

    Blocks mean nothing here but where a token is stored.
    """

    def begin(self, start: RowStart) -> tuple[dict[str, int], list[bool]]:
        """All tokens so far are computed that are not cached, the last one in any case."""
        end = len(start.prompt) + len(start.tokens)
        first = min(start.num_cached, end - 1)
        return {"opened": 0, "complete": 0, "start": first, "end": end}, []

    def step(self, rows: Rows, shape: StepShape) -> Tensor:
        """Compute what is not cached, append one token."""
        packing = self.pack(rows, shape)
        hidden_TD = self.forward(packing)
        runs_B, counts_B = packing.runs_B, packing.packed.counts_B
        # Of a row that sits out this may be -1, which is some token all the same.
        last_B = packing.packed.starts_B + (counts_B - 1)
        row_B = torch.arange(shape.num_rows, device=last_B.device)
        choice, alternatives_MA = self.choose(
            hidden_TD[last_B], rows, shape, row_B, rows.end_B, runs_B
        )

        index_B = rows.end_B - rows.prompt_B
        grid_BR = rows.tokens_BNK.flatten(1)
        unused_B = rows.tokens_BNK.shape[2] - rows.size_B
        place_B1 = torch.addcmul(index_B, index_B // rows.size_B, unused_B)[:, None]
        place_B1 = place_B1.clamp(0, grid_BR.shape[1] - 1)
        token_B1 = torch.where(
            runs_B[:, None], choice.token_M[:, None], grid_BR.gather(1, place_B1)
        )
        grid_BR.scatter_(1, place_B1, token_B1)

        end_B, ran_B = rows.end_B + 1, runs_B.long()
        done_B = (token_B1 == rows.eos_BE).any(-1) | (end_B >= rows.bound_B)
        rows.update(
            runs_B,
            done_B=done_B.long(),
            start_B=rows.end_B,
            end_B=end_B,
            forwards_B=rows.forwards_B + ran_B,
            queries_B=rows.queries_B + counts_B,
        )
        return make_record(
            rows, ran_B, row_B, index_B, runs_B, choice.token_M, choice.probability_M,
            alternatives_MA,
        )  # fmt: skip
