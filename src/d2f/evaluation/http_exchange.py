"""One HTTP/1.1 exchange after the other on a connection that stays open, and when each byte came.

A load generator shares the machine with the server it measures, so it must cost next to nothing:
this knows the little of HTTP that a server's answers need and leaves their meaning for later.
Imports nothing but Python's library.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field


@dataclass
class Exchange:
    """What came back for one request."""

    began: float
    """Of `time.perf_counter`, before the first byte was sent."""
    status: int | None = None
    """None: no answer, or none that is HTTP."""
    headers: dict[str, str] = field(default_factory=dict)
    """By names in small letters."""
    parts: list[tuple[float, bytes]] = field(default_factory=list)
    """Seconds since the beginning, and the bytes of the body that came then."""
    complete: bool = False
    """Whether the answer came to its end as HTTP defines it."""
    fault: str | None = None
    """Why it did not."""
    seconds: float = 0.0
    """To its end; 0 before."""

    @property
    def body(self) -> bytes:
        """All of it."""
        return b"".join(part for _, part in self.parts)

    def end(self, fault: str | None) -> None:
        """Note its end, the proper one or what was wrong; only the first call counts."""
        if not self.seconds:
            self.complete, self.fault = fault is None, fault
            self.seconds = time.perf_counter() - self.began


class Connection:
    """A way to a server; requests follow each other, on one connection while it stays open.

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
        """Send a request whole and wait for the end of its answer.

        Args:
            request: Head and body.
            timeout: Seconds for all of it.

        Returns:
            Also where there is no answer: then with a `fault`.
        """
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
        self._buffer = b""
        self._chunked = False
        self._left: int | None = None
        """Bytes of the body that are still to come; None: not known, or in chunks."""

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes, exchange: Exchange) -> None:
        assert self._transport is not None
        self._exchange = exchange
        self._ended.clear()
        self._buffer, self._chunked, self._left = b"", False, None
        self._transport.write(request)
        await self._ended.wait()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        exchange = self._exchange
        headed = exchange is not None and exchange.status is not None
        # Without a length the end of the connection is the end of the answer.
        proper = headed and not self._chunked and self._left is None and error is None
        self._end(None if proper else "the connection was closed in mid-answer")

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None or self._ended.is_set():
            return
        self._buffer += data
        try:
            if exchange.status is not None or self._read_head(exchange):
                self._read_body(exchange)
        except (ValueError, IndexError):
            self._end("the answer is not HTTP")

    def _end(self, fault: str | None) -> None:
        if self._exchange is not None and not self._ended.is_set():
            self._exchange.end(fault)
            self._ended.set()

    def _read_head(self, exchange: Exchange) -> bool:
        """Whether it is there in full."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        self._buffer = self._buffer[end + 4 :]
        pairs = (line.partition(":") for line in lines)
        exchange.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self._chunked = exchange.headers.get("transfer-encoding", "").lower() == "chunked"
        if not self._chunked and "content-length" in exchange.headers:
            self._left = int(exchange.headers["content-length"])
        exchange.status = int(first.split(" ")[1])
        return True

    def _read_body(self, exchange: Exchange) -> None:
        now = time.perf_counter() - exchange.began
        if self._chunked:
            self._read_chunks(exchange, now)
            return
        if self._buffer:
            exchange.parts.append((now, self._buffer))
        if self._left is not None:
            self._left -= len(self._buffer)
            if self._left <= 0:
                self._end(None if self._left == 0 else "more came than the answer's length")
        self._buffer = b""

    def _read_chunks(self, exchange: Exchange, now: float) -> None:
        """Take whole chunks; a server sends an event or an answer in one."""
        while (line := self._buffer.find(b"\r\n")) >= 0:
            size = int(self._buffer[:line].split(b";")[0], 16)
            end = line + 2 + size
            if len(self._buffer) < end + 2:
                return
            if size == 0:
                self._end(None)
                return
            exchange.parts.append((now, self._buffer[line + 2 : end]))
            self._buffer = self._buffer[end + 2 :]
