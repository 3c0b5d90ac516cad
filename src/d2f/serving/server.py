"""The listening socket, and uvicorn around the application, which ends without losing requests."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from d2f.errors import ConfigError
from d2f.serving.errors import Unavailable
from d2f.serving.service import Service
from d2f.serving.settings import ServeSettings

_KEEP_ALIVE_SECONDS = 30
_FAREWELL_SECONDS = 5
"""Seconds that connections may take to close once no request runs any more."""


def open_socket(host: str, port: int) -> socket.socket:
    """Bind a socket to an address; nobody can connect before the server listens.

    Raises:
        ConfigError: There is no such host, or the port is in use or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no name"
        raise ConfigError(f"host {host!r} cannot be listened on: {reason}") from None
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        # Connections of an earlier server that are about to end must not hold the port.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        # Another server may have bound the port without listening yet.
        bound.listen(0)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {(error.strerror or str(error)).lower()}; "
            "choose another with --host and --port (0: any that is free)"
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """The address under which this machine reaches a server.

    Example:
        >>> with open_socket("127.0.0.1", 0) as bound:
        ...     url_of(bound).startswith("http://127.0.0.1:")
        True
    """
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """A uvicorn server that drains the service when told to stop, and serves `/health` meanwhile.

    A second signal ends the running requests after their step.
    """

    def __init__(
        self,
        app: FastAPI,
        service: Service,
        settings: ServeSettings,
        on_ready: Callable[[], None],
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            ws="none",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_FAREWELL_SECONDS,
        )
        super().__init__(config)
        self._service = service
        self._drain_seconds = settings.drain_seconds
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._endings: list[asyncio.Task[None]] = []
        self.fault: str | None = None
        """Reason why the server ended before it was ready."""
        self.interrupted = False
        """Whether Ctrl-C ended it."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop."""
        self._loop = asyncio.get_running_loop()
        welcome = asyncio.create_task(self._welcome())
        try:
            await super().serve(sockets)
        finally:
            welcome.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal to stop: drain; at the second signal do not wait for requests."""
        assert self._loop is not None, "signals are caught while it serves"
        self.interrupted |= sig == signal.SIGINT
        self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Take no more requests and end after the running ones; a second call ends those, too."""
        self._endings.append(asyncio.create_task(self._end(0 if self._endings else None)))

    async def _end(self, seconds: float | None) -> None:
        await self._service.stop(self._drain_seconds if seconds is None else seconds)
        self.should_exit = True

    async def _welcome(self) -> None:
        while not self.started:
            await asyncio.sleep(0.01)
        try:
            await self._service.ready()
        except Unavailable as error:
            if not self._endings:
                self.fault = str(error)
                self.should_exit = True
            return
        self._on_ready()


def run_server(
    app: FastAPI,
    service: Service,
    settings: ServeSettings,
    bound: socket.socket,
    on_ready: Callable[[], None],
) -> None:
    """Serve until a signal says stop.

    Raises:
        ConfigError: The engines could not be made ready.
        KeyboardInterrupt: The signal was Ctrl-C's; requests have ended as with any other.
    """
    server = Server(app, service, settings, on_ready)
    server.run(sockets=[bound])
    if server.fault is not None:
        raise ConfigError(server.fault)
    if server.interrupted:
        raise KeyboardInterrupt
