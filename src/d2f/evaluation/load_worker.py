"""A process of its own that loads a server with requests from many clients at once.

The process reads one JSON object (see `Task`) and answers with one: the seconds that the load took,
the CPU seconds that it cost here, and every request's answer. What came over the wire is read for
its meaning after the last answer only, so that this costs the server no time.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from d2f.evaluation.http_exchange import Connection, Exchange

_PAUSE = 0.25
"""Seconds before a client tries again after an error that names no time."""
_LONGEST_PAUSE = 5.0
"""Seconds that a client waits at most, whatever the server asks for."""
_DONE = "[DONE]"


@dataclass(frozen=True, kw_only=True)
class Task:
    """The requests to make, and for how long."""

    host: str
    port: int
    path: str
    headers: dict[str, str]
    bodies: list[dict[str, Any]]
    """A body for each prompt; all clients together take them in turn."""
    first: int
    """The number of the prompt that is asked first."""
    streamed: bool
    num_clients: int
    seconds: float | None
    """Seconds for which clients begin requests; None: until each prompt was asked once."""
    timeout: float
    """Most seconds of one request."""

    def request(self, prompt: int) -> bytes:
        """The bytes of a prompt's request."""
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
    """Make the requests; returns prompt and exchange of each in the order of their ends."""
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
    """Seconds to wait after a request that was not answered."""
    asked = exchange.headers.get("retry-after", "")
    return min(float(asked), _LONGEST_PAUSE) if asked.isdigit() else _PAUSE


@dataclass(kw_only=True)
class ServedAnswer:
    """One request and its answer, read from what came over the wire."""

    prompt: int
    """The number of the prompt."""
    began: float
    """Seconds from the beginning of the load to that of the request."""
    seconds: float
    """Seconds of the whole request."""
    status: int | None = None
    fault: str | None = None
    """The fault in the form of the answer; its text is judged elsewhere."""
    first_text: float | None = None
    """Seconds until the first committed text."""
    first_text_engine: float | None = None
    """The same by the engine's clock, from the request's first step; None if it was not asked."""
    pieces: list[str] = field(default_factory=list)
    """The texts of the events in their order; a whole answer has one piece."""
    ids: list[str] = field(default_factory=list)
    """The different ids that its events give the answer."""
    choices: list[int] = field(default_factory=list)
    """The different numbers of the choices that had a text or an end."""
    finish_reasons: list[str] = field(default_factory=list)
    """The finish reasons of all events that end a choice."""
    num_done: int = 0
    """The number of events that say that the stream ends; 1 for a whole answer."""
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)


def read_answer(exchange: Exchange, *, prompt: int, start: float, streamed: bool) -> ServedAnswer:
    """Read an answer from the body of an exchange, or put it together from its events.

    `start` is the time of `time.perf_counter` when the load began.

    Example:
        >>> exchange = Exchange(began=0.0, status=200, complete=True, seconds=0.5)
        >>> event = b'data: {"id": "a", "choices": [{"index": 0, "text": "4"}]}'
        >>> exchange.parts = [(0.2, event), (0.3, bytes([10, 10]))]
        >>> answer = read_answer(exchange, prompt=0, start=0.0, streamed=True)
        >>> answer.text, answer.first_text
        ('4', 0.3)
    """
    answer = ServedAnswer(
        prompt=prompt,
        began=exchange.began - start,
        seconds=exchange.seconds,
        status=exchange.status,
        fault=exchange.fault,
    )
    if exchange.status != 200:
        answer.fault = answer.fault or _message(exchange)
        return answer
    try:
        if streamed:
            for seconds, event in _events(exchange):
                _take_event(answer, event, seconds)
        else:
            _take(answer, json.loads(exchange.body), exchange.seconds)
            answer.num_done = 1
    except (ValueError, LookupError, TypeError, AttributeError):
        answer.fault = answer.fault or "the answer is not in OpenAI's form"
    return answer


def _events(exchange: Exchange) -> Iterator[tuple[float, str]]:
    """The data of each event with the time at which its last byte came."""
    rest = b""
    for seconds, part in exchange.parts:
        *events, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            lines = event.decode().split("\n")
            data = [line[5:].strip() for line in lines if line.startswith("data:")]
            if data:
                yield seconds, "\n".join(data)


def _take_event(answer: ServedAnswer, event: str, seconds: float) -> None:
    if event == _DONE:
        answer.num_done += 1
        return
    chunk = json.loads(event)
    if "error" in chunk:
        answer.fault = str(chunk["error"]["message"])
        return
    _take(answer, chunk, seconds)


def _take(answer: ServedAnswer, chunk: dict[str, Any], seconds: float) -> None:
    """Take one chunk of a stream, or a whole answer."""
    if chunk["id"] not in answer.ids:
        answer.ids.append(chunk["id"])
    answer.usage = chunk.get("usage") or answer.usage
    for choice in chunk["choices"]:
        text, reason = choice.get("text") or "", choice.get("finish_reason")
        if text:
            answer.pieces.append(text)
            if answer.first_text is None:
                answer.first_text = seconds
                answer.first_text_engine = chunk.get("d2f", {}).get("seconds")
        if reason is not None:
            answer.finish_reasons.append(reason)
        if (text or reason) and choice["index"] not in answer.choices:
            answer.choices.append(choice["index"])


def _message(exchange: Exchange) -> str:
    """The message of the server's error."""
    try:
        return str(json.loads(exchange.body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"status {exchange.status}"


def run(task: Task) -> dict[str, Any]:
    """Load the server; returns the answers and the seconds that they took."""
    start = time.perf_counter()
    found = asyncio.run(load(task))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time()
    answers = [
        asdict(read_answer(exchange, prompt=prompt, start=start, streamed=task.streamed))
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
