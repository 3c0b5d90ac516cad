"""Answer problems with an engine: the one loop that adds requests and takes steps."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from d2f.engine.clock import StepTime
from d2f.engine.engine import Engine, EngineConfig
from d2f.engine.request import Output, Request
from d2f.errors import ConfigError, RequestError
from d2f.models.transformer import Transformer
from d2f.text import Tokenizer

MOST_WARM_UPS = 4


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one problem, or the reason why it has none."""

    index: int
    """Number of the problem."""
    request_id: int | None = None
    """Number of the request in the engine; None if the engine refused it."""
    token_ids: Sequence[int] = ()
    num_forwards: int = 0
    num_prefill_forwards: int = 0
    num_query_tokens: int = 0
    num_decoded_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    """Reason why there is no answer."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer, up to and with its first EOS or up to its stop string."""
        return len(self.token_ids)


class Answering:
    """Problems on their way through an engine.

    Args:
        engine: Answers them.
        indices: Numbers of the problems, in the order in which they are put; each is asked for
            when there is room for it.
        make_request: The request of a problem; may raise `RequestError`.
        most: Problems that the engine holds at once; None: twice its batch, so that one joins the
            moment another is done, or 1 at a batch of 1.
        retry: Try problems one by one after a step with several of them broke off. Otherwise the
            error is raised.

    Example:
        >>> from d2f.testing import tiny_model
        >>> engine = Engine(tiny_model("llada"))
        >>> make = lambda index: Request(prompt_ids=[index], max_new_tokens=4)
        >>> sorted(a.index for done, _ in Answering(engine, [7, 9], make) for a in done)
        [7, 9]
    """

    def __init__(
        self,
        engine: Engine,
        indices: Iterable[int],
        make_request: Callable[[int], Request],
        *,
        most: int | None = None,
        retry: bool = True,
    ) -> None:
        batch = engine.config.max_batch_size
        self._most = most or (batch if batch == 1 else 2 * batch)
        self._engine, self._make, self._retry = engine, make_request, retry
        self._waiting = iter(indices)
        self._drained = False
        self._alone: deque[int] = deque()
        """Problems that were together in a step that broke off; they try again one by one."""
        self._running: dict[int, int] = {}
        """Number of the problem by number of the request."""

    def __iter__(self) -> Generator[tuple[list[Answer], float], None, None]:
        """Yield finished answers, and the engine's seconds since the last ones.

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

    def _admit(self) -> list[Answer]:
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
                failed.append(Answer(index=index, error=str(error)))
        return failed

    def _step(self) -> list[Answer]:
        try:
            outputs = self._engine.step()
        except ConfigError:
            raise
        except Exception as error:  # whatever a device or a kernel raises: memory, most of all
            if not self._retry:
                raise
            together = list(self._running.values())
            self._abort()
            if len(together) > 1:
                self._alone.extend(together)
                return []
            return [Answer(index=together[0], error=f"{type(error).__name__}: {error}")]
        return [self._answer(output) for output in outputs]

    def _answer(self, output: Output) -> Answer:
        number, result = output.request_id, output.result
        index = self._running.pop(number)
        if result is None:
            return Answer(index=index, request_id=number, error=str(output.error))
        return Answer(
            index=index,
            request_id=number,
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


def answer_all(engine: Engine, requests: Sequence[Request]) -> tuple[list[Answer], float]:
    """Hand all requests to an engine at once, and wait for all answers.

    Returns:
        The answers in the order of the requests, and the engine's seconds.

    Raises:
        RequestError: A request cannot be served.

    Example:
        >>> from d2f.testing import tiny_model
        >>> engine = Engine(tiny_model("llada"))
        >>> answers, _ = answer_all(engine, [Request(prompt_ids=[7], max_new_tokens=4)])
        >>> answers[0].num_tokens
        4
    """
    answers: list[Answer] = []
    seconds = 0.0
    most = max(len(requests), 1)
    running = Answering(engine, range(len(requests)), requests.__getitem__, most=most, retry=False)
    with closing(iter(running)) as rounds:
        for finished, spent in rounds:
            failed = next((answer.error for answer in finished if answer.error is not None), None)
            if failed is not None:
                raise RequestError(failed)
            answers += finished
            seconds += spent
    return sorted(answers, key=lambda answer: answer.index), seconds


def warm_up(
    engine: Engine, indices: Sequence[int], make_request: Callable[[int], Request]
) -> dict[int, str]:
    """Answer problems until the engine captures nothing new, and forget their prompts.

    The result says why a problem has no answer, by its number.
    """
    failed: dict[int, str] = {}
    for _ in range(MOST_WARM_UPS):
        known = engine.num_graphs
        todo = [index for index in indices if index not in failed]
        for finished, _ in Answering(engine, todo, make_request, most=max(len(todo), 1)):
            failed |= {found.index: found.error for found in finished if found.error is not None}
        engine.forget_prompts()
        if engine.num_graphs == known:
            break
    return failed


@dataclass(frozen=True, kw_only=True)
class Run:
    """The answers to requests that were put together, and the clock of all steps."""

    answers: list[Answer]
    """Answers in the order of the requests."""
    seconds: float
    decode_tokens: int
    """Tokens of the answers that came from a step without any prompt."""
    decode_seconds: float
    """Seconds from the end of a step to the end of the next, over all steps without a prompt."""
    steps_ms: list[float]
    """Milliseconds from the end of a step to the end of the next, of all steps."""
    num_preemptions: int
    num_captured: int
    """Graphs captured within the run, which it should not have to."""
    accepted: list[list[int]]
    """Number of tokens that each forward filled, one list for each request."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(answer.num_tokens for answer in self.answers)

    @property
    def num_forwards(self) -> int:
        """Forwards, summed over the requests."""
        return sum(answer.num_forwards for answer in self.answers)

    @property
    def num_query_tokens(self) -> int:
        """Tokens computed in these forwards."""
        return sum(answer.num_query_tokens for answer in self.answers)


