"""One request on its way through the engine, as the host knows it.

What the host knows of a running request is one step old where the device runs ahead of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from d2f.decoding import rules
from d2f.decoding.alternatives import Alternatives
from d2f.decoding.batch import (
    BlockState,
    BlockView,
    GenerationResult,
    count_decoded,
    cut_at_eos,
    decoded_prefix,
    known_prefix,
)
from d2f.decoding.paged import TokenRecord
from d2f.decoding.rows import RowStart
from d2f.engine.request import Progress, Request
from d2f.engine.stops import StopStrings
from d2f.errors import RequestError


@contextmanager
def _decoding() -> Iterator[None]:
    """The tokenizer is the caller's; other requests have nothing to do with its errors."""
    try:
        yield
    except Exception as error:
        raise RequestError(f"the tokenizer could not decode the response ({error!r})") from None


@dataclass(eq=False)
class Task:
    """A request with its progress and what it holds."""

    number: int
    request: Request
    stops: StopStrings | None = None
    """Where the request has any."""
    tokens: list[int | None] = field(default_factory=list)
    """The response, None where not decoded."""
    probabilities: list[float | None] = field(default_factory=list)
    """With which each token was accepted, None where not decoded."""
    alternatives: list[Alternatives] = field(default_factory=list)
    """Of each token, empty where not decoded; of a request that asks for none it has no items."""
    num_opened: int = 0
    num_complete: int = 0
    start: int = 0
    """First position that the next step computes, as last reported."""
    end: int = 0
    num_forwards: int = 0
    num_query_tokens: int = 0
    row: int | None = None
    """Its row on the device; None while it waits."""
    pages: list[int] = field(default_factory=list)
    num_in_flight: int = 0
    """Steps that were started with it and not reported yet."""
    stalled: bool = False
    """It sat out the step last reported."""
    fresh_prompt: bool = False
    """Its prompt is being computed and may be kept for others."""
    finished: bool = False
    error: RequestError | None = None
    blocks: list[BlockView] = field(default_factory=list)
    """As they were at the end, of unpaged strategies."""

    @property
    def strategy(self) -> str:
        """Of its request, which is resolved."""
        assert self.request.strategy is not None
        return self.request.strategy

    @property
    def is_autoregressive(self) -> bool:
        """It gets one token per step."""
        return self.strategy == "autoregressive"

    @property
    def longest(self) -> int:
        """Positions of prompt and longest response."""
        return len(self.request.prompt_ids) + self.request.max_new_tokens

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Those that end it."""
        eos = self.request.eos_token_id
        assert isinstance(eos, tuple)
        return eos

    def row_start(self, num_cached: int) -> RowStart:
        """What its row starts from."""
        request = self.request
        assert request.policy is not None
        tokens = self.tokens
        if self.is_autoregressive:
            tokens = [token for token in tokens if token is not None]
        return RowStart(
            prompt=request.prompt_ids,
            max_new_tokens=request.max_new_tokens,
            policy=request.policy,
            eos_token_ids=self.eos_token_ids,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            seed=request.seed,
            early_stop=request.early_stop,
            tokens=tokens if self.num_forwards else (),
            # Before its first forward nothing is known of it; it may have sat out or failed.
            num_opened=self.num_opened if self.num_forwards else 0,
            num_forwards=self.num_forwards,
            num_query_tokens=self.num_query_tokens,
            num_cached=num_cached,
        )

    def span(self) -> tuple[int, int]:
        """Bounds of the positions that its next step computes: first, and end (exclusive).

        A step in flight may open one more block, or append one token, and caches all complete
        blocks. If it sits out instead, the first position is `start` still.
        """
        ahead = self.num_in_flight
        if self.is_autoregressive:
            start, end = self.start, self.end + ahead
            return (end - 1 if ahead else start), min(end, self.longest)
        assert self.request.policy is not None
        size, prompt = self.request.policy.block_size, len(self.request.prompt_ids)
        response = min((self.num_opened + ahead) * size, self.request.max_new_tokens)
        start = self.start
        if ahead:
            start = max(start, prompt + self.num_complete * size)
        return start, max(prompt + response, self.end)

    def report(self, table: dict[str, int], tokens: list[TokenRecord]) -> None:
        """Take over what a step reports of its row."""
        self.stalled = not table["ran"]
        self.num_opened, self.num_complete = table["opened"], table["complete"]
        self.start, self.end = table["start"], table["end"]
        self.num_forwards, self.num_query_tokens = table["forwards"], table["queries"]
        for _, place, token, probability, alternatives in tokens:
            self.tokens[place] = token
            self.probabilities[place] = probability
            if self.alternatives:
                self.alternatives[place] = alternatives[: self.request.num_alternatives]

    def num_masked(self) -> int:
        """Positions of its open blocks that need a token."""
        assert self.request.policy is not None
        return self.tokens[: self.num_opened * self.request.policy.block_size].count(None)

    def decoded(self) -> list[int]:
        """The response up to its first gap."""
        return decoded_prefix(self.tokens)

    def progress(self) -> Progress:
        """How far it is."""
        token_ids = self.up_to_end(self.decoded())
        return Progress(token_ids=token_ids, num_forwards=self.num_forwards)

    @property
    def ends_at_stop(self) -> bool:
        """A stop string ends it; without `early_stop` it only cuts the finished response."""
        return self.request.early_stop and bool(self.request.stop)

    def reaches_stop(self) -> bool:
        """Whether the response up to its first gap holds a stop string that ends it.

        Raises:
            RequestError: The tokenizer cannot decode it.
        """
        if self.stops is None or not self.ends_at_stop:
            return False
        with _decoding():
            return self.stops.found(self.decoded())

    def stop_at(self, token_ids: Sequence[int]) -> int | None:
        """How many tokens complete a stop string behind which a running request goes on."""
        if self.ends_at_stop:
            return None
        try:
            return self._num_until_stop(token_ids)
        except RequestError:  # its result will fail with the same
            return None

    def up_to_end(self, token_ids: list[int]) -> list[int]:
        """Of a running request's tokens those that its result will have."""
        token_ids, _ = cut_at_eos(token_ids, self.eos_token_ids)
        return token_ids[: self.stop_at(token_ids)]

    def cut_at_stop(self, result: GenerationResult) -> GenerationResult:
        """A response up to the token that completes a stop string, if there is one.

        Raises:
            RequestError: The tokenizer cannot decode it.
        """
        token_ids = result.token_ids
        fewest = self._num_until_stop(token_ids)
        if fewest is None:
            return result
        return dataclasses.replace(
            result,
            token_ids=token_ids[:fewest],
            probabilities=result.probabilities[:fewest],
            alternatives=result.alternatives[:fewest],
            finish_reason="stop",
        )

    def _num_until_stop(self, token_ids: Sequence[int]) -> int | None:
        """How many tokens complete a stop string; None: they have none."""
        if self.stops is None:
            return None
        with _decoding():
            return self.stops.num_tokens(token_ids)

    def result(self) -> GenerationResult:
        """The finished response, up to the first EOS or the token that completes a stop string."""
        token_ids, reason = cut_at_eos(self.decoded(), self.eos_token_ids)
        result = GenerationResult(
            token_ids=token_ids,
            probabilities=known_prefix(self.probabilities, len(token_ids)),
            num_forwards=self.num_forwards,
            num_prefill_forwards=0,
            num_query_tokens=self.num_query_tokens,
            finish_reason=reason,
            num_decoded_tokens=count_decoded(self.tokens, self.eos_token_ids),
            alternatives=self.alternatives[: len(token_ids)],
        )
        return self.cut_at_stop(result)

    def view(self) -> list[BlockView]:
        """Its blocks as they stand."""
        if self.is_autoregressive:
            decoded = tuple(self.decoded())
            probabilities = tuple(self.probabilities[: len(decoded)])
            return [
                BlockView(
                    state=BlockState.CACHED,
                    token_ids=decoded,
                    probabilities=probabilities,
                    alternatives=tuple(self.alternatives[: len(decoded)]),
                )
            ]
        policy = self.request.policy
        assert policy is not None
        size, prompt = policy.block_size, len(self.request.prompt_ids)
        blocks = [self.tokens[at : at + size] for at in range(0, len(self.tokens), size)]
        blocks = blocks[: self.num_opened]
        if not blocks:
            return []
        shares = [sum(token is not None for token in block) / len(block) for block in blocks]
        share_1N = torch.tensor([shares], dtype=torch.double)
        fully_N = rules.activate(
            share_1N,
            torch.zeros_like(share_1N, dtype=torch.bool),
            activate_threshold=policy.activate_threshold,
        )[0].tolist()
        cached = (self.start - prompt) // size if self.start > prompt else 0
        views = []
        for index, (block, share) in enumerate(zip(blocks, shares, strict=True)):
            state = BlockState.SEMI_ACTIVE
            if index < cached:
                state = BlockState.CACHED
            elif index < self.num_complete:
                state = BlockState.COMPLETE
            elif fully_N[index] or share >= 1:
                state = BlockState.FULLY_ACTIVE
            place = slice(index * size, (index + 1) * size)
            views.append(
                BlockView(
                    state=state,
                    token_ids=tuple(block),
                    probabilities=tuple(self.probabilities[place]),
                    alternatives=tuple(self.alternatives[place]),
                )
            )
        return views
