"""The engine: batches requests, steps them, hands out results.

It serves one batch at a time, of waiting requests that run under the same settings; sequences that
are done leave the batch.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from d2f.decoding.batch import BlockView, DecodingBatch, GenerationResult, Sequences
from d2f.decoding.strategies import start_batch
from d2f.engine.request import Output, Request, resolve
from d2f.errors import ConfigError, RequestError
from d2f.models.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine."""

    max_batch_size: int = 64
    """Most sequences that are decoded together."""

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise ConfigError(f"max_batch_size is {self.max_batch_size}; it must be at least 1")


class Engine:
    """Decodes requests with one model.

    Example:
        >>> from d2f.testing import tiny_model
        >>> engine = Engine(tiny_model("llada"))
        >>> [result] = engine.generate([Request(prompt_ids=[1, 2], max_new_tokens=4)])
        >>> len(result.token_ids) <= 4
        True
    """

    def __init__(self, model: Transformer, config: EngineConfig | None = None) -> None:
        self.model = model
        self.config = config or EngineConfig()
        self._numbers = itertools.count()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._batch: DecodingBatch | None = None
        self._running: list[int | None] = []
        self._watched: set[int] = set()
        self._undelivered: list[Output] = []

    def add(self, request: Request) -> int:
        """Queue a request; returns its id.

        Raises:
            RequestError: The model cannot serve it; other requests are not affected.
            ConfigError: Unknown strategy or option.
        """
        number = next(self._numbers)
        self._waiting.append((number, resolve(request, self.model.spec)))
        return number

    def step(self) -> list[Output]:
        """One model call for the running batch; the requests that have been finished."""
        if not self._undelivered:
            return self._advance()
        outputs, self._undelivered = self._undelivered, []
        return outputs

    def generate(self, requests: Sequence[Request]) -> list[GenerationResult]:
        """Answer all requests; results in their order. One bad request refuses all of them."""
        for request in requests:
            resolve(request, self.model.spec)
        numbers = [self.add(request) for request in requests]
        wanted = set(numbers)
        results: dict[int, GenerationResult] = {}
        try:
            while len(results) < len(wanted):
                for output in self._advance():
                    if output.request_id in wanted and output.result is not None:
                        results[output.request_id] = output.result
                    else:
                        self._undelivered.append(output)
        finally:
            self._forget(wanted - results.keys())
        return [results[number] for number in numbers]

    def stream(self, request: Request) -> Iterator[Output]:
        """Answer one request, reporting its blocks after each model call.

        A stream that is dropped before its end takes its request out of the engine.

        Raises:
            RequestError: The request cannot be served, or its result was handed out by `step`.
        """
        resolved = resolve(request, self.model.spec)
        assert isinstance(resolved.eos_token_id, tuple)
        eos = resolved.eos_token_id
        number = self.add(resolved)
        # Looking at blocks waits for the device, so only streamed requests are looked at.
        self._watched.add(number)
        try:
            while True:
                mine = [o for o in self._undelivered if o.request_id == number]
                if mine:
                    self._undelivered.remove(mine[0])
                    yield mine[0]
                    return
                if number not in self._running and number not in [n for n, _ in self._waiting]:
                    raise RequestError(f"the result of request {number} was handed out by step()")
                self._undelivered += self._advance()
                if number in self._running:
                    yield Output(request_id=number, blocks=self.view(number), eos_token_ids=eos)
        finally:
            self._watched.discard(number)
            self._forget({number})

    def view(self, request_id: int) -> list[BlockView]:
        """The blocks of a running request as they stand.

        Raises:
            RequestError: It is not running.
        """
        if self._batch is None or request_id not in self._running:
            raise RequestError(f"request {request_id} is not running")
        return self._batch.view(self._running.index(request_id))

    def _advance(self) -> list[Output]:
        if not self._select():
            return []
        try:
            self._run()
            return self._apply()
        except BaseException:
            # A batch that broke off between two states must not be gone on with.
            self._batch, self._running = None, []
            raise

    def _forget(self, numbers: set[int]) -> None:
        """Drop requests nobody waits for any more."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] not in numbers)
        self._running = [None if number in numbers else number for number in self._running]

    def _select(self) -> bool:
        """Start a batch of compatible waiting requests when none runs."""
        if self._batch is not None:
            return True
        if not self._waiting:
            return False
        first = self._waiting[0][1]
        chosen: list[tuple[int, Request]] = []
        rest: deque[tuple[int, Request]] = deque()
        for number, request in self._waiting:
            fits = len(chosen) < self.config.max_batch_size and _same_settings(first, request)
            (chosen if fits else rest).append((number, request))
        self._waiting = rest
        requests = [request for _, request in chosen]
        self._batch = start_batch(first.strategy, self.model, _sequences(requests), first.options)
        self._running = [number for number, _ in chosen]
        return True

    def _run(self) -> None:
        assert self._batch is not None
        self._batch.step()

    def _apply(self) -> list[Output]:
        """Hand out what is done; drop finished sequences once they are half of the batch."""
        assert self._batch is not None
        rows = [
            row
            for row, done in enumerate(self._batch.finished())
            if done and self._running[row] is not None
        ]
        outputs = []
        for row, result in zip(rows, self._batch.results(rows), strict=True):
            number = self._running[row]
            assert number is not None
            blocks = self._batch.view(row) if number in self._watched else []
            outputs.append(Output(request_id=number, blocks=blocks, result=result))
            self._running[row] = None
        left = [row for row, number in enumerate(self._running) if number is not None]
        if not left:
            self._batch, self._running = None, []
        elif len(left) <= len(self._running) // 2:
            self._batch.select(left)
            self._running = [self._running[row] for row in left]
        return outputs


def _sequences(requests: Sequence[Request]) -> Sequences:
    first = requests[0]
    assert first.policy is not None and isinstance(first.eos_token_id, tuple)
    return Sequences(
        prompts=[request.prompt_ids for request in requests],
        max_new_tokens=[request.max_new_tokens for request in requests],
        seeds=[request.seed for request in requests],
        policy=first.policy,
        eos_token_ids=first.eos_token_id,
        temperature=first.temperature,
        top_k=first.top_k,
        top_p=first.top_p,
        early_stop=first.early_stop,
    )


def _same_settings(one: Request, other: Request) -> bool:
    names = (
        "strategy", "policy", "eos_token_id", "temperature", "top_k", "top_p", "early_stop",
        "options",
    )  # fmt: skip
    return all(getattr(one, name) == getattr(other, name) for name in names)
