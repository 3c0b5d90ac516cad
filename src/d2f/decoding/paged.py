"""One decoding step over the paged cache, for all rows at once.

Shapes: B rows, T packed tokens, M candidates (positions that need a token), D hidden size,
V vocabulary, A alternatives. The rest as in `d2f.decoding.rows`.

A step packs the tokens that the rows have to compute, runs the model, chooses tokens for the
candidates and updates the rows. All of it are tensor operations of shapes that `StepShape` fixes,
so a step can be captured in a CUDA graph; nothing waits for the host.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2f.decoding.alternatives import (
    Alternatives,
    choose_with_alternatives,
    read_alternatives,
)
from d2f.decoding.batch import BlockView
from d2f.decoding.rows import HostRow, RowRequest, Rows, RowState
from d2f.errors import ConfigError
from d2f.models.cache import PagedCache
from d2f.models.transformer import Transformer
from d2f.ops.backend import Backend
from d2f.ops.packed import Packing
from d2f.ops.sampling import Choice, Sampling


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The sizes of a step, known on the host before it runs."""

    num_rows: int
    """B."""
    num_tokens: int
    """T. Rows whose tokens do not fit any more sit this step out, the last ones first."""
    num_candidates: int
    """M."""
    max_count: int
    """Most tokens of a row; one that has more sits this step out."""
    max_end: int
    """Last position of any row, exclusive."""
    prefill: bool = False
    """Some row computes its prompt."""
    sampled: bool = False
    """Some row has a temperature."""
    truncated: bool = False
    """Some row samples with top-k, top-p or min-p."""
    ranked: bool = False
    """Some row ranks the forced token by something else than its probability."""
    num_alternatives: int = 0
    """A: how many of the most probable tokens of each candidate are reported; 0: no row asks."""


RECORD_TOKENS = ("row", "place", "token", "probability")
"""What a step reports of each candidate: its row, its place in the response, its token (-1: not
accepted) and the bits of its probability."""


class TokenRecord(NamedTuple):
    """One accepted token."""

    place: int
    """In the response."""
    token: int
    probability: float
    alternatives: Alternatives = ()


@dataclass(kw_only=True)
class RowRecord:
    """What a step reports of one row."""

    ran: bool
    state: RowState[int]
    """For the next forward."""
    finite: bool = True
    """All probabilities are."""
    tokens: list[TokenRecord] = field(default_factory=list)
    """The accepted ones."""


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
    """How many positions at the end of a prompt that is cached are computed again all the same."""

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
        """Where a row begins, and which of its blocks are fully active.

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
        """By how many positions a step may move the end of a row."""

    @abstractmethod
    def blocks(self, row: HostRow) -> list[BlockView]:
        """The response as it stands, for those who watch."""

    def threshold(self, asked: RowRequest) -> float:
        """What the confidence of an accepted token exceeds."""
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


def make_record(
    rows: Rows,
    ran_B: Tensor,
    row_M: Tensor,
    index_M: Tensor,
    kept_M: Tensor,
    token_M: Tensor,
    probability_M: Tensor,
    alternatives_MA: Tensor,
) -> Tensor:
    """One int64 tensor of what a step reports: the rows' state and the accepted tokens."""
    bits_M = probability_M.view(torch.int32).long()
    reported_M = torch.where(kept_M, token_M, -1)
    told = [ran_B, rows.state_FB.flatten(), row_M, index_M, reported_M, bits_M]
    return torch.cat([*told, alternatives_MA.flatten()])


def read_record(record: Tensor, num_rows: int, num_alternatives: int = 0) -> list[RowRecord]:
    """A record on the host, row by row."""
    num_values = 1 + len(RowState._fields)
    cut = num_values * num_rows
    # numpy does the little there is to do in a third of the time.
    values = record.numpy()
    columns = values[:cut].reshape(num_values, num_rows).T.tolist()
    rows = [RowRecord(ran=bool(ran), state=RowState(*state)) for ran, *state in columns]
    count = (len(values) - cut) // (len(RECORD_TOKENS) + num_alternatives)
    rest = cut + len(RECORD_TOKENS) * count
    tokens_FM = values[cut:rest].reshape(len(RECORD_TOKENS), count)
    probability_M = tokens_FM[3].astype(np.int32).view(np.float32)
    for row in tokens_FM[0, ~np.isfinite(probability_M)].tolist():
        rows[row].finite = False
    accepted = np.flatnonzero(tokens_FM[2] >= 0)
    columns = [*tokens_FM[1:3, accepted].tolist(), probability_M[accepted].tolist()]
    if num_alternatives:
        columns.append(read_alternatives(values[rest:].reshape(count, -1)[accepted]))
    tokens = itertools.starmap(TokenRecord, zip(*columns, strict=True))
    for row, token in zip(tokens_FM[0, accepted].tolist(), tokens, strict=True):
        rows[row].tokens.append(token)
    return rows
