"""The engine: takes requests, steps them, hands out results."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from d2f.decoding.batch import BlockView, GenerationResult
from d2f.decoding.paged import PagedDecoder
from d2f.decoding.strategies import Strategy
from d2f.decoding.workspace import Workspace
from d2f.engine.clock import StepClock
from d2f.engine.paged import PagedLane
from d2f.engine.request import EngineConfig as EngineConfig
from d2f.engine.request import Output, Progress, Request, Task, resolve
from d2f.engine.stops import StopStrings
from d2f.engine.unpaged import UnpagedLane
from d2f.errors import RequestError
from d2f.models.cache import PagedCache, PagePool, PromptCache
from d2f.models.transformer import Transformer
from d2f.ops.backend import select_backend


class Decodes(Protocol):
    """The method that the engine needs of a tokenizer; `StopStrings` says what more it uses."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids."""


@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    """Numbers that tell how busy an engine is.

    Example:
        >>> EngineStatus(num_waiting=0, num_running=1, num_pages=8, num_free_pages=6).num_running
        1
    """

    num_waiting: int
    """Requests that are queued, those that had to give way among them."""
    num_running: int
    num_pages: int
    """Pages of the key/value cache; 0 before a request needs it."""
    num_free_pages: int
    """Pages that no request holds. Kept prompts may hold some of them, and give them up."""


Lane = PagedLane | UnpagedLane


