"""Pipelined parallel decoding with an exact key/value cache (paper, section 4).

Shapes: B rows, T packed tokens, M candidates, N blocks of K positions, D hidden size.

Each forward carries, of every row, the blocks that are open and not yet cached: COMPLETE ones, whose
final tokens it turns into cache, and active ones, which it refines. A row's first forward also
carries its prompt. Live blocks overwrite their keys and values at each step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2f.decoding import rules
from d2f.decoding.paged import PagedDecoder, StepShape, make_record
from d2f.decoding.rows import Rows, RowStart
from d2f.models.cache import PagedCache
from d2f.models.transformer import Transformer
from d2f.ops.backend import Backend
from d2f.ops.packed import Candidates, Packing
from d2f.ops.sampling import Choice


class PipelinedDecoder(PagedDecoder):
    """Algorithm 2 for all rows at once; `serial` is this with both block thresholds at 1.

    Args:
        model: A diffusion model, `pack`ed.
        cache: Where keys and values live.
        backend: The operations.
        imposed_F: How many tokens each row accepts in its forward f, whatever the model says; the
            last entry holds for all later ones. For measuring speed with random weights. None: the
            model decides.
    """

    def __init__(
        self,
        model: Transformer,
        cache: PagedCache,
        backend: Backend,
        imposed_F: Tensor | None = None,
    ) -> None:
        super().__init__(model, cache, backend)
        self.imposed_F = imposed_F

    def begin(self, start: RowStart) -> tuple[dict[str, int], list[bool]]:
        """A fresh sequence opens its first block; one that was interrupted goes on as it was.

        All that is not in the cache is computed again, decoded blocks included, so an interrupted
        sequence meets the same keys and values as one that was not.
        """
        size, prompt = start.policy.block_size, len(start.prompt)
        # What the rules give for a prompt, whose share is 1.
        opened, complete, fully = 1, 0, [True]
        if start.num_opened > 0:
            opened = start.num_opened
            share_1N = _share_of(start)
            fully_1N = rules.activate(
                share_1N,
                torch.zeros_like(share_1N, dtype=torch.bool),
                activate_threshold=start.policy.activate_threshold,
            )
            complete = int(rules.completed_blocks(share_1N, torch.tensor([opened])))
            fully = fully_1N[0].tolist()
        end = prompt + min(opened * size, start.max_new_tokens)
        values = {"opened": opened, "complete": complete, "start": start.num_cached, "end": end}
        return values, fully

    def step(self, rows: Rows, shape: StepShape) -> Tensor:
        """Refine all open blocks, accept tokens, then plan the next step."""
        packing = self.pack(rows, shape)
        hidden_TD = self.forward(packing)
        mask = self.model.spec.mask_token_id
        found = self.backend.find_candidates(
            packing, rows, mask_token_id=mask, num_candidates=shape.num_candidates
        )
        choice = self.choose(
            self._aligned(hidden_TD, packing, rows, found),
            rows,
            shape,
            found.row_M,
            found.position_M,
            found.live_M,
        )
        if self.imposed_F is not None:
            choice = self._imposed(choice, rows, found)
        advance_B = rows.prompt_B + rows.complete_B * rows.size_B - rows.start_B
        self._keep_boundary(hidden_TD, packing, rows, advance_B)

        valid_BNK = rows.valid_BNK()
        block_N = torch.arange(valid_BNK.shape[1], device=valid_BNK.device)
        open_BN1 = (block_N < rows.opened_B[:, None])[..., None]
        runs_B11 = packing.runs_B[:, None, None]
        masked_BNK = (rows.tokens_BNK == mask) & valid_BNK
        probability_BNK = _scattered(choice.probability_M, found.place_M, rows)
        accepted_BNK = rules.accept(
            masked_BNK & open_BN1 & runs_B11,
            probability_BNK,
            _scattered(choice.rank_M, found.place_M, rows) if shape.ranked else probability_BNK,
            rows.fully_BN,
            confidence_threshold=rows.threshold_B[:, None, None],
        )
        token_BNK = _scattered(choice.token_M, found.place_M, rows)
        rows.tokens_BNK.copy_(torch.where(accepted_BNK, token_BNK, rows.tokens_BNK))
        rows.forwards_B.add_(packing.runs_B)
        rows.queries_B.add_(packing.packed.counts_B)
        self._plan(rows, packing.runs_B, valid_BNK, masked_BNK & ~accepted_BNK)

        at_M = found.place_M.clamp_max(accepted_BNK.numel() - 1)
        kept_M = found.live_M & accepted_BNK.flatten()[at_M]
        return make_record(
            {
                "ran": packing.runs_B,
                "done": rows.done_B,
                "opened": rows.opened_B,
                "complete": rows.complete_B,
                "start": rows.start_B,
                "end": rows.end_B,
                "forwards": rows.forwards_B,
                "queries": rows.queries_B,
                "finite": probability_BNK.isfinite().flatten(1).all(-1),
            },
            {
                "row": torch.where(kept_M, found.row_M, -1),
                "index": found.response_M,
                "token": choice.token_M,
                "probability": choice.probability_M,
            },
        )

    def _aligned(
        self, hidden_TD: Tensor, packing: Packing, rows: Rows, found: Candidates
    ) -> Tensor:
        index_M = found.index_M
        if rows.boundary_BD is None:
            return hidden_TD[index_M]
        # The state of the position before; of a row's first token that is the kept one, and
        # position 0 has none before it but its own, as in `Transformer.align`.
        first_M1 = (index_M == packing.packed.starts_B[found.row_M])[:, None]
        origin_M1 = (found.position_M == 0)[:, None]
        before_MD = hidden_TD[(index_M - 1).clamp_min(0)]
        before_MD = torch.where(first_M1, rows.boundary_BD[found.row_M], before_MD)
        return torch.where(origin_M1, hidden_TD[index_M], before_MD)

    def _keep_boundary(
        self, hidden_TD: Tensor, packing: Packing, rows: Rows, advance_B: Tensor
    ) -> None:
        if rows.boundary_BD is None:
            return
        last_B = packing.packed.starts_B + advance_B - 1
        moved_B1 = (packing.runs_B & (advance_B > 0))[:, None]
        last_BD = hidden_TD[last_B.clamp(0, len(hidden_TD) - 1)]
        rows.boundary_BD.copy_(torch.where(moved_B1, last_BD, rows.boundary_BD))

    def _imposed(self, choice: Choice, rows: Rows, found: Candidates) -> Choice:
        """The choice with certainty for the first so many candidates of each row, for no others."""
        assert self.imposed_F is not None
        quota_B = self.imposed_F[rows.forwards_B.clamp_max(len(self.imposed_F) - 1)]
        sure_M = (found.number_M < quota_B[found.row_M]).float()
        return choice._replace(probability_M=sure_M, rank_M=sure_M)

    def _plan(self, rows: Rows, runs_B: Tensor, valid_BNK: Tensor, masked_BNK: Tensor) -> None:
        """After a step: which rows are done, and what the next step computes of the others."""
        eos_BNKE = rows.tokens_BNK[..., None] == rows.eos_BE[:, None, None, :]
        is_eos_BNK = eos_BNKE.any(-1) & valid_BNK
        eos_seen_B = is_eos_BNK.flatten(1).any(-1)
        decoded_BNK = valid_BNK & ~masked_BNK
        share_BN = rules.decoded_share(decoded_BNK, valid_BNK)
        waiting_B = rules.waiting(masked_BNK, rows.opened_B)
        idle_B = ~waiting_B & (eos_seen_B | (rows.opened_B >= rows.total_B))
        # Positions that no response has are no gaps.
        done_B = rules.finished(
            ~masked_BNK.flatten(1),
            is_eos_BNK.flatten(1),
            idle_B,
            early_stop=rows.early_stop_B > 0,
        )
        cached_B = rows.complete_B
        opened_B = rules.open_blocks(
            share_BN,
            rows.opened_B,
            cached_B,
            rows.total_B,
            eos_seen_B,
            add_threshold=rows.add_B,
            max_live_blocks=rows.max_live_B,
        )
        fully_BN = rules.activate(
            share_BN, rows.fully_BN, activate_threshold=rows.activate_B[:, None]
        )
        start_B = rows.prompt_B + cached_B * rows.size_B
        end_B = rows.prompt_B + torch.minimum(opened_B * rows.size_B, rows.limit_B)
        complete_B = rules.completed_blocks(share_BN, opened_B)
        for old_B, new_B in (
            (rows.start_B, start_B),
            (rows.end_B, end_B),
            (rows.complete_B, complete_B),
            (rows.opened_B, opened_B),
            (rows.done_B, done_B.long()),
        ):
            # A row that sat out is planned already.
            old_B.copy_(torch.where(runs_B, new_B, old_B))
        rows.fully_BN.copy_(torch.where(runs_B[:, None], fully_BN, rows.fully_BN))


def _scattered(values_M: Tensor, place_M: Tensor, rows: Rows) -> Tensor:
    """The values at their places of the grid, 0 elsewhere: (B, N, K)."""
    flat = values_M.new_zeros(rows.tokens_BNK.numel() + 1)
    return flat.scatter_(0, place_M, values_M)[:-1].view(rows.tokens_BNK.shape)


def _share_of(start: RowStart) -> Tensor:
    """Decoded share of each block of an interrupted response: (1, N)."""
    size, limit = start.policy.block_size, start.max_new_tokens
    blocks = [start.tokens[at : at + size] for at in range(0, limit, size)]
    shares = [sum(token is not None for token in block) / len(block) for block in blocks]
    return torch.tensor([shares], dtype=torch.double)
