"""Requests of mixed lengths that arrive in bursts, with fewer pages than they need."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d2f.engine.engine import Engine
from d2f.engine.request import Output, Request
from d2f.errors import ConfigError
from d2f.evaluation.answering import step_periods
from d2f.evaluation.metrics import percentile


@dataclass(frozen=True, kw_only=True)
class BurstsResult:
    """The answers and the times of a run's requests."""

    answers: list[list[int] | None]
    """Response ids in the order of the requests; None where a request failed."""
    errors: list[str]
    seconds: float
    num_preemptions: int
    steps_ms: list[float]

    def summary(self) -> dict[str, Any]:
        """Summarise the run for a result file."""
        finished = [answer for answer in self.answers if answer is not None]
        return {
            "num_requests": len(self.answers),
            "num_finished": len(finished),
            "errors": self.errors[:5],
            "num_tokens": sum(map(len, finished)),
            "seconds": self.seconds,
            "tokens_per_second": sum(map(len, finished)) / self.seconds,
            "num_preemptions": self.num_preemptions,
            "num_steps": len(self.steps_ms) + 1,
            "step_ms_p50": percentile(self.steps_ms, 50),
            "step_ms_p99": percentile(self.steps_ms, 99),
            "step_ms_max": max(self.steps_ms, default=0.0),
        }


def mixed_requests(
    count: int,
    vocab_size: int,
    *,
    prompt_lengths: tuple[int, int] = (4, 200),
    new_tokens: tuple[int, int] = (16, 256),
    seed: int = 0,
) -> list[Request]:
    """Requests with random prompts, of random lengths, without EOS: each has its full length.

    Example:
        >>> [request] = mixed_requests(1, 96)
        >>> 4 <= len(request.prompt_ids) <= 200
        True
    """
    draw = random.Random(seed)
    return [
        Request(
            prompt_ids=[draw.randrange(vocab_size) for _ in range(draw.randint(*prompt_lengths))],
            max_new_tokens=draw.randint(*new_tokens),
            eos_token_id=(),
        )
        for _ in range(count)
    ]


def run_bursts(
    engine: Engine, requests: Sequence[Request], *, burst: int = 32, steps_between: int = 4
) -> BurstsResult:
    """Let `burst` requests arrive every `steps_between` steps, until all are answered.

    Raises:
        ConfigError: `burst` or `steps_between` is below 1.
    """
    if min(burst, steps_between) < 1:
        raise ConfigError("a burst needs at least 1 request, and 1 step before the next")
    arriving, numbers = list(requests), list[int]()
    outputs: dict[int, Output] = {}
    before, engine_steps = engine.num_preemptions, 0
    with engine.timed() as clock:
        start = time.perf_counter()
        while arriving or len(outputs) < len(numbers):
            if arriving and engine_steps % steps_between == 0:
                numbers += [engine.add(request) for request in arriving[:burst]]
                del arriving[:burst]
            for output in engine.step():
                outputs[output.request_id] = output
            engine_steps += 1
        seconds = time.perf_counter() - start
        steps = clock.times()
    ordered = [outputs[number] for number in numbers]
    return BurstsResult(
        answers=[None if o.result is None else o.result.token_ids for o in ordered],
        errors=[str(o.error) for o in ordered if o.error is not None],
        seconds=seconds,
        num_preemptions=engine.num_preemptions - before,
        steps_ms=step_periods(steps),
    )
