"""Run programs that a model wrote where they can do no harm.

Each program runs in a process of its own, in a clean interpreter with the standard library and
nothing else, an empty environment, an empty folder and no input; what it prints is thrown away.
Time, memory, open files and processor time are limited, and its whole process group is killed in
the end. It may not start processes or threads, signal others, change any file or use the network:
the kernel refuses that where it can (`sandbox_kind() == "seccomp"`), else the interpreter does
("audit", good enough for what a model writes by chance, not for an attacker).

`sandbox_child` says how this works and what it cannot do, `sandbox_locks` what is refused.
"""

from __future__ import annotations

import functools
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from d2f.errors import ConfigError, D2FError
from d2f.evaluation.sandbox_child import KIND_BYTES, REPLY, REQUEST

_PATIENCE_SECONDS = 30.0
"""Seconds that a server may take longer than the program before it counts as dead."""
_MIN_MEMORY_MIB, _MAX_MEMORY_MIB = 64, 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one program.

    Raises:
        ConfigError: A limit under which no program can run.

    Example:
        >>> Limits(seconds=2).memory_mib
        512
    """

    seconds: float = 5.0
    """Wall time. Processor time is limited to a second more, for a program that hides its own."""
    memory_mib: int = 512
    """Address space, the interpreter's own 30 MiB included; not enforced on macOS."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds < 1e6:
            raise ConfigError(f"a program's seconds must be above 0, not {self.seconds}")
        if not _MIN_MEMORY_MIB <= self.memory_mib <= _MAX_MEMORY_MIB:
            raise ConfigError(
                f"a program's memory_mib must lie between {_MIN_MEMORY_MIB} (what Python needs) "
                f"and {_MAX_MEMORY_MIB}, not {self.memory_mib}"
            )


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The result of one program.

    Example:
        >>> Execution(passed=False, reason="AssertionError at line 3", seconds=0.01).passed
        False
    """

    passed: bool
    """Whether its last statement was reached within the limits."""
    reason: str
    """Reason why the program failed; empty if it passed."""
    seconds: float
    """Wall time, with the start and the end of its process."""


def run_programs(
    programs: Sequence[str], limits: Limits | None = None, workers: int | None = None
) -> list[Execution]:
    """Run Python programs in the sandbox, several at a time.

    Args:
        programs: Sources. A program passes if its last statement is reached: neither an exception
            nor an exit, `sys.exit(0)` included, is in the way.
        limits: What each may use; `Limits()` if not given.
        workers: How many run at a time; as many as there are processors if not given.

    Returns:
        What became of each, in the order of the programs.

    Raises:
        ConfigError: No workers.
        D2FError: This system has no sandbox (Windows), or it cannot be started.

    Example:
        >>> passed, failed = run_programs(["assert 1 + 1 == 2", "raise SystemExit(0)"])
        >>> passed.passed, failed.passed, failed.reason
        (True, False, 'SystemExit at line 1: 0')
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"programs need at least one worker, not {workers}")
    if not programs:
        return []
    count = min(workers or _num_processors(), len(programs))
    crew = _Crew(count, limits or Limits())
    with closing(crew), ThreadPoolExecutor(count, thread_name_prefix="d2f-sandbox") as pool:
        futures = [pool.submit(crew.run, program) for program in programs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            crew.stop()
            raise
    return [future.result() for future in futures]


@functools.cache
def sandbox_kind() -> str:
    """Tell how programs are confined here: "seccomp" by the kernel, "audit" by the interpreter.

    Raises:
        D2FError: This system has no sandbox (Windows), or it cannot be started.

    Example:
        >>> sandbox_kind() in ("seccomp", "audit")
        True
    """
    server = Server()
    server.close()
    return server.kind


def _num_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Server:
    """A process that runs programs, one at a time.

    Args:
        kind: "seccomp" or "audit"; "best" takes the first that works.

    Raises:
        D2FError: This system has no sandbox (Windows), or it cannot be started.

    Example:
        >>> server = Server()
        >>> server.run("assert True", Limits()).passed
        True
        >>> server.close()
    """

    def __init__(self, kind: str = "best") -> None:
        if not hasattr(os, "fork"):
            raise D2FError(
                f"programs of a model cannot be run safely on {sys.platform}: evaluate on Linux "
                "or macOS (on Windows, in WSL)"
            )
        if not sys.executable:
            raise D2FError("the sandbox needs a Python interpreter, but sys.executable is empty")
        self._folder = tempfile.mkdtemp(prefix="d2f-sandbox-")
        try:
            self._process, self._socket = self._start(kind)
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise D2FError(f"the sandbox cannot start {sys.executable}: {error}") from error
        self._socket.settimeout(_PATIENCE_SECONDS)
        try:
            self.kind = self._receive(KIND_BYTES).decode().strip()
        except OSError as error:
            said = self._end().strip().rpartition("\n")[2]
            raise D2FError(
                f"the sandbox for generated programs did not start with {sys.executable}: "
                f"{said or error}"
            ) from error

    def run(self, program: str, limits: Limits) -> Execution:
        """Run one program.

        Raises:
            OSError: The server is gone.
        """
        source = program.encode("utf-8", "surrogatepass")
        self._socket.settimeout(limits.seconds + _PATIENCE_SECONDS)
        header = REQUEST.pack(limits.seconds, limits.memory_mib << 20, len(source))
        self._socket.sendall(header + source)
        passed, seconds, length = REPLY.unpack(self._receive(REPLY.size))
        reason = self._receive(length).decode("utf-8", "replace")
        return Execution(passed=passed, reason=reason, seconds=seconds)

    def interrupt(self) -> None:
        """Make a `run` in another thread fail at once."""
        with suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    def _start(self, kind: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
        script = Path(__file__).with_name("sandbox_child.py")
        # The flags of `-I`, but for the one that hides PYTHONHASHSEED: without it, what hangs on
        # the order of a set would pass in one evaluation and fail in the next.
        flags = ("-P", "-s", "-S", "-B", "-X", "utf8")
        libraries = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH" and v}
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = subprocess.Popen(
                    [sys.executable, *flags, str(script), kind, self._folder],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env={"PYTHONHASHSEED": "0", **libraries},
                    cwd=self._folder,
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
        return process, ours

    def close(self) -> None:
        """End the server, and a running program with it."""
        self._end()

    def _end(self) -> str:
        """End the server, and give what it complained about."""
        # The server sees this end, kills its program and removes its folder.
        self._socket.close()
        try:
            _, said = self._process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            _, said = self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)
        return said.decode("utf-8", "replace")

    def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self._socket.recv(count - len(data))
            if not more:
                raise ConnectionError("it ended")
            data += more
        return data


class _Crew:
    """Servers that share out programs; each is started when one needs it, and again if it dies."""

    def __init__(self, count: int, limits: Limits) -> None:
        self._limits = limits
        self._idle: queue.LifoQueue[Server | None] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(None)
        self._servers: set[Server] = set()
        self._stopped = False

    def run(self, program: str) -> Execution:
        server = self._idle.get()
        start = time.monotonic()
        try:
            if server is None:
                server = Server()
                self._servers.add(server)
            if self._stopped:  # `stop` may have come before this server was known
                server.interrupt()
            try:
                return server.run(program, self._limits)
            except OSError:
                self._servers.discard(server)
                server.close()
                server = None
                reason = "the sandbox died while this program ran"
                return Execution(passed=False, reason=reason, seconds=time.monotonic() - start)
        finally:
            self._idle.put(server)

    def stop(self) -> None:
        """Let all programs end soon."""
        self._stopped = True
        for server in list(self._servers):
            server.interrupt()

    def close(self) -> None:
        for server in self._servers:
            server.close()
