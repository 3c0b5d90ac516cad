"""The locks on a program in the sandbox: what the kernel refuses it, and else the interpreter.

`sandbox_child` loads this file into its server, so it imports nothing of d2f. Each lock affects the
calling process from then on. "seccomp" is a list of the system calls that are allowed, so that
unknown ones are refused too; Landlock, where the kernel has it, keeps a program from devices and
doubles the lock on files. "audit" is a hook of the interpreter.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import signal
import struct
import sys
from typing import Any, NoReturn

_MAX_OPEN_FILES = 64

# ------------------------------------------------------------------------------ kernel's refusals

_PR_SET_PDEATHSIG, PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_EPERM, _ENOTTY, _ENOSYS = 1, 25, 38
_CAP_DAC_READ_SEARCH = 1 << 2
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_RIGHTS, _LANDLOCK_READ_FILE, _LANDLOCK_READ_FOLDER = (1 << 13) - 1, 1 << 2, 1 << 3
"""All file rights of Landlock's first version, and those that are given back."""

_SYSTEM_FOLDERS = frozenset(("dev", "proc", "sys"))
"""Folders in which even reading can do harm: devices, other processes."""
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


class Kernel:
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


# --------------------------------------------------------------------------------- all together


def limit(seconds: float, memory: int) -> None:
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
            number = getattr(resource, name)
            hard = resource.getrlimit(number)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            try:
                resource.setrlimit(number, (value, value))
            except (OSError, ValueError):
                continue  # macOS does not limit memory


def confine(kernel: Kernel | None, kind: str, server: int) -> None:
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