def timed_run(engine: Engine, requests: Sequence[Request]) -> Run:
    """Answer all requests together, with the clock of the steps on; no prompt is cached before.

    Raises:
        RequestError: A request cannot be served.
    """
    engine.forget_prompts()
    before, graphs = engine.num_preemptions, engine.num_graphs
    with engine.timed() as clock:
        answers, seconds = answer_all(engine, requests)
        steps = clock.times()
    lengths = {answer.request_id: answer.num_tokens for answer in answers}
    tokens, spent = _decode_only(steps, lengths)
    return Run(
        answers=answers,
        seconds=seconds,
        decode_tokens=tokens,
        decode_seconds=spent,
        steps_ms=step_periods(steps),
        num_preemptions=engine.num_preemptions - before,
        num_captured=max(engine.num_graphs - graphs, 0),
        accepted=[
            [len(step.accepted[number]) for step in steps if number in step.accepted]
            for number in lengths
        ],
    )


def step_periods(steps: Sequence[StepTime]) -> list[float]:
    """Give the milliseconds from the end of each step to the end of the next one."""
    return [1000 * (other.end - one.end) for one, other in itertools.pairwise(steps)]


def _decode_only(steps: Sequence[StepTime], lengths: Mapping[int | None, int]) -> tuple[int, float]:
    tokens, seconds = 0, 0.0
    for one, step in zip([None, *steps], steps, strict=False):
        if step.shape.prefill:
            continue
        seconds += step.end - (step.begin if one is None else one.end)
        tokens += sum(
            index < lengths[number]
            for number, indices in step.accepted.items()
            for index in indices
        )
    return tokens, seconds


def fitted_engine(
    model: Transformer,
    config: EngineConfig,
    tokenizer: Tokenizer | None = None,
    *,
    longest: int,
    memory_share: float,
) -> Engine:
    """Make an engine with no larger a cache than a full batch of `longest` positions can fill.

    It takes at most `memory_share` of the free memory; another engine may come.
    """
    lengths = [longest] * config.max_batch_size
    return Engine(model, config.fitted(model, lengths, memory_share=memory_share), tokenizer)
