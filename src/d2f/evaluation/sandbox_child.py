"""The process behind `sandbox`: a server that forks one confined child for each program.

It runs as a script in a clean interpreter of its own, which is small, has one thread and imports
nothing of d2f, so that a fork is cheap and safe. Per program:

    parent ── source, limits ──> server ── fork ──> child: limits, filter, exec(source)
    parent <── passed, reason ── server <── pipe ── child: verdict, with the nonce if it passed

The child may compute, and read files, but no devices and nothing of other processes. All else is
refused by the kernel where that has seccomp ("seccomp": a list of the system calls that are
allowed, so that unknown ones are refused too; Landlock, where the kernel has it, keeps it from
devices and doubles the lock on files), and else by an audit hook ("audit"), which stops what a
program may plausibly do, but not somebody who knows the interpreter's insides.

A program passes when its last statement was reached: only then the child reads the nonce, which the
server left in a pipe, and sends it back. Neither `sys.exit(0)` nor `os._exit(0)` does that, nor
does anything that a program prints. The limit of this: answer and tests share one interpreter, so
a program written against this very file can play our part too, as it can replace what the tests
call. The sandbox protects the machine from all programs, and the verdict from ordinary ones.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import math
import os
import platform
import select
import signal
import struct
import sys
import time
import types
from typing import Any, NoReturn

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
"""What generated programs import, and the child itself; it is then in memory."""

_NONCE_BYTES = 16
_MAX_MESSAGE_BYTES = 512
_MAX_OPEN_FILES = 64

# ------------------------------------------------------------------------------ kernel's refusals

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_EPERM, _ENOTTY, _ENOSYS = 1, 25, 38
_CAP_DAC_READ_SEARCH = 1 << 2
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_RIGHTS, _LANDLOCK_READ_FILE, _LANDLOCK_READ_FOLDER = (1 << 13) - 1, 1 << 2, 1 << 3
"""All file rights of Landlock's first version, and those that are given back."""

_SYSTEM_FOLDERS = frozenset(("dev", "proc", "sys"))
"""Where to read alone can do harm: devices, other processes."""
_HARMLESS_DEVICES = frozenset(("/dev/null", "/dev/random", "/dev/urandom", "/dev/zero"))

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""Name -> number in the kernel's audit interface, column in the table below."""

_CALLS_AND_NUMBERS = (
    "access 21 -, alarm 37 -, brk 12 214, clock_getres 229 114, clock_gettime 228 113, "
    "clock_nanosleep 230 115, close 3 57, dup 32 23, dup2 33 -, dup3 292 24, exit 60 93, "
    "exit_group 231 94, faccessat 269 48, faccessat2 439 439, fstat 5 80, futex 202 98, getcwd "
    "79 17, getdents64 217 61, getegid 108 177, geteuid 107 175, getgid 104 176, getitimer 36 "
    "102, getpid 39 172, getppid 110 173, getrandom 318 278, getrlimit 97 163, getrusage 98 "
    "165, gettid 186 178, gettimeofday 96 169, getuid 102 174, lseek 8 62, lstat 6 -, madvise "
    "28 233, mmap 9 222, mprotect 10 226, mremap 25 216, munmap 11 215, nanosleep 35 101, "
    "newfstatat 262 79, poll 7 -, ppoll 271 73, pread64 17 67, pselect6 270 72, read 0 63, "
    "readlink 89 -, readlinkat 267 78, readv 19 65, restart_syscall 219 128, rseq 334 293, "
    "rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sched_getaffinity 204 "
    "123, sched_yield 24 124, select 23 -, setitimer 38 103, sigaltstack 131 132, stat 4 -, "
    "statx 332 291, sysinfo 99 179, time 201 -, times 100 153, uname 63 160, write 1 64, writev "
    "20 66"
)
_ALLOWED_CALLS = {
    name: (int(x86_64), None if aarch64 == "-" else int(aarch64))
    for name, x86_64, aarch64 in map(str.split, _CALLS_AND_NUMBERS.split(","))
}
"""Calls that are harmless with any arguments, by their numbers on x86_64 and aarch64."""

