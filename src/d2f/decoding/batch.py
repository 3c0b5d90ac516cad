"""The records that every strategy takes and returns: requests, views of blocks, results.

Shapes: M positions, R positions of a response, A alternatives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import cast

import torch
from torch import Tensor

from d2f.decoding.alternatives import Alternatives, read_alternatives
from d2f.decoding.strategies import Options
from d2f.diffusion.policy import DecodingPolicy
from d2f.errors import RequestError
from d2f.ops.sampling import Sampling

NOT_FINITE = (
    "the model's logits are not finite, so there is no answer; its weights may be broken, or the "
    "temperature too close to 0"
)
"""Reason why a response has no answer."""


class BlockState(Enum):
    """The life of a block, in order."""

    SEMI_ACTIVE = "semi-active"
    FULLY_ACTIVE = "fully active"
    COMPLETE = "complete"
    CACHED = "cached"


@dataclass(frozen=True, kw_only=True)
class BlockView:
    """One block as a person may watch it."""

    state: BlockState
    token_ids: tuple[int | None, ...]
    """Tokens of the block; None where not decoded yet."""
    probabilities: tuple[float | None, ...]
    """Probability with which each token was accepted; None where none is decoded yet."""
    alternatives: tuple[Alternatives, ...] = ()
    """Most probable tokens at each position, where the request asks for some; empty at masks."""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """One finished response."""

    token_ids: list[int]
    """The response up to and including its first EOS, or the token that completes a stop string."""
    probabilities: list[float] = field(compare=False)
    """Probability with which each token was accepted; a policy's confidence threshold is compared
    with it. Rounding may differ from batch to batch, so it does not tell two results apart."""
    num_forwards: int
    """Model calls that refine blocks, or in autoregression yield a token."""
    num_prefill_forwards: int
    """Model calls that only read the prompt."""
    num_query_tokens: int
    """Tokens computed for this sequence in all its forwards; padding and a prompt that was cached
    already do not count, what was computed again after an interruption does."""
    finish_reason: str
    """`eos`, `length` or `stop`."""
    num_decoded_tokens: int | None = field(default=None, compare=False)
    """Tokens that were decoded in all but for EOS tokens, those behind the response's end among
    them; None where it is not told."""
    alternatives: list[Alternatives] = field(default_factory=list, compare=False)
    """Most probable tokens at each position, where the request asks for some."""

    @property
    def tokens_per_forward(self) -> float:
        """Response tokens / forwards."""
        return len(self.token_ids) / max(self.num_forwards, 1)

    @property
    def query_tokens_per_forward(self) -> float:
        """Tokens computed / forwards: what a forward costs, beside what it yields."""
        return self.num_query_tokens / max(self.num_forwards, 1)


@dataclass(frozen=True, kw_only=True)
class RowRequest:
    """Prompt, length and settings that are asked for one sequence."""

    prompt: Sequence[int]
    max_new_tokens: int
    policy: DecodingPolicy
    options: Options = field(default_factory=Options)
    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    early_stop: bool = True
    num_alternatives: int = 0

    def joins(self, other: RowRequest) -> bool:
        """Whether both may be in one `DecodingBatch`."""
        prompt, limit, seed = other.prompt, other.max_new_tokens, other.seed
        return replace(self, prompt=prompt, max_new_tokens=limit, seed=seed) == other

    @property
    def filters(self) -> tuple[float, int, float, float]:
        """Temperature and filters with which tokens are sampled, whatever the seed."""
        return self.temperature, self.top_k, self.top_p, self.min_p

    def sampling(self, seed_M: Tensor, position_M: Tensor, step_M: Tensor) -> Sampling | None:
        """Return how positions are sampled, each with its seed; None: they are not sampled."""
        if self.temperature == 0:
            return None
        return Sampling(
            temperature_M=torch.full_like(seed_M, self.temperature, dtype=torch.float32),
            top_k_M=torch.full_like(seed_M, self.top_k),
            top_p_M=torch.full_like(seed_M, self.top_p, dtype=torch.float32),
            seed_M=seed_M,
            position_M=position_M,
            step_M=step_M,
            truncated=self.top_k > 0 or self.top_p < 1 or self.min_p > 0,
            min_p_M=torch.full_like(seed_M, self.min_p, dtype=torch.float32),
        )


def decoded_prefix(tokens: Iterable[int | None]) -> list[int]:
    """The tokens before the first gap.

    Example:
        >>> decoded_prefix([4, 5, None, 6])
        [4, 5]
    """
    known = list(tokens)
    # Serving asks for this at every step of every request, so no loop of Python's own.
    if None in known:
        del known[known.index(None) :]
    return cast("list[int]", known)


def cut_at_eos(token_ids: list[int], eos_token_ids: tuple[int, ...]) -> tuple[list[int], str]:
    """The tokens up to and including the first EOS, and the finish reason.

    Example:
        >>> cut_at_eos([5, 9, 7], (9,))
        ([5, 9], 'eos')
    """
    ends = [token_ids.index(token) for token in eos_token_ids if token in token_ids]
    return (token_ids[: min(ends) + 1], "eos") if ends else (token_ids, "length")


def count_decoded(tokens: Iterable[int | None], eos_token_ids: tuple[int, ...]) -> int:
    """Tokens that were decoded, wherever they stand, but for EOS tokens.

    Example:
        >>> count_decoded([5, 9, 7, None, 8], (9,))
        3
    """
    return sum(token is not None and token not in eos_token_ids for token in tokens)


@dataclass(kw_only=True, eq=False)
class Decoded:
    """A response, or a block of it, as far as it is decoded."""

    tokens: list[int | None] = field(default_factory=list)
    """Tokens of the response; None where not decoded."""
    probabilities: list[float | None] = field(default_factory=list)
    """Probability with which each token was accepted; None where none is decoded."""
    alternatives: list[Alternatives] = field(default_factory=list)
    """Most probable tokens at each position, empty at masks; no items if none are asked for."""

    @classmethod
    def read(
        cls, ids_R: Tensor, probability_R: Tensor, alternatives_RA: Tensor, mask_token_id: int
    ) -> Decoded:
        """A response of R positions as it stands on the device.

        Its alternatives are numbers (`d2f.decoding.alternatives`); A is 0 where none are asked for.
        """
        tokens = [None if token == mask_token_id else token for token in ids_R.tolist()]
        pairs = zip(tokens, probability_R.tolist(), strict=True)
        return cls(
            tokens=tokens,
            probabilities=[None if token is None else p for token, p in pairs],
            alternatives=read_alternatives(alternatives_RA.cpu().numpy())
            if alternatives_RA.shape[1]
            else [],
        )

    def block(self, state: BlockState, place: slice = slice(None)) -> BlockView:
        """A part of it as a block that somebody watches."""
        return BlockView(
            state=state,
            token_ids=tuple(self.tokens[place]),
            probabilities=tuple(self.probabilities[place]),
            alternatives=tuple(self.alternatives[place]),
        )

    def result(
        self,
        eos_token_ids: tuple[int, ...],
        *,
        finite: bool,
        num_forwards: int,
        num_query_tokens: int,
    ) -> GenerationResult:
        """Make a result of the whole response, up to its first gap or EOS.

        Raises:
            RequestError: It was decoded from logits that are not finite.

        Example:
            >>> decoded = Decoded(tokens=[5, 9, None], probabilities=[0.8, 0.7, None])
            >>> result = decoded.result((9,), finite=True, num_forwards=2, num_query_tokens=8)
            >>> result.token_ids, result.probabilities
            ([5, 9], [0.8, 0.7])
        """
        if not finite:
            raise RequestError(NOT_FINITE)
        token_ids, reason = cut_at_eos(decoded_prefix(self.tokens), eos_token_ids)
        known = self.probabilities[: len(token_ids)]
        assert None not in known, "a decoded token has a probability"
        return GenerationResult(
            token_ids=token_ids,
            probabilities=cast("list[float]", known),
            num_forwards=num_forwards,
            num_prefill_forwards=0,
            num_query_tokens=num_query_tokens,
            finish_reason=reason,
            num_decoded_tokens=count_decoded(self.tokens, eos_token_ids),
            alternatives=self.alternatives[: len(token_ids)],
        )


class DecodingBatch(ABC):
    """Sequences decoded together without pages, one model call per `step`.

    Args:
        asked: What they are asked for; each `joins` the others.
    """

    def __init__(self, asked: Sequence[RowRequest]) -> None:
        self.asked = list(asked)
        self.done = [False] * len(asked)
        self.num_forwards = [0] * len(asked)
        """Model calls so far that refined each sequence."""
        self.num_query_tokens = [0] * len(asked)

    @property
    def settings(self) -> RowRequest:
        """The request of the first sequence, for the settings that all sequences have in common."""
        return self.asked[0]

    @abstractmethod
    def step(self) -> None:
        """Run one model call for all unfinished sequences."""

    @abstractmethod
    def decoded(self, row: int) -> Decoded:
        """The response of a sequence as far as it is decoded."""

    @abstractmethod
    def finite(self) -> list[bool]:
        """Say for each sequence whether all its logits so far were finite."""

    def finished(self) -> list[bool]:
        """Say for each sequence whether it is done."""
        return list(self.done)

    def results(self, rows: list[int]) -> list[GenerationResult]:
        """The responses of sequences, of unfinished ones up to the first gap.

        Raises:
            RequestError: The model's logits were not finite.
        """
        finite = self.finite()
        return [
            self.decoded(row).result(
                self.settings.eos_token_ids,
                finite=finite[row],
                num_forwards=self.num_forwards[row],
                num_query_tokens=self.num_query_tokens[row],
            )
            for row in rows
        ]

    def view(self, row: int) -> list[BlockView]:
        """The blocks of a sequence as they stand: one that stays active to the end."""
        return [self.decoded(row).block(BlockState.FULLY_ACTIVE)]

    def select(self, rows: list[int]) -> None:
        """Go on with these sequences only, in this order."""
        self.asked = [self.asked[row] for row in rows]
        self.done = [self.done[row] for row in rows]
        self.num_forwards = [self.num_forwards[row] for row in rows]
        self.num_query_tokens = [self.num_query_tokens[row] for row in rows]
