"""Services of tiny models, and engines that do as a test wants."""

from __future__ import annotations

import asyncio
import functools
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from d2f import Engine, EngineConfig, Request
from d2f.serving.metrics import Metrics
from d2f.serving.served_model import ServedModel
from d2f.serving.service import Service
from d2f.testing import tiny_model, write_tokenizer
from d2f.text import Tokenizer


@functools.cache
def cached_model(name: str = "llada"):
    return tiny_model(name)


@functools.cache
def tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.load(write_tokenizer(folder))


def served(name: str = "tiny", *, family: str = "llada", strategy: str = "pipelined", **settings):
    settings = {"max_batch_size": 8, "page_size": 4, "kv_cache_bytes": 1_000_000} | settings
    engine = Engine(cached_model(family), EngineConfig(**settings), tokenizer())
    return ServedModel(name=name, engine=engine, tokenizer=tokenizer(), strategy=strategy)


@asynccontextmanager
async def running(*models: ServedModel, **settings) -> AsyncIterator[Service]:
    """A service that is ready; ended at once afterwards."""
    settings.setdefault("metrics", Metrics([model.name for model in models]))
    service = Service(models, **settings)
    service.start()
    await service.ready()
    try:
        yield service
    finally:
        await service.stop(0)


class Gate:
    """Holds an engine before each step until it is let through."""

    def __init__(self, engine: Engine) -> None:
        self._permits = threading.Semaphore(0)
        self._step, self._open = engine.step, False
        self.num_arrived = 0
        engine.step = self.step

    def step(self):
        self.num_arrived += 1
        if not self._open:
            self._permits.acquire()
        return self._step()

    def let(self, count: int) -> None:
        self._permits.release(count)

    def open(self) -> None:
        self._open = True
        self._permits.release()


def break_steps(engine: Engine, after: int, error: Exception) -> None:
    """Let some steps succeed and all later ones fail."""
    step, left = engine.step, [after]

    def broken():
        if left[0] == 0:
            raise error
        left[0] -= 1
        return step()

    engine.step = broken


def count_calls(function: Callable) -> tuple[Callable, list[int]]:
    """A function that counts its calls in a list of one number."""
    calls = [0]

    def counting(*args, **kwargs):
        calls[0] += 1
        return function(*args, **kwargs)

    return counting, calls


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what another thread brings about."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def all_free(model: ServedModel) -> bool:
    status = model.engine.status()
    idle = status.num_waiting == status.num_running == 0
    return idle and status.num_free_pages == status.num_pages > 0


def request(first: int = 1, *, length: int = 24, **settings) -> Request:
    """One without EOS: its response has its full length."""
    return Request(
        prompt_ids=[first, 2, 3],
        max_new_tokens=length,
        **({"eos_token_id": ()} | settings),
    )
