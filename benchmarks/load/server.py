"""The server that is measured: its address, its process if it is our own, and its metrics."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from d2f.errors import ConfigError, D2FError

START_SECONDS = 300.0
STOP_SECONDS = 60.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A server that is measured is asked directly, whatever proxy the environment names."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server's address, and the model that is asked for."""

    url: str
    """The root, such as `http://127.0.0.1:8000`."""
    model: str
    max_tokens: int
    api_key: str | None = None

    @classmethod
    def find(cls, url: str, *, max_tokens: int, api_key: str | None = None) -> Target:
        """The server at a URL, with its first model.

        Raises:
            ConfigError: The URL is not that of a server's root.
            D2FError: The server cannot be asked.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ConfigError(f"--url is {url!r}; it must be like http://127.0.0.1:8000")
        url = url.rstrip("/")
        try:
            model = json.loads(fetch(f"{url}/v1/models", api_key))["data"][0]["id"]
        except (ValueError, LookupError, TypeError):
            raise D2FError(f"{url}/v1/models lists no model in OpenAI's form") from None
        return cls(url=url, model=model, max_tokens=max_tokens, api_key=api_key)


class ServerProcess:
    """A `d2f serve` of our own on this machine's loopback address, from its start to its end.

    It gets these arguments beside the host and the port, and so many threads for its products.

    Raises:
        D2FError: It does not start; the error has its last line.

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
        """Return the server's output so far."""
        self._log.flush()
        self._log.seek(0)
        return self._log.read()

    def terminate(self) -> None:
        """Send it SIGTERM, after which it answers the open requests and ends."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Wait for its end; returns the exit code.

        Raises:
            D2FError: It does not end.
        """
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise D2FError(f"the server did not end within {seconds:g} s of its signal") from None

    def kill(self) -> None:
        """Kill it, if it still lives."""
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


@dataclass(frozen=True, kw_only=True)
class ServerReading:
    """A server's metrics at one time; None: it does not have this one."""

    engine_cpu_seconds: float | None
    """CPU time of the thread that runs the engines."""
    process_cpu_seconds: float | None
    """CPU time of all threads."""
    tokens: float | None
    """Tokens of all answers so far."""
    resident_bytes: float | None
    num_running: float | None
    num_waiting: float | None
    num_pages: float | None
    num_free_pages: float | None
    num_steps: float | None
    """Steps of all engines so far."""

    @classmethod
    def parse(cls, text: str) -> ServerReading:
        """Read Prometheus' text format; the values of several models are added up.

        Example:
            >>> ServerReading.parse('d2f_tokens_total{model="a"} 2.0').tokens
            2.0
        """
        sums: dict[str, float] = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                labelled, _, value = line.rpartition(" ")
                name = labelled.partition("{")[0]
                sums[name] = sums.get(name, 0.0) + float(value)
        return cls(
            engine_cpu_seconds=sums.get("d2f_engine_cpu_seconds_total"),
            process_cpu_seconds=sums.get("process_cpu_seconds_total"),
            tokens=sums.get("d2f_tokens_total"),
            resident_bytes=sums.get("process_resident_memory_bytes"),
            num_running=sums.get("d2f_requests_running"),
            num_waiting=sums.get("d2f_requests_waiting"),
            num_pages=sums.get("d2f_kv_pages"),
            num_free_pages=sums.get("d2f_kv_pages_free"),
            num_steps=sums.get("d2f_step_seconds_count"),
        )


def read_server(url: str, api_key: str | None = None) -> ServerReading:
    """Read a server's metrics.

    Raises:
        D2FError: There is no answer.
    """
    return ServerReading.parse(fetch(f"{url}/metrics", api_key))


def fetch(url: str, api_key: str | None = None, *, seconds: float = 30.0) -> str:
    """The body of the answer to a GET request.

    Raises:
        D2FError: There is no answer, or an error.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with _OPENER.open(
            urllib.request.Request(url, headers=headers), timeout=seconds
        ) as response:
            return response.read().decode()
    except urllib.error.HTTPError as error:
        error.close()
        remedy = "; give its key with --api-key" if error.code == 401 else ""
        raise D2FError(f"{url} answers with status {error.code}{remedy}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise D2FError(f"{url} cannot be reached: {reason}") from None