_OPEN, _OPENAT, _FCNTL, _IOCTL = (2, None), (257, 56), (72, 25), (16, 29)
_PRLIMIT64, _CLONE3, _FIRST_UNKNOWN = (302, 261), (435, 435), 463

_OPEN_FOR_CHANGE = 0o3 | 0o100 | 0o1000 | 0o2000 | 0o20000 | 0o20000000
"""O_WRONLY and O_RDWR, O_CREAT, O_TRUNC, O_APPEND, O_ASYNC, O_TMPFILE: the same on both."""

_FD_COMMANDS = (0, 1, 2, 3, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC. F_SETOWN would send signals to others."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16

_Instruction = tuple[int, int, int, int]


def build_filter(architecture: str) -> list[_Instruction]:
    """The seccomp program of an architecture, as (code, jump if true, jump if false, operand).

    Arguments are compared by their low half, which holds an int or a flag on these little-endian
    machines, and by both halves where they are pointers. Numbers beyond the newest call known here
    do not exist for the program (ENOSYS), so that a newer C library takes its older way.

    Example:
        >>> code, _, _, offset = build_filter("aarch64")[0]
        >>> (code, offset)  # load the architecture
        (32, 4)
    """
    arch, column = _ARCHITECTURES[architecture]
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE | _EPERM)

    def load(argument: int, half: int = 0) -> _Instruction:
        return (_LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * argument + 4 * half)

    def call(numbers: tuple[int | None, ...], *body: _Instruction) -> list[_Instruction]:
        number = numbers[column]
        return [] if number is None else [(_EQUAL, 0, len(body), number), *body]

    def if_no_change(argument: int) -> tuple[_Instruction, ...]:
        return load(argument), (_ANY_BIT, 1, 0, _OPEN_FOR_CHANGE), allow, refuse

    simple = [number for row in _ALLOWED_CALLS.values() if (number := row[column]) is not None]
    return [
        (_LOAD, 0, 0, _ARCHITECTURE_OFFSET),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
        *call(_OPEN, *if_no_change(1)),
        *call(_OPENAT, *if_no_change(2)),
        *call(
            _FCNTL,
            load(1),
            *((_EQUAL, len(_FD_COMMANDS) - row, 0, x) for row, x in enumerate(_FD_COMMANDS)),
            refuse,
            allow,
        ),
        # Its own limits may be read, not set: process 0, and no new values.
        *call(
            _PRLIMIT64,
            load(0),
            (_EQUAL, 0, 5, 0),
            load(2),
            (_EQUAL, 0, 3, 0),
            load(2, half=1),
            (_EQUAL, 0, 1, 0),
            allow,
            refuse,
        ),
        # What `isatty` and the C library expect to hear.
        *call(_IOCTL, (_RETURN, 0, 0, _REFUSE | _ENOTTY)),
        *call(_CLONE3, (_RETURN, 0, 0, _REFUSE | _ENOSYS)),
        (_AT_LEAST, 0, 1, _FIRST_UNKNOWN),
        (_RETURN, 0, 0, _REFUSE | _ENOSYS),
        *((_EQUAL, len(simple) - row, 0, number) for row, number in enumerate(simple)),
        refuse,
        allow,
    ]


