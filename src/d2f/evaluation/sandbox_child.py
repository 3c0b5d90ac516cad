"""The process behind `sandbox`: a server that forks one confined child for each program.

It runs as a script in a clean interpreter of its own, which is small, has one thread and imports
nothing of d2f, so that a fork is cheap and safe. Per program:

    parent ── source, limits ──> server ── fork ──> child: limits, filter, exec(source)
    parent <── passed, reason ── server <── pipe ── child: verdict, with the nonce if it passed

The child may compute, and read files, but no devices and nothing of other processes. All else is
refused by the kernel where that has seccomp ("seccomp"), and else by an audit hook ("audit"), which
stops what a program may plausibly do, but not somebody who knows the interpreter's insides
(`sandbox_locks`).

A program passes when its last statement was reached: only then the child reads the nonce, which the
server left in a pipe, and sends it back. Neither `sys.exit(0)` nor `os._exit(0)` does that, nor
does anything that a program prints. The limit of this: answer and tests share one interpreter, so
a program written against this very file can play our part too, as it can replace what the tests
call. The sandbox protects the machine from all programs, and the verdict from ordinary ones.
"""

from __future__ import annotations

import gc
import importlib
import importlib.machinery
import math
import os
import select
import signal
import struct
import sys
import time
import types
from typing import Any

REQUEST = struct.Struct(">dQI")
"""Seconds, bytes of memory, bytes of source; the source follows."""
REPLY = struct.Struct(">?dI")
"""Passed, seconds, bytes of the reason; the reason follows."""
KIND_BYTES = 8
"""The first word of a server: how it confines programs."""

_PRELOADED = (
    "_posixsubprocess abc array bisect calendar cmath collections contextlib copy dataclasses "
    "datetime decimal enum fractions functools hashlib heapq inspect itertools json math numbers "
    "operator queue random re resource statistics string struct textwrap threading time traceback "
    "types typing unicodedata"
).split()
"""Modules that generated programs and the child itself import; they are then in memory."""

_NONCE_BYTES = 16
_MAX_MESSAGE_BYTES = 512


def _describe(error: BaseException) -> str:
    """`AssertionError at line 3: text`, or less where the error's own methods fail."""
    try:
        lines = []
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == "<program>":
                lines.append(trace.tb_lineno)
            trace = trace.tb_next
        where = f" at line {lines[0]}" if lines else ""
        text = str(error)[:_MAX_MESSAGE_BYTES]
        return f"{type(error).__name__}{where}" + (f": {text}" if text else "")
    except BaseException:
        return "an error that cannot be described"


def _execute(source: str, nonce_pipe: int, result_pipe: int) -> None:
    """Run the program, and report; a program that leaves on the way reports nothing."""
    read, write, leave = os.read, os.write, os._exit
    # As the official scorers have it, `if __name__ == "__main__"` is false.
    module = types.ModuleType("__program__")
    sys.modules["__program__"] = sys.modules["__main__"] = module
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), vars(module))
    except BaseException as error:
        message = _describe(error).encode("utf-8", "replace")[:_MAX_MESSAGE_BYTES]
        write(result_pipe, b"F" + message)
    else:
        write(result_pipe, b"P" + read(nonce_pipe, _NONCE_BYTES))
    leave(0)


# --------------------------------------------------------------------------------------- the server


def _read_exactly(count: int) -> bytes:
    """The next bytes from the parent; less when it is gone."""
    data = b""
    while len(data) < count and (more := os.read(0, count - len(data))):
        data += more
    return data


def _write_all(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(0, view) :]


