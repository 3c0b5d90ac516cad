"""A `d2f serve` of one's own, in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import TracebackType

from d2f.errors import D2FError
from d2f.evaluation.server_reading import fetch

START_SECONDS = 300.0
STOP_SECONDS = 60.0


class ServerProcess:
    """A server on this machine's loopback, from its start until it is stopped.

    Args:
        arguments: Of `d2f serve`, beside the host and the port.
        num_threads: Threads of its matrix products.

    Raises:
        D2FError: It does not start; says what it said last.

    Example:
        `with ServerProcess(["--dtype", "float32"]) as server: print(server.url)`
    """

    def __init__(self, arguments: Sequence[str], *, num_threads: int = 1) -> None:
        self._log = tempfile.TemporaryFile("a+")  # noqa: SIM115  closed with the process
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        # A key in the environment is for another server.
        environment = {name: os.environ[name] for name in os.environ if name != "D2F_API_KEY"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "d2f", "serve", "--port", str(port), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment | {"OMP_NUM_THREADS": str(num_threads)},
            start_new_session=True,  # an interrupt at the terminal is for the one that measures
        )
        try:
            self._wait_ready()
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    @property
    def log(self) -> str:
        """All that it said so far."""
        self._log.flush()
        self._log.seek(0)
        return self._log.read()

    def terminate(self) -> None:
        """Ask it to end: it answers what it has begun."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Its exit code.

        Raises:
            D2FError: It does not end.
        """
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise D2FError(f"the server did not end within {seconds:g} s of its signal") from None

    def kill(self) -> None:
        """End it at once, if it still lives."""
        if self.running:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _wait_ready(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if not self.running:
                lines = self.log.strip().splitlines() or ["it said nothing"]
                raise D2FError(f"the server did not start: {lines[-1]}")
            try:
                fetch(f"{self.url}/health/ready", seconds=5)
            except D2FError:
                time.sleep(0.1)
            else:
                return
        raise D2FError(f"the server was not ready after {START_SECONDS:g} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