class _Kernel:
    """Linux's ways to give up rights; each affects the calling process from then on."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._rules = self._readable_files()
        self._program: bytes | None = None
        machine = platform.machine()
        if machine in _ARCHITECTURES and struct.calcsize("P") == 8:
            rows = build_filter(machine)
            self._code = b"".join(struct.pack("=HBBI", *row) for row in rows)
            address = ctypes.cast(ctypes.c_char_p(self._code), ctypes.c_void_p).value
            self._program = struct.pack("@HP", len(rows), address)

    def control(self, option: int, value: int, pointer: bytes | None = None) -> bool:
        """`prctl`; whether it worked."""
        arguments = [ctypes.c_ulong(value), ctypes.c_char_p(pointer), ctypes.c_ulong(0)]
        return self._libc.prctl(ctypes.c_int(option), *arguments, ctypes.c_ulong(0)) == 0

    def drop_capabilities(self) -> None:
        """Keep of root's powers the one to read files, for modules in folders of others."""
        header = struct.pack("=II", 0x20080522, 0)
        for kept in (_CAP_DAC_READ_SEARCH, 0):
            if self._libc.capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0)) == 0:
                return

    def _readable_files(self) -> int:
        """Landlock, where the kernel has it: a set of rules by which files can be read alone."""
        long = ctypes.c_long
        rights = struct.pack("=Q", _LANDLOCK_RIGHTS)
        rules = self._libc.syscall(long(_LANDLOCK_CREATE_RULESET), rights, long(8), long(0))
        folders = {f"/{name}" for name in os.listdir("/") if name not in _SYSTEM_FOLDERS}
        for path in folders | _HARMLESS_DEVICES if rules >= 0 else ():
            try:
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            for right in (_LANDLOCK_READ_FOLDER | _LANDLOCK_READ_FILE, _LANDLOCK_READ_FILE):
                rule = struct.pack("=Qi", right, place)
                call = map(long, (_LANDLOCK_ADD_RULE, rules, 1))
                if self._libc.syscall(*call, rule, long(0)) == 0:
                    break  # the second is for files, which have no files in them
            os.close(place)
        return rules

    def refuse_files(self) -> None:
        """A second lock on changes, and the only one on devices and other processes' files."""
        if self._rules >= 0:
            call = map(ctypes.c_long, (_LANDLOCK_RESTRICT_SELF, self._rules, 0))
            self._libc.syscall(*call)
            os.close(self._rules)

    def install_filter(self) -> bool:
        """Refuse all system calls but the allowed ones; whether the kernel can do that."""
        return self._program is not None and self.control(_PR_SET_SECCOMP, 2, self._program)


# ------------------------------------------------------------------------- interpreter's refusals

_HARMLESS_OS_EVENTS = frozenset(
    f"os.{name}" for name in "fwalk getxattr listdir listxattr putenv scandir unsetenv walk".split()
)
_REFUSED_FAMILIES = frozenset(
    "_thread ctypes fcntl ftplib gc http imaplib nntplib os pdb poplib pty resource shutil signal "
    "smtplib socket sqlite3 subprocess syslog telnetlib tempfile urllib webbrowser".split()
)
_REFUSED_MODULES = frozenset(
    "_ctypes _curses _dbm _gdbm _interpreters _multiprocessing _posixshmem _testcapi "
    "_testinternalcapi _xxsubinterpreters ctypes readline".split()
)
_UNAUDITED = (
    "chroot copy_file_range eventfd ftruncate initgroups login_tty memfd_create mkfifo mknod nice "
    "openpty pidfd_open pipe pipe2 posix_fallocate posix_openpt sched_setaffinity sched_setparam "
    "sched_setscheduler sendfile setegid seteuid setgid setgroups setns setpgid setpgrp "
    "setpriority setregid setresgid setresuid setreuid setsid setuid splice sync tcsetpgrp unshare"
).split()
"""Functions of `os` that raise no audit event."""


