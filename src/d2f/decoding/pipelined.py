"""Pipelined parallel decoding with an exact key/value cache (paper, section 4).

Shapes: B rows, T packed tokens, M candidates, N blocks of K positions, D hidden size.

Each forward carries, of every row, the blocks that are open and not yet cached: COMPLETE ones,
whose final tokens it turns into cache, and active ones, which it refines. A row's first forward
also carries its prompt. Live blocks overwrite their keys and values at each step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2f.decoding import rules
from d2f.decoding.paged import PagedDecoder, StepShape, make_record
from d2f.decoding.rows import UNBOUNDED, Rows, RowStart
from d2f.models.cache import PagedCache
from d2f.models.transformer import Transformer
from d2f.ops.backend import Backend
from d2f.ops.packed import Candidates, Packing
from d2f.ops.sampling import Choice

NO_CANDIDATE = -1.0
"""Stands where a probability would."""


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
            gap = start.tokens.index(None) if None in start.tokens else UNBOUNDED
            complete = min(gap // size, opened)
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
        choice, alternatives_MA = self.choose(
            self._aligned(hidden_TD, packing, rows, found),
            rows,
            shape,
            found.row_M,
            found.position_M,
            found.live_M,
        )
        if self.imposed_F is not None:
            choice = self._imposed(choice, rows, found)
        # Where the complete blocks end, which this forward has cached.
        cached_B = torch.addcmul(rows.prompt_B, rows.complete_B, rows.size_B)
        self._keep_boundary(hidden_TD, packing, rows, cached_B)

        # The candidates are the masked positions of open blocks in the rows that run.
        place_M = found.place_M
        probability_BNK = _scattered(choice.probability_M, place_M, rows, NO_CANDIDATE)
        rank_BNK = probability_BNK
        if shape.ranked:
            rank_BNK = _scattered(choice.rank_M, place_M, rows, NO_CANDIDATE)
        accepted_BNK = rules.accept(
            probability_BNK != NO_CANDIDATE,
            probability_BNK,
            rank_BNK,
            rows.fully_BN,
            confidence_threshold=rows.threshold_B[:, None, None],
        )
        token_BNK = _scattered(choice.token_M, place_M, rows)
        torch.where(accepted_BNK, token_BNK, rows.tokens_BNK, out=rows.tokens_BNK)
        ran_B = packing.runs_B.long()
        self._plan(rows, packing, ran_B, cached_B)
        at_M = place_M.clamp_max(accepted_BNK.numel() - 1)
        kept_M = found.live_M & accepted_BNK.flatten()[at_M]
        return make_record(
            rows, ran_B, found.row_M, found.response_M, kept_M, choice.token_M,
            choice.probability_M, alternatives_MA,
        )  # fmt: skip

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
        # Token 0 is the first of its row, so what stands for the one before it does not matter.
        before_MD = hidden_TD[index_M - 1]
        before_MD = torch.where(first_M1, rows.boundary_BD[found.row_M], before_MD)
        return torch.where(origin_M1, hidden_TD[index_M], before_MD)

    def _keep_boundary(
        self, hidden_TD: Tensor, packing: Packing, rows: Rows, cached_B: Tensor
    ) -> None:
        if rows.boundary_BD is None:
            return
        advance_B = cached_B - rows.start_B
        last_B = packing.packed.starts_B + advance_B - 1
        moved_B1 = (packing.runs_B & (advance_B > 0))[:, None]
        last_BD = hidden_TD[last_B.clamp(0, len(hidden_TD) - 1)]
        torch.where(moved_B1, last_BD, rows.boundary_BD, out=rows.boundary_BD)

    def _imposed(self, choice: Choice, rows: Rows, found: Candidates) -> Choice:
        """The choice with certainty for the first so many candidates of each row, for no others."""
        assert self.imposed_F is not None
        quota_B = self.imposed_F[rows.forwards_B.clamp_max(len(self.imposed_F) - 1)]
        sure_M = (found.number_M < quota_B[found.row_M]).float()
        return choice._replace(probability_M=sure_M, rank_M=sure_M)

    def _plan(self, rows: Rows, packing: Packing, ran_B: Tensor, cached_B: Tensor) -> None:
        """After a step: which rows are done, and what the next step computes of the others."""
        mask = self.model.spec.mask_token_id
        assert mask is not None
        decoded_BNK = rows.tokens_BNK != mask
        share_BN = rules.decoded_share(decoded_BNK, rows.length_BN)
        first_gap_B = torch.where(decoded_BNK, UNBOUNDED, rows.order_BNK).amin((1, 2))
        eos_BNKE = rows.tokens_BNK[..., None] == rows.eos_BE[:, None, None, :]
        order_BNKE = torch.where(eos_BNKE, rows.order_BNK[..., None], UNBOUNDED)
        first_eos_B = order_BNKE.amin((1, 2, 3))
        eos_seen_B = first_eos_B < UNBOUNDED
        # A block that opens has a mask, so none of those is complete.
        complete_B = rules.completed_blocks(first_gap_B, rows.opened_B, rows.size_B)
        idle_B = rules.idle(complete_B, rows.opened_B, rows.total_B, eos_seen_B)
        done_B = rules.finished(first_gap_B, first_eos_B, idle_B, early_stop=rows.early_stop_B)
        opened_B = rules.open_blocks(
            share_BN,
            rows.opened_B,
            rows.complete_B,
            rows.total_B,
            eos_seen_B,
            add_threshold=rows.add_B,
            max_live_blocks=rows.max_live_B,
        )
        fully_BN = rules.activate(
            share_BN, rows.fully_BN, activate_threshold=rows.activate_B[:, None]
        )
        end_B = torch.addcmul(rows.prompt_B, opened_B, rows.size_B)
        rows.update(
            packing.runs_B,
            done_B=done_B.long(),
            start_B=cached_B,
            end_B=torch.minimum(end_B, rows.bound_B),
            forwards_B=rows.forwards_B + ran_B,
            queries_B=rows.queries_B + packing.packed.counts_B,
            opened_B=opened_B,
            complete_B=complete_B,
        )
        torch.where(packing.runs_B[:, None], fully_BN, rows.fully_BN, out=rows.fully_BN)


def _scattered(values_M: Tensor, place_M: Tensor, rows: Rows, other: float | None = None) -> Tensor:
    """The values at their places of the grid, elsewhere `other`, or anything: (B, N, K)."""
    size = (rows.tokens_BNK.numel() + 1,)
    flat = values_M.new_empty(size) if other is None else values_M.new_full(size, other)
    return flat.scatter_(0, place_M, values_M)[:-1].view(rows.tokens_BNK.shape)


def _share_of(start: RowStart) -> Tensor:
    """Decoded share of each block of an interrupted response: (1, N)."""
    size, limit = start.policy.block_size, start.max_new_tokens
    blocks = [start.tokens[at : at + size] for at in range(0, limit, size)]
    shares = [sum(token is not None for token in block) / len(block) for block in blocks]
    return torch.tensor([shares], dtype=torch.double)
