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
from d2f.decoding.batch import BlockState, BlockView
from d2f.decoding.paged import PagedDecoder, StepShape, make_record
from d2f.decoding.rows import UNBOUNDED, HostRow, RowRequest, Rows, RowState
from d2f.decoding.strategies import EntropyOptions
from d2f.ops.packed import Candidates, Packing
from d2f.ops.sampling import Choice

NO_CANDIDATE = -1.0
"""Stands where a probability would."""


class PipelinedDecoder(PagedDecoder):
    """Algorithm 2 for all rows at once; `serial` is this with both block thresholds at 1."""

    def begin(self, row: HostRow, num_cached: int) -> tuple[RowState[int], list[bool]]:
        """A fresh sequence opens its first block: the share of a prompt is 1."""
        asked, opened, complete, fully = row.asked, 1, 0, [True]
        size = asked.policy.block_size
        if row.state.forwards > 0:
            opened, fully = row.state.opened, _fully_active(row)
            gap = row.tokens.index(None) if None in row.tokens else UNBOUNDED
            complete = min(gap // size, opened)
        end = len(asked.prompt) + min(opened * size, asked.max_new_tokens)
        state = row.state._replace(start=num_cached, end=end, opened=opened, complete=complete)
        return state, fully

    def span(self, row: HostRow, ahead: int) -> tuple[int, int]:
        """Each step ahead may open one more block, and caches all that are complete."""
        asked, state = row.asked, row.state
        size, prompt = asked.policy.block_size, len(asked.prompt)
        response = min((state.opened + ahead) * size, asked.max_new_tokens)
        start = max(state.start, prompt + state.complete * size) if ahead else state.start
        return start, max(prompt + response, state.end)

    def num_candidates(self, row: HostRow) -> int:
        """Masked positions of open blocks."""
        return row.tokens[: row.state.opened * row.asked.policy.block_size].count(None)

    def growth(self, asked: RowRequest) -> int:
        """A block."""
        return asked.policy.block_size

    def blocks(self, row: HostRow) -> list[BlockView]:
        """The open blocks."""
        state, size = row.state, row.asked.policy.block_size
        if not state.opened:
            return []
        fully, cached = _fully_active(row), (state.start - len(row.asked.prompt)) // size
        views = []
        for index in range(state.opened):
            place = slice(index * size, (index + 1) * size)
            if index < cached:
                block_state = BlockState.CACHED
            elif index < state.complete:
                block_state = BlockState.COMPLETE
            elif fully[index] or None not in row.tokens[place]:
                block_state = BlockState.FULLY_ACTIVE
            else:
                block_state = BlockState.SEMI_ACTIVE
            views.append(row.block(block_state, place))
        return views

    def confidence(self, probability_BNK: Tensor, rank_BNK: Tensor) -> Tensor:
        """Which of the two is compared with the row's threshold."""
        return probability_BNK

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
        cached_B = torch.addcmul(rows.facts.prompt, rows.state.complete, rows.facts.size)
        self._keep_boundary(hidden_TD, packing, rows, cached_B)

        # The candidates are the masked positions of open blocks in the rows that run.
        place_M = found.place_M
        probability_BNK = _scattered(choice.probability_M, place_M, rows, NO_CANDIDATE)
        rank_BNK = probability_BNK
        if shape.ranked:
            rank_BNK = _scattered(choice.rank_M, place_M, rows, NO_CANDIDATE)
        accepted_BNK = rules.accept(
            probability_BNK != NO_CANDIDATE,
            self.confidence(probability_BNK, rank_BNK),
            rank_BNK,
            rows.fully_BN,
            confidence_threshold=rows.reals.threshold[:, None, None],
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
        advance_B = cached_B - rows.state.start
        last_B = packing.packed.starts_B + advance_B - 1
        moved_B1 = (packing.runs_B & (advance_B > 0))[:, None]
        last_BD = hidden_TD[last_B.clamp(0, len(hidden_TD) - 1)]
        torch.where(moved_B1, last_BD, rows.boundary_BD, out=rows.boundary_BD)

    def _imposed(self, choice: Choice, rows: Rows, found: Candidates) -> Choice:
        """The choice with certainty for the first so many candidates of each row, for no others."""
        assert self.imposed_F is not None
        quota_B = self.imposed_F[rows.state.forwards.clamp_max(len(self.imposed_F) - 1)]
        sure_M = (found.number_M < quota_B[found.row_M]).float()
        return choice._replace(probability_M=sure_M, rank_M=sure_M)

    def _plan(self, rows: Rows, packing: Packing, ran_B: Tensor, cached_B: Tensor) -> None:
        """After a step: which rows are done, and what the next step computes of the others."""
        mask = self.model.spec.mask_token_id
        assert mask is not None
        facts, state, reals = rows.facts, rows.state, rows.reals
        decoded_BNK = rows.tokens_BNK != mask
        share_BN = rules.decoded_share(decoded_BNK, rows.length_BN)
        first_gap_B = torch.where(decoded_BNK, UNBOUNDED, rows.order_BNK).amin((1, 2))
        eos_BNKE = rows.tokens_BNK[..., None] == rows.eos_BE[:, None, None, :]
        order_BNKE = torch.where(eos_BNKE, rows.order_BNK[..., None], UNBOUNDED)
        first_eos_B = order_BNKE.amin((1, 2, 3))
        eos_seen_B = first_eos_B < UNBOUNDED
        # A block that opens has a mask, so none of those is complete.
        complete_B = rules.completed_blocks(first_gap_B, state.opened, facts.size)
        idle_B = rules.idle(complete_B, state.opened, facts.total, eos_seen_B)
        done_B = rules.finished(first_gap_B, first_eos_B, idle_B, early_stop=facts.early_stop)
        opened_B = rules.open_blocks(
            share_BN,
            state.opened,
            state.complete,
            facts.total,
            eos_seen_B,
            add_threshold=reals.add,
            max_live_blocks=facts.max_live,
        )
        fully_BN = rules.activate(
            share_BN, rows.fully_BN, activate_threshold=reals.activate[:, None]
        )
        end_B = torch.addcmul(facts.prompt, opened_B, facts.size)
        rows.update(
            packing.runs_B,
            RowState(
                done=done_B.long(),
                start=cached_B,
                end=torch.minimum(end_B, facts.bound),
                forwards=state.forwards + ran_B,
                queries=state.queries + packing.packed.counts_B,
                opened=opened_B,
                complete=complete_B,
            ),
        )
        torch.where(packing.runs_B[:, None], fully_BN, rows.fully_BN, out=rows.fully_BN)


class EntropyDecoder(PipelinedDecoder):
    """The pipeline with entropy acceptance.

    A token is accepted when the entropy of the distribution that it was chosen from is below a
    threshold; where a block must accept one, it is that of the lowest entropy. The distribution
    counts the mask token, as `choose_tokens` says.
    """

    def threshold(self, asked: RowRequest) -> float:
        """A negative entropy, as ranks are."""
        assert isinstance(asked.options, EntropyOptions)
        return -asked.options.threshold

    def confidence(self, probability_BNK: Tensor, rank_BNK: Tensor) -> Tensor:
        """The rank, which the policy of this strategy makes the negative entropy."""
        return rank_BNK

    def _imposed(self, choice: Choice, rows: Rows, found: Candidates) -> Choice:
        choice = super()._imposed(choice, rows, found)
        return choice._replace(rank_M=choice.rank_M.log())


def _scattered(values_M: Tensor, place_M: Tensor, rows: Rows, other: float | None = None) -> Tensor:
    """The values at their places of the grid, elsewhere `other`, or anything: (B, N, K)."""
    size = (rows.tokens_BNK.numel() + 1,)
    flat = values_M.new_empty(size) if other is None else values_M.new_full(size, other)
    return flat.scatter_(0, place_M, values_M)[:-1].view(rows.tokens_BNK.shape)


def _fully_active(row: HostRow) -> list[bool]:
    """Which blocks of a response are fully active."""
    size, limit = row.asked.policy.block_size, row.asked.max_new_tokens
    blocks = [row.tokens[at : at + size] for at in range(0, limit, size)]
    shares = [(len(block) - block.count(None)) / len(block) for block in blocks]
    share_1N = torch.tensor([shares], dtype=torch.double)
    fully_1N = rules.activate(
        share_1N,
        torch.zeros_like(share_1N, dtype=torch.bool),
        activate_threshold=row.asked.policy.activate_threshold,
    )
    return fully_1N[0].tolist()