def _refuse_by_audit() -> None:
    """Let the interpreter refuse what the kernel cannot be asked to refuse, from now on.

    Everything that the hook needs is held in its closure, out of the reach of a program that
    replaces builtins or globals.
    """
    change, harmless, families = _OPEN_FOR_CHANGE, _HARMLESS_OS_EVENTS, _REFUSED_FAMILIES
    if sys.platform == "darwin":
        change = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_ASYNC
    modules, error, missing = _REFUSED_MODULES, PermissionError, ImportError
    real, plain, text = os.path.realpath, os.path.abspath, os.fsdecode
    system, devices = _SYSTEM_FOLDERS, _HARMLESS_DEVICES

    def refused(*_: Any, **__: Any) -> NoReturn:
        raise error("refused in the sandbox")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if arguments[2] & change:
                raise error("opening files to change them is refused in the sandbox")
            name = "/" if isinstance(arguments[0], int) else text(arguments[0])
            for path in (plain(name), real(name)):
                path = "/" + path.lstrip("/")  # two slashes are as good as one
                if path.split("/")[1] in system and path not in devices:
                    raise error(f"{path} is refused in the sandbox")
        elif event == "import":
            if arguments[0] in modules:
                raise missing(f"{arguments[0]} is refused in the sandbox")
        elif event.partition(".")[0] in families and event not in harmless:
            raise error(f"{event} is refused in the sandbox")

    for name in _UNAUDITED:
        for module in (os, sys.modules["posix"]):
            if hasattr(module, name):
                setattr(module, name, refused)
    for module, name in (
        (sys.modules["_posixsubprocess"], "fork_exec"),
        (sys.modules["_thread"], "start_new_thread"),
        (sys.modules["_thread"], "start_joinable_thread"),
        (sys.modules["threading"], "_start_new_thread"),
        (sys.modules["threading"], "_start_joinable_thread"),
    ):
        if hasattr(module, name):
            setattr(module, name, refused)
    for name in [name for name in sys.modules if name.partition(".")[0] in modules]:
        del sys.modules[name]
    sys.addaudithook(hook)


# ---------------------------------------------------------------------------------------- the child


def _limit(seconds: float, memory: int) -> None:
    """Lower what the process may use; what a system does not know or grant is left as it is."""
    resource: Any = sys.modules["resource"]
    cpu = math.ceil(seconds) + 1
    limits = {
        "RLIMIT_AS": memory,
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": cpu,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NOFILE": _MAX_OPEN_FILES,
        "RLIMIT_NPROC": 0,
    }
    for name, value in limits.items():
        if hasattr(resource, name):
            limit = getattr(resource, name)
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            try:
                resource.setrlimit(limit, (value, value))
            except (OSError, ValueError):
                continue  # macOS does not limit memory


def _confine(kernel: _Kernel | None, kind: str, server: int) -> None:
    """Give up all rights but to compute and to read files."""
    if kernel is not None:
        kernel.control(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)  # the server went before the kernel was told to watch it
        kernel.drop_capabilities()
        if not kernel.control(_PR_SET_NO_NEW_PRIVS, 1):
            raise OSError("no_new_privs is not available")
        if kind == "seccomp":
            kernel.refuse_files()
            if not kernel.install_filter():
                raise OSError("seccomp is not available")
    if kind == "audit":
        _refuse_by_audit()


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
    """Why a child that sent no verdict ended."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGXCPU, signal.SIGKILL):
            return "killed: too much CPU time or memory"
        return f"killed by {signal.Signals(number).name}"
    return f"ended before its last statement, with exit code {os.WEXITSTATUS(status)}"


class _Server:
    """Serves one parent until that closes the connection."""

    def __init__(self, kind: str, folder: str) -> None:
        self._folder = folder
        self._pid = os.getpid()
        self._null = os.open(os.devnull, os.O_RDWR)
        self._kernel = _Kernel() if sys.platform == "linux" else None
        if self._kernel is not None:
            # Nobody but root may look into this process and its children.
            self._kernel.control(_PR_SET_DUMPABLE, 0)
        self._kind = kind if kind != "best" else self._best_kind()

    def _best_kind(self) -> str:
        """Whether the kernel can confine a child, found by trying it."""
        if self._kernel is None:
            return "audit"
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _confine(self._kernel, "seccomp", self._pid)
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
        """What the child does; it does not come back."""
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
            _limit(seconds, memory)
            _confine(self._kernel, self._kind, self._pid)
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


def _main(kind: str, folder: str) -> None:
    os.environ.clear()
    sys.argv = ["program"]
    for name in _PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    _Server(kind, folder).serve()


if __name__ == "__main__":
    _main(*sys.argv[1:3])