class Engine:
    """Decodes requests with one model.

    The model and its adapter must stay as they are for the engine's life. The key/value cache is
    made when the first request needs it.

    Args:
        model: From `load_model`.
        config: Settings.
        tokenizer: Needed for requests with stop strings.

    Example:
        >>> from d2f.testing import tiny_model
        >>> engine = Engine(tiny_model("llada"))
        >>> [result] = engine.generate([Request(prompt_ids=[1, 2], max_new_tokens=4)])
        >>> len(result.token_ids) <= 4
        True
    """

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig | None = None,
        tokenizer: Decodes | None = None,
    ) -> None:
        self.model = model
        self.config = config or EngineConfig()
        self._tokenizer = tokenizer
        self._numbers = itertools.count()
        self._tasks: dict[int, Task] = {}
        """Requests whose result was not handed out yet."""
        self._ready: dict[int, Output] = {}
        self._watched: set[int] = set()
        """Requests whose blocks somebody looks at."""
        self._closed = False
        self._clock: StepClock | None = None
        self._lanes: dict[type, Lane] = {}
        """Lanes by decoder."""

    def _lane(self, strategy: Strategy) -> Lane:
        """The lane of a strategy, opened when its first request comes.

        Strategies of one paged decoder share a lane, and so do all strategies without pages.
        """
        decoder = strategy.decoder_class
        key = decoder if issubclass(decoder, PagedDecoder) else UnpagedLane
        if key not in self._lanes:
            if not self._lanes:
                self.model.prepare_steps()
            self._lanes[key] = self._open_lane(key)
        return self._lanes[key]

    def _open_lane(self, key: type[PagedDecoder] | type[UnpagedLane]) -> Lane:
        model, config = self.model, self.config
        backend = select_backend(config.backend, model.device)
        # A lane keeps neither the engine nor its cache alive.
        put_out = functools.partial(Engine._put_out, weakref.proxy(self))
        if issubclass(key, UnpagedLane):
            workspace = Workspace(model.device, use_graphs=config.cuda_graphs, backend=backend)
            return key(model, workspace, max_rows=config.max_batch_size, on_done=put_out)
        decoder = key(model, self._cache, backend, config.imposed_acceptance)
        lane = PagedLane(decoder, self._prompts, config, on_done=put_out)
        lane.runner.clock = self._clock
        return lane

    @functools.cached_property
    def _cache(self) -> PagedCache:
        # Made when the first request needs it: it takes all memory that is free.
        model, config = self.model, self.config
        return PagedCache.fitting(
            model.spec,
            page_size=config.page_size,
            max_sequences=config.max_batch_size,
            budget_bytes=config.kv_cache_bytes,
            device=model.device,
            dtype=model.dtype,
        )

    @functools.cached_property
    def _prompts(self) -> PromptCache:
        return PromptCache(PagePool(self._cache.num_pages))

    # ------------------------------------------------------------------------------ requests

    def add(self, request: Request, *, watch: bool = False) -> int:
        """Queue a request; returns its id.

        Args:
            request: What to answer, and how.
            watch: The output that `step` hands out at the end has the response's blocks.

        Raises:
            RequestError: It cannot be served, or the engine is closed; others are not affected.
            ConfigError: Unknown strategy or option; or there is no room for a key/value cache, or
                the backend cannot run here.
        """
        task = self._checked(request)
        self._tasks[task.number] = task
        if watch:
            self._watched.add(task.number)
        self._lane(task.strategy).add(task)
        return task.number

    def step(self) -> list[Output]:
        """One model call for all running requests; the outputs of those that are finished.

        A request that failed has an output with its error. If the step breaks off with another one,
        the requests are still there: the next step goes on with them, `abort` takes them out.

        Raises:
            RequestError: The engine is closed.
            D2FError: The device failed in an earlier step; the engine can only be closed.
        """
        self._require_open()
        if not self._ready:
            self._advance()
        outputs = list(self._ready.values())
        for output in outputs:
            self._forget(output.request_id)
        return outputs

    def abort(self, request_id: int) -> bool:
        """Take a request out, whether it waits, runs or is finished; whether there was one.

        Its pages are free for others at once.
        """
        task = self._tasks.get(request_id)
        if task is None:
            return False
        if not task.finished:
            self._lane(task.strategy).remove(task)
        self._forget(request_id)
        return True

    def forget_prompts(self) -> None:
        """Keep no prompt's keys and values any longer; the next request computes its own.

        For measuring what a request costs whose prompt is new.
        """
        if self._paged_lanes():
            self._prompts.clear()

    def close(self) -> None:
        """Abort all requests and give the cache's memory back. May be called twice.

        Like `abort` it works after a step that broke off, whatever the reason.
        """
        for number in list(self._tasks):
            self._forget(number)
        self._closed = True
        self._lanes.clear()
        for name in ("_cache", "_prompts"):
            self.__dict__.pop(name, None)

    def generate(self, requests: Sequence[Request]) -> list[GenerationResult]:
        """Answer all requests; results in their order.

        Raises:
            RequestError: One of them cannot be served; then none is, or none any further.
            ConfigError: Unknown strategy or option.
        """
        for request in requests:
            self._checked(request)
        numbers = [self.add(request) for request in requests]
        try:
            while not all(number in self._ready for number in numbers):
                self._advance()
                for number in numbers:
                    error = self._ready[number].error if number in self._ready else None
                    if error is not None:
                        raise error
            results = [self._ready[number].result for number in numbers]
        finally:
            for number in numbers:
                self.abort(number)
        return [result for result in results if result is not None]

    def stream(self, request: Request) -> Generator[Output, None, None]:
        """Answer one request, reporting its blocks after each model call.

        A stream that is dropped before its end takes its request out of the engine.

        Raises:
            RequestError: The request cannot be served, or its result was handed out by `step`.
        """
        number = self.add(request, watch=True)
        try:
            while number not in self._ready:
                if number not in self._tasks:
                    raise RequestError(f"the result of request {number} was handed out by step()")
                self._advance()
                if number not in self._ready and number in self._tasks:
                    task, blocks = self._tasks[number], self.view(number)
                    tokens = (token for block in blocks for token in block.token_ids)
                    if blocks:
                        token_ids = task.up_to_end(tokens)
                        yield Output(request_id=number, blocks=blocks, token_ids=token_ids)
            output = self._ready[number]
            if output.error is not None:
                raise output.error
            yield output
        finally:
            self.abort(number)

    def view(self, request_id: int) -> list[BlockView]:
        """The blocks of a request as they stand, as far as the host knows them.

        Raises:
            RequestError: There is no such request.
        """
        task = self._task(request_id)
        return self._lane(task.strategy).view(task)

    def progress(self, request_id: int) -> Progress:
        """Return the tokens and forwards of a request so far, for less than the price of a `view`.

        Of strategies that keep no pages it is read from the device.

        Raises:
            RequestError: There is no such request.

        Example:
            >>> from d2f.testing import tiny_model
            >>> engine = Engine(tiny_model("llada"))
            >>> number = engine.add(Request(prompt_ids=[1, 2], max_new_tokens=4))
            >>> engine.progress(number)
            Progress(token_ids=[], num_forwards=0)
        """
        task = self._task(request_id)
        if request_id in self._ready:
            result = self._ready[request_id].result
            if result is not None:
                return Progress(token_ids=result.token_ids, num_forwards=result.num_forwards)
        return self._lane(task.strategy).progress(task)

    def status(self) -> EngineStatus:
        """Count the requests that wait and run, and the pages that are free.

        Example:
            >>> from d2f.testing import tiny_model
            >>> Engine(tiny_model("llada")).status()
            EngineStatus(num_waiting=0, num_running=0, num_pages=0, num_free_pages=0)
        """
        lanes, pools = self._lanes.values(), [self._prompts.pool] if self._paged_lanes() else []
        return EngineStatus(
            num_waiting=sum(len(lane.waiting) for lane in lanes),
            num_running=sum(lane.num_running for lane in lanes),
            num_pages=sum(pool.num_pages for pool in pools),
            num_free_pages=sum(pool.num_available for pool in pools),
        )

    @contextmanager
    def timed(self) -> Iterator[StepClock]:
        """Note when each step on the paged cache runs, within the block.

        On a GPU, steps whose graph is captured within the block hold the others up; warm up first.
        Steps of strategies without that cache are not noted.

        Raises:
            RequestError: The engine is closed.

        Example:
            >>> from d2f.testing import tiny_model
            >>> engine = Engine(tiny_model("llada"))
            >>> with engine.timed() as clock:
            ...     [result] = engine.generate([Request(prompt_ids=[1], max_new_tokens=4)])
            >>> len(clock.times()) == result.num_forwards
            True
        """
        self._require_open()
        clock = StepClock(self.model.device)
        self._note_steps(clock)
        try:
            yield clock
        finally:
            self._note_steps(None)

    @property
    def num_preemptions(self) -> int:
        """Number of times that a running request had to give way to an older one."""
        return sum(lane.num_preemptions for lane in self._paged_lanes())

    @property
    def num_graphs(self) -> int:
        """Shapes of step that are captured."""
        return sum(lane.num_graphs for lane in self._lanes.values())

    # ---------------------------------------------------------------------------------- inside

    def _checked(self, request: Request) -> Task:
        self._require_open()
        resolved = resolve(request, self.model.spec)
        stops = None
        if resolved.stop:
            if self._tokenizer is None:
                raise RequestError(
                    "stop strings need the engine's tokenizer: Engine(model, config, tokenizer)"
                )
            stops = StopStrings(resolved.stop, self._tokenizer)
        task = Task.of(next(self._numbers), resolved, self.model.spec, stops)
        self._lane(task.strategy).check(task)
        return task

    def _task(self, request_id: int) -> Task:
        task = self._tasks.get(request_id)
        if task is None:
            raise RequestError(f"there is no request {request_id}, or its result was handed out")
        return task

    def _require_open(self) -> None:
        if self._closed:
            raise RequestError("the engine is closed; make a new one")

    def _paged_lanes(self) -> list[PagedLane]:
        return [lane for lane in self._lanes.values() if isinstance(lane, PagedLane)]

    def _note_steps(self, clock: StepClock | None) -> None:
        self._clock = clock
        for lane in self._paged_lanes():
            lane.runner.clock = clock

    def _advance(self) -> None:
        for lane in self._lanes.values():
            if lane.busy:
                lane.step()

    def _put_out(self, task: Task, result: GenerationResult | None) -> None:
        self._ready[task.number] = Output(
            request_id=task.number,
            blocks=self.view(task.number) if task.number in self._watched else [],
            token_ids=[] if result is None else result.token_ids,
            result=result,
            error=task.error,
        )

    def _forget(self, number: int) -> None:
        self._tasks.pop(number, None)
        self._watched.discard(number)
        self._ready.pop(number, None)
