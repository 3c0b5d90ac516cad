"""HTTP/1.1 exchanges on a connection that stays open, with the time at which each byte came.

A load generator shares the machine with the server that it measures, so it only parses what comes
(h11 does that) and leaves the meaning for later. Requests are sent as the bytes that they are, even
where they are no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import h11


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
    """Why it did not."""
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