def _ending(status: int) -> str:
    """Say why a child that sent no verdict ended."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGXCPU, signal.SIGKILL):
            return "killed: too much CPU time or memory"
        return f"killed by {signal.Signals(number).name}"
    return f"ended before its last statement, with exit code {os.WEXITSTATUS(status)}"


class _Server:
    """Serves one parent until that closes the connection."""

    def __init__(self, locks: Any, kind: str, folder: str) -> None:
        self._locks, self._folder = locks, folder
        self._pid = os.getpid()
        self._null = os.open(os.devnull, os.O_RDWR)
        self._kernel = locks.Kernel() if sys.platform == "linux" else None
        if self._kernel is not None:
            # Nobody but root may look into this process and its children.
            self._kernel.control(locks.PR_SET_DUMPABLE, 0)
        self._kind = kind if kind != "best" else self._best_kind()

    def _best_kind(self) -> str:
        """Whether the kernel can confine a child, found by trying it."""
        if self._kernel is None:
            return "audit"
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                self._locks.confine(self._kernel, "seccomp", self._pid)
                os.rmdir(self._folder)
            except PermissionError:
                code = 0
            finally:
                os._exit(code)
        os.makedirs(self._folder, exist_ok=True)
        return "seccomp" if os.waitpid(pid, 0)[1] == 0 else "audit"

    def serve(self) -> None:
        """Answer requests, one at a time."""
        try:
            _write_all(self._kind.encode().ljust(KIND_BYTES))
            while len(header := _read_exactly(REQUEST.size)) == REQUEST.size:
                seconds, memory, length = REQUEST.unpack(header)
                data = _read_exactly(length)
                if len(data) < length:
                    break
                passed, reason, took = self._run(data, seconds, memory)
                message = reason.encode("utf-8", "replace")
                _write_all(REPLY.pack(passed, took, len(message)) + message)
        finally:
            _remove(self._folder)

    def _run(self, data: bytes, seconds: float, memory: int) -> tuple[bool, str, float]:
        """Fork a child for a program and wait for its verdict."""
        nonce = os.urandom(_NONCE_BYTES)
        nonce_pipe, filler = os.pipe()
        os.write(filler, nonce)
        os.close(filler)
        verdict_pipe, result_pipe = os.pipe()
        folder = os.path.join(self._folder, "program")
        os.mkdir(folder)
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(verdict_pipe)
                self._become_program(data, seconds, memory, (nonce_pipe, result_pipe), folder)
            finally:
                os._exit(1)
        os.close(nonce_pipe)
        os.close(result_pipe)
        _in_own_group(pid)
        message, ended = self._listen(verdict_pipe, start + seconds)
        os.close(verdict_pipe)
        took = time.monotonic() - start
        status = _reap(pid, patient=ended and not message)
        _remove(folder)
        if message == b"P" + nonce:
            return True, "", took
        if not ended:
            return False, f"more than {seconds:g} s", took
        text = message[1:].decode("utf-8", "replace") if message[:1] == b"F" else _ending(status)
        return False, text, took

    def _become_program(
        self, data: bytes, seconds: float, memory: int, pipes: tuple[int, int], folder: str
    ) -> None:
        """Run the program in the child; this call does not return."""
        _in_own_group(0)
        for standard in range(3):
            os.dup2(self._null, standard)
        os.close(self._null)
        os.chdir(folder)
        # A verdict that hangs on chance is at least always the same; a fork seeds anew.
        random: Any = sys.modules["random"]
        random.seed(0)
        source = data.decode("utf-8", "surrogatepass")
        try:
            self._locks.limit(seconds, memory)
            self._locks.confine(self._kernel, self._kind, self._pid)
        except Exception as error:
            os.write(pipes[1], f"Fthe sandbox could not be set up: {error}".encode())
            return
        _execute(source, *pipes)

    def _listen(self, pipe: int, deadline: float) -> tuple[bytes, bool]:
        """The child's message, and whether it came to an end in time."""
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        poll.register(0, select.POLLIN)
        message = b""
        while (left := deadline - time.monotonic()) > 0:
            ready = dict(poll.poll(math.ceil(1000 * left)))
            if 0 in ready:
                return message, False  # the parent is gone, or has no patience any more
            if pipe in ready:
                more = os.read(pipe, _MAX_MESSAGE_BYTES)
                message += more
                if not more or len(message) > _MAX_MESSAGE_BYTES:
                    return message, True
                if len(message) == 1 + _NONCE_BYTES and message[:1] == b"P":
                    return message, True
        return message, False


def _in_own_group(pid: int) -> None:
    """Make a process the head of a group; parent and child both do, as either may come first."""
    try:
        os.setpgid(pid, pid)
    except OSError:
        return  # it is one, or gone


def _reap(pid: int, *, patient: bool) -> int:
    """End a child with all that it started, and take its status.

    `patient`: it closed its pipe, so it is ending by itself; the status says how, unless we kill
    it too early.
    """
    ended, status = 0, 0
    for _ in range(50 if patient else 0):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        time.sleep(0.001)
    for kill in (os.killpg,) if ended else (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except OSError:
            continue  # nobody is left in the group; macOS refuses for processes that ended
    return status if ended else os.waitpid(pid, 0)[1]


def _remove(folder: str) -> None:
    """Remove a folder, with what a program may have managed to leave there."""
    try:
        os.rmdir(folder)
    except OSError:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)


def _load_locks() -> Any:
    """Load `sandbox_locks`, which lies beside this file, and leave it where no import finds it."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox_locks.py")
    loader = importlib.machinery.SourceFileLoader("sandbox_locks", path)
    module = types.ModuleType(loader.name)
    loader.exec_module(module)
    return module


def _main(kind: str, folder: str) -> None:
    locks = _load_locks()
    os.environ.clear()
    sys.argv = ["program"]
    for name in _PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    _Server(locks, kind, folder).serve()


if __name__ == "__main__":
    _main(*sys.argv[1:3])
