"""Problems through an engine: as many at a time as it takes, none lost when one fails."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from d2f.engine.engine import Engine
from d2f.engine.request import Output, Request
from d2f.errors import ConfigError, RequestError


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What became of one problem."""

    index: int
    token_ids: tuple[int, ...] = ()
    num_forwards: int = 0
    num_prefill_forwards: int = 0
    num_query_tokens: int = 0
    num_decoded_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    """Why there is no answer."""


class Answering:
    """Problems on their way through an engine.

    Args:
        engine: Answers them.
        indices: Numbers of the problems, in the order in which they are put; each is asked for
            when there is room for it.
        make_request: The request of a problem; may raise `RequestError`.
        most: Problems that the engine holds at once; above its batch size others wait in it, so
            that one joins the moment another is done.

    Example:
        >>> from d2f.testing import tiny_model
        >>> engine = Engine(tiny_model("llada"))
        >>> make = lambda index: Request(prompt_ids=[index], max_new_tokens=4)
        >>> sorted(a.index for done, _ in Answering(engine, [7, 9], make, most=2) for a in done)
        [7, 9]
    """

    def __init__(
        self,
        engine: Engine,
        indices: Iterable[int],
        make_request: Callable[[int], Request],
        *,
        most: int,
    ) -> None:
        self._engine, self._make, self._most = engine, make_request, most
        self._waiting = iter(indices)
        self._drained = False
        self._alone: deque[int] = deque()
        """Problems that were together in a step that broke off; they try again one by one."""
        self._running: dict[int, int] = {}
        """Number of the problem by number of the request."""

    def __iter__(self) -> Iterator[tuple[list[Answered], float]]:
        """Whenever some are finished: these, and the engine's seconds since the last time.

        Raises:
            ConfigError: No problem can be answered under these settings.
        """
        seconds = 0.0
        try:
            while not self._drained or self._alone or self._running:
                start = time.perf_counter()
                finished = self._admit()
                if self._running:
                    finished += self._step()
                seconds += time.perf_counter() - start
                if finished:
                    yield finished, seconds
                    seconds = 0.0
        finally:
            self._abort()

    def _admit(self) -> list[Answered]:
        """Put as many problems as fit; those that cannot be put have failed."""
        alone = bool(self._alone)
        most = 1 if alone else self._most
        failed = []
        while len(self._running) < most:
            if alone:
                index = self._alone.popleft() if self._alone else None
            else:
                index = next(self._waiting, None)
                self._drained = index is None
            if index is None:
                break
            try:
                self._running[self._engine.add(self._make(index))] = index
            except RequestError as error:
                failed.append(Answered(index=index, error=str(error)))
        return failed

    def _step(self) -> list[Answered]:
        try:
            outputs = self._engine.step()
        except ConfigError:
            raise
        except Exception as error:  # whatever a device or a kernel raises: memory, most of all
            together = list(self._running.values())
            self._abort()
            if len(together) > 1:
                self._alone.extend(together)
                return []
            return [Answered(index=together[0], error=f"{type(error).__name__}: {error}")]
        return [self._answered(output) for output in outputs]

    def _answered(self, output: Output) -> Answered:
        index, result = self._running.pop(output.request_id), output.result
        if result is None:
            return Answered(index=index, error=str(output.error))
        return Answered(
            index=index,
            token_ids=tuple(result.token_ids),
            num_forwards=result.num_forwards,
            num_prefill_forwards=result.num_prefill_forwards,
            num_query_tokens=result.num_query_tokens,
            num_decoded_tokens=result.num_decoded_tokens,
            finish_reason=result.finish_reason,
        )

    def _abort(self) -> None:
        for number in self._running:
            self._engine.abort(number)
        self._running.clear()
