"""Types of what the host tells a step over the paged cache, and of what the step reports.

Shapes: B rows, T packed tokens, M candidates (positions that need a token), A alternatives.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2f.decoding.alternatives import Alternatives, read_alternatives
from d2f.decoding.rows import Rows, RowState


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The sizes of a step, known on the host before it runs."""

    num_rows: int
    """Number of rows (B)."""
    num_tokens: int
    """T. Rows whose tokens do not fit any more sit this step out, the last ones first."""
    num_candidates: int
    """Number of candidates (M)."""
    max_count: int
    """Most tokens of a row; one that has more sits this step out."""
    max_end: int
    """Last position of any row, exclusive."""
    prefill: bool = False
    """Some row computes its prompt."""
    sampled: bool = False
    """Whether some row has a temperature."""
    truncated: bool = False
    """Some row samples with top-k, top-p or min-p."""
    ranked: bool = False
    """Some row ranks the forced token by something else than its probability."""
    num_alternatives: int = 0
    """A: how many of the most probable tokens of each candidate are reported; 0: no row asks."""


RECORD_TOKENS = ("row", "place", "token", "probability")
"""Numbers that a step reports of each candidate: its row, its place in the response, its token
(-1: not accepted) and the bits of its probability."""


class TokenRecord(NamedTuple):
    """One accepted token."""

    place: int
    """Place of the token in the response."""
    token: int
    probability: float
    alternatives: Alternatives = ()


@dataclass(kw_only=True)
class RowRecord:
    """The report of a step on one row."""

    ran: bool
    state: RowState[int]
    """State of the row for the next forward."""
    finite: bool = True
    """Whether all probabilities are finite."""
    tokens: list[TokenRecord] = field(default_factory=list)
    """Tokens that were accepted."""


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
