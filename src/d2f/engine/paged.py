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

from d2f.decoding.alternatives import MOST_ALTERNATIVES
from d2f.decoding.paged import PagedDecoder, StepShape, TokenRecord
from d2f.decoding.rows import RowSizes, RowStorage
from d2f.engine.pages import CachedPrompt, PagePool, PromptCache
from d2f.engine.runner import Pending, Runner
from d2f.engine.sizing import FREE_TOKENS, power_of_two, round_up
from d2f.engine.task import Task
from d2f.errors import D2FError, RequestError, counted
from d2f.models.cache import DUMP_PAGE

USUAL_SIZES = RowSizes(num_blocks=32, block_size=32, prompt_length=1, num_eos=4)
"""Room of a row that is there from the start where graphs are captured."""
MOST_PLACES = 2**24
"""Most response positions of all rows together; a request that needs more room than that beside
those running waits for them."""


@dataclass(frozen=True, eq=False)
class Flight:
    """A step that was started, and whose rows it ran."""

    pending: Pending
    tasks: list[Task]


class PagedLane:
    """The requests that are decoded on the paged cache.

    Args:
        decoder: The strategy; its model and cache are used.
        max_rows: Most requests that run at once.
        prefill_tokens: Most tokens that joining requests add to a step; one alone may have more.
        use_graphs: Replay captured graphs.
        overlap: Read a step's results while the next one runs, and size steps by bounds.
        on_done: Called with each task that is finished or failed.
    """

    def __init__(
        self,
        decoder: PagedDecoder,
        *,
        max_rows: int,
        prefill_tokens: int,
        use_graphs: bool,
        overlap: bool,
        on_done: Callable[[Task], None],
    ) -> None:
        self.decoder, self._on_done = decoder, on_done
        self._max_rows, self._prefill_tokens, self._overlap = max_rows, prefill_tokens, overlap
        model, cache = decoder.model, decoder.cache
        self._page_size = cache.page_size
        self.pool = PagePool(range(DUMP_PAGE + 1, cache.num_pages))
        self.prompts = PromptCache(self.pool)
        longest = min(model.spec.max_positions, self.pool.num_pages * cache.page_size)
        self._max_end = -(-longest // cache.page_size) * cache.page_size
        self._least_sizes = RowSizes(num_blocks=1, block_size=1, prompt_length=1, num_eos=1)
        if use_graphs:
            # Graphs are lost when rows need more room, so most requests should find enough.
            self._least_sizes = replace(USUAL_SIZES, prompt_length=power_of_two(self._max_end))
        mask = model.spec.mask_token_id
        storage = RowStorage(
            self._least_sizes,
            max_rows=max_rows,
            num_pages=self._max_end // cache.page_size,
            mask_token_id=0 if mask is None else mask,
            boundary_size=model.spec.hidden_size if model.spec.architecture.shifted else None,
            dtype=model.dtype,
            device=model.device,
        )
        self.runner = Runner(decoder, storage, use_graphs=use_graphs)
        self.waiting: deque[Task] = deque()
        self.running: list[Task] = []
        """By row."""
        self._flights: deque[Flight] = deque()
        self.num_preemptions = 0
        self._fault: Exception | None = None
        """The device failed to take a row out, so its rows are not what the host knows."""
        self._joining_alone = False
        """Memory ran out once when several requests joined together."""

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
                f"the prompt's {counted(len(task.request.prompt_ids), 'token')} and max_new_tokens "
                f"{task.request.max_new_tokens} need {needed} pages of the key/value cache, which "
                f"has {pages} of {counted(self._page_size, 'token')}; shorten the prompt, lower "
                "max_new_tokens or give the engine more with kv_cache_bytes"
            )

    def add(self, task: Task) -> None:
        """Queue a request."""
        task.tokens = [None] * task.request.max_new_tokens
        task.probabilities = [None] * task.request.max_new_tokens
        if task.request.num_alternatives:
            task.alternatives = [()] * task.request.max_new_tokens
        self.waiting.append(task)

    def remove(self, task: Task) -> None:
        """Take a request out, waiting or running; its pages are free at once.

        It does so even if the device is broken.
        """
        task.finished = True
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
        return joined, self._shape() if self.running else None

    def _secure_pages(self) -> None:
        """Pages for all that the next step may write; the youngest give way to older ones."""
        entries = []
        for task in sorted(self.running, key=lambda task: task.number):
            if task.row is None:
                continue
            missing = self._pages_for(task.span()[1]) - len(task.pages)
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
        budget = self._prefill_tokens
        while self.waiting and len(self.running) < self._max_rows:
            task = self.waiting[0]
            prompt = task.request.prompt_ids
            if task.num_in_flight or any(
                other.fresh_prompt and prompt == other.request.prompt_ids for other in joined
            ):
                # Its last results are not known yet; or its prompt will be cached by then.
                break
            cached = self.prompts.find(prompt)
            values, _ = self.decoder.begin(task.row_start(self._cached_positions(task, cached)))
            count = values["end"] - values["start"]
            if joined and (count > budget or self._joining_alone):
                break
            if not self._has_room(task, values["end"], cached):
                if cached is None or self.running:
                    break
                # It is alone, and the cached prompt is in its way.
                cached = None
                self.prompts.clear()
            self._place(task, cached)
            joined.append(task)
            budget -= count
        return joined

    def _has_room(self, task: Task, end: int, cached: CachedPrompt | None) -> bool:
        """Whether there are pages for its first two steps and one for each running request."""
        policy = task.request.policy
        assert policy is not None
        ahead = 1 if task.is_autoregressive else policy.block_size
        end = min(end + ahead, task.longest)
        shared = self._cached_positions(task, cached) // self._page_size
        wanted = self._pages_for(end) - shared + len(self.running)
        if not self.prompts.make_room(wanted, spared=cached):
            return False
        return not self.running or self._places(self._sizes_with(task)) <= MOST_PLACES

    def _cached_positions(self, task: Task, cached: CachedPrompt | None) -> int:
        """Positions whose keys it need not compute."""
        if cached is None:
            return 0
        # Autoregression computes the last token again: it needs its hidden state.
        return len(task.request.prompt_ids) - task.is_autoregressive

    def _place(self, task: Task, cached: CachedPrompt | None) -> None:
        """Give the first of those waiting a row and its first pages."""
        num_cached = self._cached_positions(task, cached)
        start = task.row_start(num_cached)
        values, fully = self.decoder.begin(start)
        sizes = self._sizes_with(task)
        if sizes != self.runner.storage.sizes:
            self.runner.storage = self.runner.storage.resized(sizes)
        storage = self.runner.storage
        row = len(self.running)
        task.row = row
        self.running.append(task)
        self.waiting.popleft()
        storage.write(row, start, values, fully)
        task.num_opened, task.num_complete = values["opened"], values["complete"]
        task.start, task.end, task.stalled = values["start"], values["end"], False
        task.fresh_prompt = bool(start.prompt) and cached is None and task.num_forwards == 0
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
        task.pages += self.pool.take(max(self._pages_for(task.end) - len(task.pages), 0))
        storage.write_pages([(row, index, page) for index, page in enumerate(task.pages)])

    def _sizes_with(self, task: Task) -> RowSizes:
        """Room for a request beside those running; on a GPU room only grows, by powers of two."""
        sizes = RowSizes.of(task.row_start(0)).union(self._least_sizes)
        if self.runner.storage.device.type == "cuda":
            sizes = RowSizes(**{name: power_of_two(value) for name, value in vars(sizes).items()})
        both = sizes.union(self.runner.storage.sizes)
        if self.running:
            return both
        # Alone, it need not bear with what former requests needed.
        keeps = self.runner.storage.device.type == "cuda" and self._places(both) <= MOST_PLACES
        return both if keeps else sizes

    def _places(self, sizes: RowSizes) -> int:
        return self._max_rows * sizes.num_blocks * sizes.block_size

    def _shape(self) -> StepShape:
        """The size of the next step: exact on a CPU, the smallest captured one that fits else."""
        spans = [task.span() for task in self.running]
        requests = [task.request for task in self.running]
        prompts = [len(request.prompt_ids) for request in requests]
        prefill = any(start < prompt for (start, _), prompt in zip(spans, prompts, strict=True))
        if prefill or any(task.stalled for task in self.running):
            # Nothing may sit out: a step that reads prompts must not be mistaken for another.
            spans = [(min(t.start, s), e) for t, (s, e) in zip(self.running, spans, strict=True)]
        counts = [end - start for start, end in spans]
        autoregressive = self.running[0].is_autoregressive
        candidates = len(self.running)
        if not autoregressive and self._overlap:
            candidates = sum(
                end - max(start, prompt)
                for (start, end), prompt in zip(spans, prompts, strict=True)
            )
        elif not autoregressive:
            candidates = max(sum(task.num_masked() for task in self.running), 1)
        num_rows, tokens, longest, end = (
            len(self.running), sum(counts), max(counts), max(e for _, e in spans),
        )  # fmt: skip
        if self._overlap:
            num_rows = min(power_of_two(num_rows), self._max_rows)
            end = self._max_end
            if not prefill:
                tokens = self._bucket(counts)
                longest = 1 if autoregressive else min(max(power_of_two(longest), 64), tokens)
                candidates = tokens
            elif self.runner.captures_prompts(num_rows, tokens):
                # Few shapes: what may be larger than it need be is.
                tokens, candidates = round_up(tokens), max(power_of_two(candidates), 32)
                longest = tokens
        return StepShape(
            num_rows=num_rows,
            num_tokens=tokens,
            num_candidates=num_rows if autoregressive else candidates,
            max_count=longest,
            max_end=end,
            prefill=prefill,
            sampled=any(request.temperature > 0 for request in requests),
            truncated=any(
                request.temperature > 0
                and (request.top_k > 0 or request.top_p < 1 or request.min_p > 0)
                for request in requests
            ),
            ranked=any(
                request.policy is not None and request.policy.confidence != "probability"
                for request in requests
            ),
            # All that may be asked for, so that there are few shapes.
            num_alternatives=min(MOST_ALTERNATIVES, self.decoder.model.spec.vocab_size)
            if any(request.num_alternatives for request in requests)
            else 0,
        )

    def _bucket(self, counts: list[int]) -> int:
        """Query tokens of a step without a prompt.

        A bound for all rows would compute up to a block more for each of them. Where tokens cost,
        what the rows had last and an eighth more must do; rows that do not fit sit one step out,
        and the next step then has room for all.
        """
        bound = sum(counts)
        if bound > FREE_TOKENS and not any(task.stalled for task in self.running):
            known = sum(task.end - task.start for task in self.running)
            bound = min(bound, max(known + known // 8, FREE_TOKENS, max(counts)))
        return round_up(bound)

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
                self._joining_alone = True
            return
        for task in self.running:
            task.num_in_flight += 1
        self._flights.append(Flight(pending, list(self.running)))
        self._keep_prompts(joined)

    def _keep_prompts(self, joined: list[Task]) -> None:
        """Hold the prompts that this step computes, for requests that bring the same."""
        for task in joined:
            prompt = task.request.prompt_ids
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
            tables, records = flight.pending.read()
            tokens: dict[int, list[TokenRecord]] = {}
            for record in records:
                tokens.setdefault(record.row, []).append(record)
            time = flight.pending.time
            for row, task in enumerate(flight.tasks):
                if time is not None and tables[row]["ran"]:
                    time.accepted[task.number] = [token.place for token in tokens.get(row, [])]
                if not task.finished:
                    self._report(task, tables[row], tokens.get(row, []))
            self._flights.popleft()
            for task in flight.tasks:
                task.num_in_flight -= 1

    def _report(self, task: Task, table: dict[str, int], tokens: list[TokenRecord]) -> None:
        if not table["ran"]:
            task.stalled = True
            return
        task.report(table, tokens)
        if not table["finite"]:
            self._fail(
                task,
                "the model's logits are not finite, so there is no answer; its weights may be "
                "broken, or the temperature too close to 0",
            )
            return
        try:
            stops = bool(tokens) and task.reaches_stop()
        except RequestError as error:
            self._fail(task, str(error))
            return
        if table["done"] or stops:
            self._finish(task)

    def _fail(self, task: Task, message: str) -> None:
        task.error = RequestError(message)
        self._finish(task)

    def _finish(self, task: Task) -> None:
        self.remove(task)
        self._on_done(task)

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
