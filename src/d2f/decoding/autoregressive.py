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
        last_B = (packing.packed.starts_B + counts_B - 1).clamp(0, shape.num_tokens - 1)
        row_B = torch.arange(shape.num_rows, device=last_B.device)
        choice = self.choose(hidden_TD[last_B], rows, shape, row_B, rows.end_B, runs_B)

        index_B = rows.end_B - rows.prompt_B
        block_size = rows.tokens_BNK.shape[2]
        block_B = index_B // rows.size_B
        grid_BR = rows.tokens_BNK.flatten(1)
        place_B1 = (block_B * (block_size - rows.size_B) + index_B)[:, None]
        place_B1 = place_B1.clamp(0, grid_BR.shape[1] - 1)
        token_B1 = torch.where(
            runs_B[:, None], choice.token_M[:, None], grid_BR.gather(1, place_B1)
        )
        grid_BR.scatter_(1, place_B1, token_B1)

        is_eos_B = (token_B1 == rows.eos_BE).any(-1)
        done_B = is_eos_B | (index_B + 1 >= rows.limit_B)
        rows.done_B.copy_(torch.where(runs_B, done_B.long(), rows.done_B))
        rows.start_B.copy_(torch.where(runs_B, rows.end_B, rows.start_B))
        rows.end_B.add_(runs_B)
        rows.forwards_B.add_(runs_B)
        rows.queries_B.add_(counts_B)
        return make_record(
            {
                "ran": runs_B,
                "done": rows.done_B,
                "opened": rows.opened_B,
                "complete": rows.complete_B,
                "start": rows.start_B,
                "end": rows.end_B,
                "forwards": rows.forwards_B,
                "queries": rows.queries_B,
                "finite": choice.probability_M.isfinite(),
            },
            {
                "row": torch.where(runs_B, row_B, -1),
                "index": index_B,
                "token": choice.token_M,
                "probability": choice.probability_M,
            },
        )
