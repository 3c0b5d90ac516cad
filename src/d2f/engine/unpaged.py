"""Strategies without the paged cache, one batch at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from d2f.decoding.batch import BlockView, DecodingBatch, GenerationResult
from d2f.decoding.workspace import Workspace
from d2f.engine.request import Progress, Task
from d2f.errors import RequestError
from d2f.models.transformer import Transformer


class UnpagedLane:
    """Requests of the strategies that keep no pages of the engine's cache.

    It serves batches of waiting requests that run under the same settings, one at a time where the
    strategy takes no more; sequences that are done leave the batch.

    Args:
        model: The model; packed.
        workspace: What batches leave to the next one.
        max_rows: Most requests of a batch.
        on_done: Called with each task that is finished or failed, and its result.
    """

    def __init__(
        self,
        model: Transformer,
        workspace: Workspace,
        *,
        max_rows: int,
        on_done: Callable[[Task, GenerationResult | None], None],
    ) -> None:
        self.model, self._workspace = model, workspace
        self._max_rows, self._on_done = max_rows, on_done
        self._fitting_rows = max_rows
        """Most rows that memory holds, as far as is known; at most `max_rows`."""
        self.waiting: deque[Task] = deque()
        self._batch: DecodingBatch | None = None
        self._rows: list[Task | None] = []

    @property
    def num_running(self) -> int:
        """Requests of the running batch."""
        return sum(task is not None for task in self._rows)

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self.waiting) or self._batch is not None

    @property
    def num_graphs(self) -> int:
        """Shapes of step that are captured."""
        return self._workspace.num_graphs

    def add(self, task: Task) -> None:
        """Queue a request."""
        self.waiting.append(task)

    def remove(self, task: Task) -> None:
        """Take a request out, waiting or running."""
        task.finished = True
        if task in self.waiting:
            self.waiting.remove(task)
        self._rows = [None if other is task else other for other in self._rows]
        if self._batch is not None and not any(self._rows):
            self._batch, self._rows = None, []

    def check(self, task: Task) -> None:
        """No request needs more than there is, as far as is known before it runs."""

    def view(self, task: Task) -> list[BlockView]:
        """The blocks of a request as they stand; none while it waits."""
        if task.final_blocks:
            return task.final_blocks
        if self._batch is None or task not in self._rows:
            return []
        return self._batch.view(self._rows.index(task))

    def progress(self, task: Task) -> Progress:
        """Return the tokens and forwards so far of a request; none if it is not in the batch."""
        if self._batch is None or task not in self._rows:
            return Progress(token_ids=[], num_forwards=0)
        row = self._rows.index(task)
        tokens = [token for block in self._batch.view(row) for token in block.token_ids]
        token_ids = task.up_to_end(tokens)
        return Progress(token_ids=token_ids, num_forwards=self._batch.num_forwards[row])

    def step(self) -> None:
        """One model call for the running batch.

        If it breaks off, the requests of the batch start again with the next step: in batches of
        half as many if memory did not hold them; a lone one is then failed.
        """
        try:
            batch = self._select()
            if batch is not None:
                batch.step()
                self._apply(batch)
        except BaseException as error:
            tasks = self._start_again()
            if not tasks or not isinstance(error, torch.OutOfMemoryError):
                raise
            self._make_do(tasks, error)

    def _select(self) -> DecodingBatch | None:
        """The running batch, or a new one of compatible waiting requests."""
        if self._batch is None and self.waiting:
            first = self.waiting[0]
            fits = [
                task
                for task in self.waiting
                if task.strategy is first.strategy and task.asked.joins(first.asked)
            ]
            most = first.strategy.max_rows or self._max_rows
            chosen = fits[: min(most, self._fitting_rows)]
            self._rows = list(chosen)
            self.waiting = deque(task for task in self.waiting if task not in chosen)
            for task in chosen:
                task.tokens = []
            asked = [task.asked for task in chosen]
            decoder = first.strategy.decoder_class
            self._batch = decoder(self.model, asked, self._workspace, first.asked.options)
        return self._batch

    def _make_do(self, tasks: list[Task], error: BaseException) -> None:
        """Halve the batch for which memory did not last, or fail its only request."""
        if len(tasks) > 1:
            self._fitting_rows = len(tasks) // 2
            return
        [task] = tasks
        # It was too much, not the others that ran with it.
        self._fitting_rows = self._max_rows
        self.remove(task)
        task.error = RequestError(f"there is not enough memory for this request ({error})")
        self._on_done(task, None)

    def _start_again(self) -> list[Task]:
        """Put the running requests back: their batch may be between two states, or be done."""
        tasks = [task for task in self._rows if task is not None and not task.finished]
        for task in reversed(tasks):
            task.final_blocks, task.error = [], None
            if task not in self.waiting:
                self.waiting.appendleft(task)
        self._batch, self._rows = None, []
        return tasks

    def _apply(self, batch: DecodingBatch) -> None:
        """Hand out what is done; drop finished sequences once they are half of the batch."""
        for row, done in enumerate(batch.finished()):
            task = self._rows[row]
            if task is None:
                continue
            result = None
            try:
                if not _stops(batch, row, task) and not done:
                    continue
                result = task.cut_at_stop(batch.results([row])[0])
            except RequestError as error:
                task.error = error
            task.final_blocks = batch.view(row)
            self._on_done(task, result)
            task.finished = True
            self._rows[row] = None
        left = [row for row, task in enumerate(self._rows) if task is not None]
        if not left:
            self._batch, self._rows = None, []
        elif len(left) <= len(self._rows) // 2:
            batch.select(left)
            self._rows = [self._rows[row] for row in left]


def _stops(batch: DecodingBatch, row: int, task: Task) -> bool:
    """Whether what a running request has decoded by now holds a stop string that ends it."""
    if not task.ends_at_stop:
        return False
    num_decoded = len(task.decoded())
    task.tokens = [token for block in batch.view(row) for token in block.token_ids]
    return len(task.decoded()) > num_decoded and task.reaches_stop()
