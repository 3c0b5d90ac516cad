"""A process of its own that loads a server with requests from many clients at once.

Run as a program; it reads one JSON object (see `Task`) and answers with one: the seconds that the
load took, the CPU seconds that it cost here, and every request's answer. What comes over the wire
is read for its meaning only after the last answer, so that it costs the server no time.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from d2f.evaluation.http_exchange import Connection, Exchange
from d2f.evaluation.served_answer import read_answer

_PAUSE = 0.25
"""Seconds before a client tries again after an error that names no time."""
_LONGEST_PAUSE = 5.0
"""Seconds that a client waits at most, whatever the server asks for."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to ask, how, and for how long."""

    host: str
    port: int
    path: str
    headers: dict[str, str]
    bodies: list[dict[str, Any]]
    """One for each prompt; the clients take them in turn, together."""
    first: int
    """Number of the prompt that is asked first."""
    streamed: bool
    num_clients: int
    seconds: float | None
    """Until when clients begin requests; None: until each prompt was asked once."""
    timeout: float
    """Seconds of one request at most."""

    def request(self, prompt: int) -> bytes:
        """Head and body."""
        body = json.dumps(self.bodies[prompt]).encode()
        headers = {
            "Host": f"{self.host}:{self.port}",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **self.headers,
        }
        lines = [f"POST {self.path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode() + body


async def load(task: Task) -> list[tuple[int, Exchange]]:
    """Each request's prompt and exchange, in the order of their ends."""
    found: list[tuple[int, Exchange]] = []
    requests = [task.request(prompt) for prompt in range(len(task.bodies))]
    prompts: Iterator[int] = itertools.cycle(
        [*range(task.first, len(requests)), *range(task.first)]
    )
    if task.seconds is None:
        prompts = itertools.islice(prompts, len(requests))
    until = float("inf") if task.seconds is None else time.perf_counter() + task.seconds

    async def client() -> None:
        connection = Connection(task.host, task.port)
        for prompt in prompts:
            if time.perf_counter() >= until:
                break
            exchange = await connection.ask(requests[prompt], timeout=task.timeout)
            found.append((prompt, exchange))
            if exchange.status != 200:
                await asyncio.sleep(min(_pause(exchange), max(until - time.perf_counter(), 0)))
        connection.close()

    await asyncio.gather(*(client() for _ in range(task.num_clients)))
    return found


def _pause(exchange: Exchange) -> float:
    """Seconds to wait after an answer that is none."""
    asked = exchange.headers.get("retry-after", "")
    return min(float(asked), _LONGEST_PAUSE) if asked.isdigit() else _PAUSE


def run(task: Task) -> dict[str, Any]:
    """Load the server; the answers and what they took."""
    start = time.perf_counter()
    found = asyncio.run(load(task))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time()
    answers = [
        read_answer(exchange, prompt=prompt, start=start, streamed=task.streamed).to_dict()
        for prompt, exchange in found
    ]
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "answers": answers}


def main() -> None:
    """Read the task, do it, report."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever is printed is no reply
    with replies:
        json.dump(run(Task(**json.load(sys.stdin))), replies)


if __name__ == "__main__":
    main()
