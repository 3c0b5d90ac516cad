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
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2f.decoding.alternatives import Alternatives, find_alternatives, read_alternatives
from d2f.decoding.rows import STATE, Rows, RowStart
from d2f.models.cache import PagedCache
from d2f.models.transformer import Transformer
from d2f.ops.backend import Backend
from d2f.ops.packed import Packing
from d2f.ops.sampling import Choice, Sampling

HEAD_ROWS = 512
"""Most positions whose logits exist at once."""


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


RECORD_ROWS = tuple(name.removesuffix("_B") for name in STATE)
"""What a step reports of each row, for the next forward; before it stands whether the row ran."""
RECORD_TOKENS = ("row", "place", "token", "probability")
"""What a step reports of each candidate: its row, its place in the response, its token (-1: not
accepted) and the bits of its probability."""


class TokenRecord(NamedTuple):
    """One accepted token."""

    row: int
    place: int
    """In the response."""
    token: int
    probability: float
    alternatives: Alternatives = ()


class PagedDecoder(ABC):
    """A strategy on the paged cache; stateless, all state is in the rows and the cache."""

    def __init__(self, model: Transformer, cache: PagedCache, backend: Backend) -> None:
        self.model, self.cache, self.backend = model, cache, backend

    @abstractmethod
    def begin(self, start: RowStart) -> tuple[dict[str, int], list[bool]]:
        """Where a row begins: the values and flags that `RowStorage.write` takes."""

    @abstractmethod
    def step(self, rows: Rows, shape: StepShape) -> Tensor:
        """Run one step; returns its record, which `read_record` takes apart."""

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
        mask = None if self.model.spec.architecture.causal else self.model.spec.mask_token_id
        parts, others = [], [row_M.new_empty(0, shape.num_alternatives)]
        for at in range(0, len(aligned_MD), HEAD_ROWS):
            part = slice(at, at + HEAD_ROWS)
            sampling = None
            if shape.sampled:
                row = row_M[part]
                sampling = Sampling(
                    temperature_M=rows.temperature_B[row].float(),
                    top_k_M=rows.top_k_B[row],
                    top_p_M=rows.top_p_B[row].float(),
                    seed_M=rows.seed_B[row],
                    position_M=position_M[part],
                    step_M=rows.forwards_B[row],
                    truncated=shape.truncated,
                    min_p_M=rows.min_p_B[row].float(),
                )
            logits_MV = self.backend.linear_fp32(aligned_MD[part], self.model.head_weight_VD)
            if shape.num_alternatives:
                others.append(find_alternatives(logits_MV, shape.num_alternatives, mask, sampling))
            parts.append(
                self.backend.choose_tokens(
                    logits_MV,
                    mask_token_id=mask,
                    confidence_M=rows.confidence_B[row_M[part]] if shape.ranked else None,
                    sampling=sampling,
                    needed_M=None if needed_M is None else needed_M[part],
                )
            )
        choice = parts[0]
        if len(parts) > 1:
            choice = Choice(*map(torch.cat, zip(*parts, strict=True)))
        return choice, torch.cat(others)


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


def read_record(
    record: Tensor, num_rows: int, num_alternatives: int = 0
) -> tuple[list[dict[str, int]], list[TokenRecord]]:
    """A record on the host as one table per row, and the accepted tokens.

    A row's table also says whether it "ran" and whether all its probabilities are "finite".
    """
    names = ("ran", *RECORD_ROWS)
    cut = len(names) * num_rows
    # numpy does the little there is to do in a third of the time.
    values = record.numpy()
    columns = values[:cut].reshape(len(names), num_rows).T.tolist()
    tables = [dict(zip(names, column, strict=True), finite=1) for column in columns]
    count = (len(values) - cut) // (len(RECORD_TOKENS) + num_alternatives)
    rest = cut + len(RECORD_TOKENS) * count
    tokens_FM = values[cut:rest].reshape(len(RECORD_TOKENS), count)
    probability_M = tokens_FM[3].astype(np.int32).view(np.float32)
    for row in tokens_FM[0, ~np.isfinite(probability_M)].tolist():
        tables[row]["finite"] = 0
    accepted = np.flatnonzero(tokens_FM[2] >= 0)
    columns = [*tokens_FM[:3, accepted].tolist(), probability_M[accepted].tolist()]
    if num_alternatives:
        columns.append(read_alternatives(values[rest:].reshape(count, -1)[accepted]))
    return tables, list(itertools.starmap(TokenRecord, zip(*columns, strict=True)))
