"""Decoders on the paged cache: what they share, and pipelined parallel decoding (paper, section 4).

Shapes: B rows, T packed tokens, M candidates (positions that need a token), A alternatives,
N blocks of K positions, D hidden size. The rest as in `d2f.decoding.rows`.

A step packs the tokens that the rows have to compute, runs the model, chooses tokens for the
candidates and updates the rows. All of it are tensor operations of shapes that `StepShape` fixes,
so a step can be captured in a CUDA graph; nothing waits for the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from d2f.decoding import rules
from d2f.decoding.alternatives import choose_with_alternatives
from d2f.decoding.batch import BlockState, BlockView
from d2f.decoding.rows import UNBOUNDED, HostRow, RowRequest, Rows, RowState
from d2f.decoding.step import StepShape, make_record
from d2f.decoding.strategies import EntropyOptions
from d2f.errors import ConfigError
from d2f.models.cache import PagedCache
from d2f.models.transformer import Transformer
from d2f.ops.backend import Backend
from d2f.ops.packed import Candidates, Packing
from d2f.ops.sampling import Choice, Sampling

NO_CANDIDATE = -1.0
"""Stands where a probability would."""


class PagedDecoder(ABC):
    """A strategy on the paged cache; stateless, all state is in the rows and the cache.

    `step` runs on the device. The host plans a step before it has the results of the last one; the
    methods that take a `HostRow` or a `RowRequest` tell it what it needs to know for that.

    Args:
        model: The model, after `prepare_steps`.
        cache: Where keys and values live.
        backend: The operations.
        imposed: How many tokens each row accepts in its first, second, … forward, whatever the
            model says; the last number holds for all later ones. For measuring speed with random
            weights. None: the model decides.

    Raises:
        ConfigError: Acceptance is imposed on a decoder of one token per forward.
    """

    one_token: ClassVar[bool] = False
    """Each row gets one token in each step."""
    num_recomputed: ClassVar[int] = 0
    """Number of positions at the end of a cached prompt that are computed again all the same."""

    def __init__(
        self,
        model: Transformer,
        cache: PagedCache,
        backend: Backend,
        imposed: tuple[int, ...] | None = None,
    ) -> None:
        if imposed is not None and self.one_token:
            raise ConfigError("an autoregressive model accepts one token per forward; impose none")
        self.model, self.cache, self.backend = model, cache, backend
        self.imposed_F = None if imposed is None else torch.tensor(imposed, device=model.device)

    @abstractmethod
    def step(self, rows: Rows, shape: StepShape) -> Tensor:
        """Run one step; returns its record, which `read_record` takes apart."""

    @abstractmethod
    def begin(self, row: HostRow, num_cached: int) -> tuple[RowState[int], list[bool]]:
        """Return the state in which a row begins, and for each of its blocks if it is fully active.

        The keys and values of the first `num_cached` positions are in the cache already. A row that
        was interrupted goes on as it was: all else is computed again, decoded tokens included, so
        it meets the same keys and values as one that was not.
        """

    @abstractmethod
    def span(self, row: HostRow, ahead: int) -> tuple[int, int]:
        """Bounds of the positions that the next step computes: first, and end (exclusive).

        They hold whatever the `ahead` steps do that are not reported yet. If the row sits these
        out, the first position is still that of its state.
        """

    @abstractmethod
    def num_candidates(self, row: HostRow) -> int:
        """Positions that the next step needs a token for, if all steps are reported."""

    @abstractmethod
    def growth(self, asked: RowRequest) -> int:
        """Return the most positions by which a step may move the end of a row."""

    @abstractmethod
    def blocks(self, row: HostRow) -> list[BlockView]:
        """The response as it stands, for those who watch."""

    def threshold(self, asked: RowRequest) -> float:
        """Return the bound that the confidence of an accepted token exceeds."""
        return asked.policy.confidence_threshold

    def pack(self, rows: Rows, shape: StepShape) -> Packing:
        """The tokens that the rows have to compute, row after row."""
        return self.backend.pack_tokens(
            rows,
            num_tokens=shape.num_tokens,
            page_size=self.cache.page_size,
            max_count=shape.max_count,
            max_end=shape.max_end,
            prefill=shape.prefill,
            causal=self.model.spec.architecture.causal,
        )

    def forward(self, packing: Packing) -> Tensor:
        """Final hidden states of the packed tokens: (T, D)."""
        return self.model.forward_packed(packing.ids_T, packing.packed, self.cache, self.backend)

    def choose(
        self,
        aligned_MD: Tensor,
        rows: Rows,
        shape: StepShape,
        row_M: Tensor,
        position_M: Tensor,
        needed_M: Tensor | None,
    ) -> tuple[Choice, Tensor]:
        """Tokens for the candidates, with their probability and rank; and alternatives (M, A)."""

        def sampling(part: slice) -> Sampling | None:
            if not shape.sampled:
                return None
            row, facts, reals = row_M[part], rows.facts, rows.reals
            return Sampling(
                temperature_M=reals.temperature[row].float(),
                top_k_M=facts.top_k[row],
                top_p_M=reals.top_p[row].float(),
                seed_M=facts.seed[row],
                position_M=position_M[part],
                step_M=rows.state.forwards[row],
                truncated=shape.truncated,
                min_p_M=reals.min_p[row].float(),
            )

        spec = self.model.spec
        return choose_with_alternatives(
            aligned_MD,
            self.model,
            self.backend,
            mask_token_id=None if spec.architecture.causal else spec.mask_token_id,
            count=shape.num_alternatives,
            sampling=sampling,
            confidence_M=rows.facts.confidence[row_M] if shape.ranked else None,
            needed_M=needed_M,
        )


class PipelinedDecoder(PagedDecoder):
    """Algorithm 2 for all rows at once; `serial` is this with both block thresholds at 1.

    Each forward carries, of every row, the blocks that are open and not yet cached: COMPLETE ones,
    whose final tokens it turns into cache, and active ones, which it refines. A row's first forward
    also carries its prompt. Live blocks overwrite their keys and values at each step.
    """

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
        """Count the masked positions of open blocks."""
        return row.tokens[: row.state.opened * row.asked.policy.block_size].count(None)

    def growth(self, asked: RowRequest) -> int:
        """Return the length of a block."""
        return asked.policy.block_size

    def blocks(self, row: HostRow) -> list[BlockView]:
        """Return the open blocks."""
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
        """Return the one of the two that is compared with the row's threshold."""
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
        """Note after a step which rows are done, and plan what the next computes of the others."""
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
    """Say for each block of a response whether it is fully active."""
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
