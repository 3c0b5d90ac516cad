"""A process of its own that loads a server with requests from many clients at once.

The process reads one JSON object (see `Task`) and answers with one: the seconds that the load took,
the CPU seconds that it cost here, and every request's answer. It shares the machine with the server
that it measures, so it only parses what comes over the wire (h11 does that), with the time of each
part, and reads it for its meaning after the last answer. Requests are sent as the bytes that they
are, even where they are no HTTP.
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

import h11

_PAUSE = 0.25
"""Seconds before a client tries again after an error that names no time."""
_LONGEST_PAUSE = 5.0
"""Seconds that a client waits at most, whatever the server asks for."""
_DONE = "[DONE]"


# ----------------------------------------------------------------------------------- over the wire


@dataclass
class Exchange:
    """The answer to one request as it came over the wire."""

    began: float
    """The time of `time.perf_counter` before the first byte was sent."""
    status: int | None = None
    """The HTTP status; None: there was no answer, or none that is HTTP."""
    headers: dict[str, str] = field(default_factory=dict)
    """The headers by their names in small letters."""
    parts: list[tuple[float, bytes]] = field(default_factory=list)
    """Parts of the body, each with the seconds since the beginning at which it came."""
    complete: bool = False
    """Whether the answer came to its end as HTTP defines it."""
    fault: str | None = None
    """Reason why the answer is not complete."""
    seconds: float = 0.0
    """Seconds from the beginning to the end; 0 before."""

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(part for _, part in self.parts)

    def end(self, fault: str | None) -> None:
        """Note the end of the answer, with a fault or without; only the first call counts."""
        if not self.seconds:
            self.complete, self.fault = fault is None, fault
            self.seconds = time.perf_counter() - self.began


class Connection:
    """A connection to a server, which is opened anew where the last request closed it.

    Example:
        >>> Connection("127.0.0.1", 8000).open
        False
    """

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._wire: _Wire | None = None

    @property
    def open(self) -> bool:
        """Whether the next request needs no new connection."""
        return self._wire is not None and self._wire.open

    async def ask(self, request: bytes, *, timeout: float) -> Exchange:
        """Send a request whole and wait for the end of its answer; without one it has a `fault`."""
        exchange = Exchange(began=time.perf_counter())
        try:
            async with asyncio.timeout(timeout):
                if self._wire is None or not self._wire.open:
                    loop = asyncio.get_running_loop()
                    _, self._wire = await loop.create_connection(_Wire, *self._address)
                await self._wire.ask(request, exchange)
        except TimeoutError:
            exchange.end(f"no end within {timeout:g} s")
        except OSError as error:
            exchange.end(f"no connection: {error.strerror or error}")
        if exchange.status != 200 or not exchange.complete:
            self.close()
        return exchange

    def close(self) -> None:
        """Drop the connection, whatever is under way on it."""
        if self._wire is not None:
            self._wire.close()
            self._wire = None


class _Wire(asyncio.Protocol):
    """One TCP connection."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._ended = asyncio.Event()

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes, exchange: Exchange) -> None:
        assert self._transport is not None
        self._exchange = exchange
        self._ended.clear()
        # h11 reads an answer after a request only; this one stands for that which is sent.
        self._parser = h11.Connection(h11.CLIENT)
        self._parser.send(h11.Request(method="POST", target="/", headers=[("Host", "")]))
        self._parser.send(h11.EndOfMessage())
        self._transport.write(request)
        await self._ended.wait()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if error is None:
            # The end of the connection may be that of the answer.
            self.data_received(b"")
        self._end("the connection was closed in mid-answer")

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None or self._ended.is_set():
            return
        now = time.perf_counter() - exchange.began
        try:
            self._parser.receive_data(data)
            while (event := self._parser.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Response):
                    exchange.status = event.status_code
                    exchange.headers = {
                        name.decode("latin-1"): value.decode("latin-1")
                        for name, value in event.headers
                    }
                elif isinstance(event, h11.Data):
                    exchange.parts.append((now, bytes(event.data)))
                elif isinstance(event, h11.EndOfMessage):
                    more = self._parser.trailing_data[0]
                    self._end("more came than the answer's length" if more else None)
                    return
        except h11.RemoteProtocolError:
            if data:
                self._end("the answer is not HTTP")

    def _end(self, fault: str | None) -> None:
        if self._exchange is not None and not self._ended.is_set():
            self._exchange.end(fault)
            self._ended.set()


# ---------------------------------------------------------------------------------------- the load


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
