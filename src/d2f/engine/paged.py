"""Continuous batching over the paged cache.

Each step runs all running requests at once; requests join as soon as there is room and leave as
soon as they are done. On a GPU the host is one step behind: while a step runs it reads the results
of the one before and prepares the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from d2f.decoding.batch import NOT_FINITE, BlockView, GenerationResult
from d2f.decoding.paged import PagedDecoder
from d2f.decoding.rows import RowSizes, RowStorage, power_of_two
from d2f.decoding.step import RowRecord, StepShape
from d2f.engine.request import EngineConfig, Progress, Task
from d2f.engine.runner import Pending, Runner, StepSizer
from d2f.errors import D2FError, RequestError, counted
from d2f.models.cache import CachedPrompt, PromptCache

USUAL_SIZES = RowSizes(num_blocks=32, block_size=32, prompt_length=1, num_eos=4)
"""Room of a row that is there from the start where graphs are captured."""
LEAST_ALONE, MOST_ALONE = 16, 1024
"""Steps in which requests join singly once memory ran out as several joined: the first number at
first, twice as many each time, up to the second."""


@dataclass(frozen=True, eq=False)
class Flight:
    """A step that was started, and whose rows it ran."""

    pending: Pending
    tasks: list[Task]


class PagedLane:
    """The requests that one decoder decodes on the paged cache, which lanes share.

    Args:
        decoder: The strategy; its model and cache are used.
        prompts: Prompts in the cache. All decoders of a model compute the same keys for a prompt.
        config: The engine's.
        on_done: Called with each task that is finished or failed, and its result.
    """

    def __init__(
        self,
        decoder: PagedDecoder,
        prompts: PromptCache,
        config: EngineConfig,
        *,
        on_done: Callable[[Task, GenerationResult | None], None],
    ) -> None:
        self.decoder, self.prompts, self.pool = decoder, prompts, prompts.pool
        self._config, self._on_done, self._key = config, on_done, type(decoder)
        model, self._page_size = decoder.model, decoder.cache.page_size
        on_gpu = model.device.type == "cuda"
        use_graphs = on_gpu and config.cuda_graphs
        self._overlap = on_gpu if config.overlap is None else config.overlap
        """Results of a step are read while the next one runs, and steps sized by bounds."""
        num_pages = min(self._pages_for(model.spec.max_positions), self.pool.num_pages)
        max_end = num_pages * self._page_size
        self._least_sizes = RowSizes(num_blocks=1, block_size=1, prompt_length=1, num_eos=1)
        if use_graphs:
            # Graphs are lost when rows need more room, so most requests should find enough.
            self._least_sizes = replace(USUAL_SIZES, prompt_length=power_of_two(max_end))
        storage = RowStorage.for_model(
            model, self._least_sizes, max_rows=config.max_batch_size, num_pages=num_pages
        )
        self.runner = Runner(decoder, storage, use_graphs=use_graphs)
        self._sizer = StepSizer(self.runner, max_end, exact=not self._overlap)
        self.waiting: deque[Task] = deque()
        self.running: list[Task] = []
        """Running requests by row."""
        self._flights: deque[Flight] = deque()
        self.num_preemptions = 0
        self._fault: Exception | None = None
        """The device failed to take a row out, so its rows are not what the host knows."""
        self._steps_alone = 0
        """Steps left in which requests join singly, as memory ran out when several joined."""
        self._next_alone = LEAST_ALONE
        """Number of steps in which they will join singly when memory runs out again."""

    @property
    def num_graphs(self) -> int:
        """Shapes of step that are captured."""
        return self.runner.num_graphs

    @property
    def num_running(self) -> int:
        """Requests in a row."""
        return len(self.running)

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self.waiting or self.running or self._flights)

    def check(self, task: Task) -> None:
        """Refuse a request that could never run.

        Raises:
            RequestError: It needs more pages than there are.
        """
        needed, pages = self._pages_for(task.longest), self.pool.num_pages
        if needed > pages:
            raise RequestError(
                f"the prompt's {counted(len(task.asked.prompt), 'token')} and max_new_tokens "
                f"{task.asked.max_new_tokens} need {needed} pages of the key/value cache, which "
                f"has {pages} of {counted(self._page_size, 'token')}; shorten the prompt, lower "
                "max_new_tokens or give the engine more with kv_cache_bytes"
            )

    def add(self, task: Task) -> None:
        """Queue a request."""
        task.clear()
        self.waiting.append(task)

    def view(self, task: Task) -> list[BlockView]:
        """The blocks of a request as they stand."""
        return self.decoder.blocks(task)

    def progress(self, task: Task) -> Progress:
        """Return the tokens and forwards of a request so far."""
        token_ids = task.up_to_end(task.tokens)
        return Progress(token_ids=token_ids, num_forwards=task.state.forwards)

    def remove(self, task: Task) -> None:
        """Take a request out, waiting or running; its pages are free at once.

        It does so even if the device is broken.
        """
        task.finished = True
        self.pool.wanted_by.pop(self._key, None)
        if task in self.waiting:
            self.waiting.remove(task)
        if task.row is not None:
            self._leave_row(task)
        self._let_go(task)

    def step(self) -> None:
        """Select what runs, start it, take over what is known by now.

        If it breaks off, the requests that ran start again with the next step, from where they are.

        Raises:
            D2FError: An earlier step left the device broken.
        """
        self._require_sound()
        try:
            joined, shape = self._select()
        except BaseException:
            self._start_again()
            raise
        self._run(joined, shape)
        self._apply()

    # ---------------------------------------------------------------------------------- select

    def _select(self) -> tuple[list[Task], StepShape | None]:
        """Give running requests the pages they need, let waiting ones join, size the step."""
        if len(self._flights) > self._overlap:
            # Somebody interrupted the last step while it waited for results.
            self._apply()
        self._secure_pages()
        joined = self._admit()
        return joined, self._sizer.shape(self.running) if self.running else None

    def _secure_pages(self) -> None:
        """Pages for all that the next step may write; the youngest give way to older ones."""
        entries = []
        for task in sorted(self.running, key=lambda task: task.number):
            if task.row is None:
                continue
            missing = self._pages_for(self.decoder.span(task, task.num_in_flight)[1]) - len(
                task.pages
            )
            while task.row is not None and not self.prompts.make_room(missing):
                self._preempt(max(self.running, key=lambda task: task.number))
            if task.row is not None and missing > 0:
                first = len(task.pages)
                task.pages += self.pool.take(missing)
                entries += [(task, first + i, p) for i, p in enumerate(task.pages[first:])]
        # Rows may have moved meanwhile, and tasks left.
        self.runner.storage.write_pages(
            [(task.row, index, page) for task, index, page in entries if task.row is not None]
        )

    def _preempt(self, task: Task) -> None:
        """Send a request back to the queue; what it decoded is kept, its pages are not."""
        self.num_preemptions += 1
        self._leave_row(task)
        self._let_go(task)
        later = [other for other in self.waiting if other.number > task.number]
        self.waiting.insert(len(self.waiting) - len(later), task)

    def _start_again(self) -> None:
        """Preempt all: rows may be between two states; what the host knows is not."""
        for task in reversed(list(self.running)):
            self._preempt(task)

    def _admit(self) -> list[Task]:
        """Let waiting requests join in order while rows, pages and the prefill budget last."""
        joined: list[Task] = []
        budget = self._config.prefill_tokens
        while self.waiting and len(self.running) < self._config.max_batch_size:
            task = self.waiting[0]
            prompt = task.asked.prompt
            if any(number < task.number for number in self.pool.wanted_by.values()):
                # Older ones of other lanes come first.
                break
            if task.num_in_flight or any(
                other.fresh_prompt and prompt == other.asked.prompt for other in joined
            ):
                # Its last results are not known yet; or its prompt will be cached by then.
                break
            cached = self.prompts.find(prompt)
            state, _ = self.decoder.begin(task, self._cached_positions(task, cached))
            count = state.end - state.start
            if joined and (count > budget or self._steps_alone > 0):
                break
            has_room = self._has_room(task, state.end, cached)
            alone = self.pool.num_available == self.pool.num_pages
            if not has_room and cached is not None and alone:
                # No sequence holds a page, so the cached prompt may be in its way.
                cached = None
                self.prompts.clear()
                has_room = self._has_room(task, state.end, cached)
            if not has_room:
                self.pool.wanted_by[self._key] = task.number
                break
            self.pool.wanted_by.pop(self._key, None)
            self._place(task, cached)
            joined.append(task)
            budget -= count
        return joined

    def _has_room(self, task: Task, end: int, cached: CachedPrompt | None) -> bool:
        """Whether there are pages for its first two steps and one for each running request."""
        end = min(end + self.decoder.growth(task.asked), task.longest)
        shared = self._cached_positions(task, cached) // self._page_size
        wanted = self._pages_for(end) - shared + len(self.running)
        return self.prompts.make_room(wanted, spared=cached) and self._sizes_with(task) is not None

    def _cached_positions(self, task: Task, cached: CachedPrompt | None) -> int:
        """Positions whose keys it need not compute."""
        if cached is None:
            return 0
        return len(task.asked.prompt) - self.decoder.num_recomputed

    def _place(self, task: Task, cached: CachedPrompt | None) -> None:
        """Give the first of those waiting a row and its first pages."""
        num_cached = self._cached_positions(task, cached)
        state, fully = self.decoder.begin(task, num_cached)
        sizes = self._sizes_with(task)
        assert sizes is not None, "there is room"
        if sizes != self.runner.storage.sizes:
            self.runner.storage = self.runner.storage.resized(sizes)
        storage = self.runner.storage
        row = len(self.running)
        task.row = row
        self.running.append(task)
        self.waiting.popleft()
        storage.write(row, task, state, fully, self.decoder.threshold(task.asked))
        task.state, task.stalled = state, False
        task.fresh_prompt = bool(task.asked.prompt) and cached is None and state.forwards == 0
        if cached is not None and num_cached > 0:
            whole = num_cached // self._page_size
            task.pages = cached.pages[:whole]
            self.pool.share(task.pages)
            if num_cached % self._page_size:
                task.pages += self.pool.take(1)
                self.decoder.cache.copy_page(cached.pages[whole], task.pages[-1])
            rows = storage.rows(row + 1)
            if rows.boundary_BD is not None and cached.boundary_D is not None:
                rows.boundary_BD[row] = cached.boundary_D
        task.pages += self.pool.take(max(self._pages_for(state.end) - len(task.pages), 0))
        storage.write_pages([(row, index, page) for index, page in enumerate(task.pages)])

    def _sizes_with(self, task: Task) -> RowSizes | None:
        storage, least = self.runner.storage, self._least_sizes
        return storage.sizes_with(task.asked, least, alone=not self.running)

    # ------------------------------------------------------------------------------------- run

    def _run(self, joined: list[Task], shape: StepShape | None) -> None:
        """Start the step."""
        self._require_sound()
        if shape is None:
            return
        try:
            pending = self.runner.start(shape)
        except BaseException as error:
            self._start_again()
            if not joined or not isinstance(error, torch.OutOfMemoryError):
                raise
            if len(joined) == 1:
                self._fail(joined[0], f"there is not enough memory for this prompt ({error})")
            else:
                # One of them may be too much where the others are not.
                self._steps_alone = self._next_alone
                self._next_alone = min(2 * self._next_alone, MOST_ALONE)
            return
        self._steps_alone = max(self._steps_alone - 1, 0)
        for task in self.running:
            task.num_in_flight += 1
        self._flights.append(Flight(pending, list(self.running)))
        self._keep_prompts(joined)

    def _keep_prompts(self, joined: list[Task]) -> None:
        """Hold the prompts that this step computes, for requests that bring the same."""
        for task in joined:
            prompt = task.asked.prompt
            if not task.fresh_prompt or task.row is None:
                continue
            rows = self.runner.storage.rows(task.row + 1)
            boundary_D = None
            if rows.boundary_BD is not None:
                boundary_D = rows.boundary_BD[task.row].clone()
            self.prompts.keep(prompt, task.pages[: self._pages_for(len(prompt))], boundary_D)

    # ----------------------------------------------------------------------------------- apply

    def _apply(self) -> None:
        """Take over what finished steps report."""
        behind = 1 if self._overlap and self.running else 0
        while len(self._flights) > behind:
            # Taken off the queue once all is known: an interrupt, likeliest while this waits, then
            # loses nothing, as reporting twice changes nothing.
            flight = self._flights[0]
            records, time = flight.pending.read(), flight.pending.time
            for task, record in zip(flight.tasks, records, strict=False):
                if time is not None and record.ran:
                    time.accepted[task.number] = [token.place for token in record.tokens]
                if not task.finished:
                    self._report(task, record)
            self._flights.popleft()
            for task in flight.tasks:
                task.num_in_flight -= 1

    def _report(self, task: Task, record: RowRecord) -> None:
        if not record.ran:
            task.stalled = True
            return
        task.report(record)
        if not record.finite:
            self._fail(task, NOT_FINITE)
            return
        try:
            stops = bool(record.tokens) and task.reaches_stop()
        except RequestError as error:
            self._fail(task, str(error))
            return
        if record.state.done or stops:
            self._finish(task)

    def _fail(self, task: Task, message: str) -> None:
        task.error = RequestError(message)
        self._finish(task)

    def _finish(self, task: Task) -> None:
        self.remove(task)
        self._on_done(task, task.final())

    # ---------------------------------------------------------------------------- rows and pages

    def _leave_row(self, task: Task) -> None:
        """Take a request out of its row; the last row's moves there, so rows have no gaps."""
        row, task.row = task.row, None
        assert row is not None
        last = self.running.pop()
        if last is not task:
            self.running[row], last.row = last, row
        try:
            if last is not task:
                self.runner.storage.move(len(self.running), row)
            else:
                self.runner.storage.clear(row)
        except Exception as error:
            # Whoever takes requests out must be able to, above all after a fault.
            self._fault = error

    def _require_sound(self) -> None:
        if self._fault is not None:
            reason = str(self._fault).partition("\n")[0]
            raise D2FError(
                f"the device failed ({reason}); close the engine and make a new one"
            ) from self._fault

    def _let_go(self, task: Task) -> None:
        self.pool.release(task.pages)
        task.pages = []

    def _pages_for(self, positions: int) -> int:
        return -(-positions // self._page_size)
