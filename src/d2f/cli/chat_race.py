"""The race of `d2f chat`: answer one prompt by several strategies, one after the other."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from d2f.cli.console import plain_table
from d2f.decoding.batch import GenerationResult
from d2f.engine.engine import Engine
from d2f.engine.request import Request

if TYPE_CHECKING:
    from rich.console import Console

    from d2f.text import Tokenizer

_WARM_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Finish:
    """The answer of one strategy and its time."""

    strategy: str
    result: GenerationResult
    seconds: float


def run_race(
    engine: Engine, requests: Mapping[str, Request], stopped: Callable[[], bool]
) -> Iterator[Finish]:
    """Answer the requests one after the other, each after a warm-up and without a cached prompt.

    Args:
        engine: The engine, which has no other requests.
        requests: Strategy -> request.
        stopped: Called after each forward; if it returns True the race ends and the running
            request is removed from the engine.

    Yields:
        The result of each strategy when it is finished.

    Raises:
        RequestError: A request cannot be served.
    """
    for name, request in requests.items():
        few = min(_WARM_TOKENS, request.max_new_tokens)
        if answer(engine, dataclasses.replace(request, max_new_tokens=few), stopped) is None:
            return
        engine.forget_prompts()
        start = time.perf_counter()
        result = answer(engine, request, stopped)
        if result is None:
            return
        yield Finish(strategy=name, result=result, seconds=time.perf_counter() - start)


def answer(
    engine: Engine, request: Request, stopped: Callable[[], bool]
) -> GenerationResult | None:
    """Return the answer to a request without showing it; None if it was stopped.

    Raises:
        RequestError: The request cannot be served.
    """
    number = engine.add(request)
    try:
        while not stopped():
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                return output.result
    finally:
        engine.abort(number)
    return None


def print_race(console: Console, finishes: list[Finish], tokenizer: Tokenizer) -> None:
    """Print a table of speeds, and each distinct answer with the strategies that gave it."""
    from d2f.cli.live import harmless

    gap = 2 if console.width >= 70 else 1
    columns = (
        "tokens", "forwards", "tokens/\nforward", "ms/\nforward", "s", "tokens\nper s"
    )  # fmt: skip
    table = plain_table(gap, names=[""], numbers=columns)
    answers: dict[str, list[str]] = {}
    for finish in finishes:
        result, count = finish.result, len(finish.result.token_ids)
        table.add_row(
            finish.strategy,
            str(count),
            str(result.num_forwards),
            f"{result.tokens_per_forward:.2f}",
            f"{1000 * finish.seconds / max(result.num_forwards, 1):.2f}",
            f"{finish.seconds:.3f}",
            f"{count / finish.seconds:.0f}",
        )
        text = harmless(tokenizer.decode(result.token_ids))
        answers.setdefault(text, []).append(finish.strategy)
    console.print(table)
    for text, names in answers.items():
        console.print(f"\n[bold]{', '.join(names)}[/bold]")
        console.print(text, markup=False, highlight=False, emoji=False)
