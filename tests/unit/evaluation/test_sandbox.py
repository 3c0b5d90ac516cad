"""Programs that mean harm: what is said of them, and that nothing happened."""

import ctypes
import os
import platform
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from d2f.errors import ConfigError, D2FError
from d2f.evaluation import sandbox, sandbox_child, sandbox_locks
from d2f.evaluation.sandbox import Limits, Server, run_programs, sandbox_kind

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no sandbox on Windows")

BY_KERNEL = pytest.mark.parametrize("server", ["seccomp"], indirect=True)
QUICK = Limits(seconds=0.1)
AMPLE = Limits(seconds=20)
PROC = Path("/proc/self").exists()


@pytest.fixture(scope="module", params=["seccomp", "audit"])
def server(request):
    if request.param == "seccomp" and sandbox_kind() != "seccomp":
        pytest.skip("this kernel has no seccomp")
    server = Server(request.param)
    assert server.kind == request.param
    yield server
    server.close()


@pytest.fixture
def victim(tmp_path, server):
    """A file that programs try to harm; afterwards this looks for whatever must not happen."""
    file = tmp_path / "folder" / "victim"
    file.parent.mkdir()
    file.write_text("precious")
    before = file.stat()
    yield file
    after = file.stat()
    assert file.read_text() == "precious"
    # All but the time of access.
    assert [*after[:7], *after[8:]] == [*before[:7], *before[8:]]
    assert list(tmp_path.rglob("*")) == [file.parent, file]
    assert list(Path(server._folder).iterdir()) == []
    assert server.run("assert True", AMPLE).passed, "the server is gone"
    assert wait_for(lambda: len(processes_of(server._folder)) == 1)


def processes_of(folder: str) -> list[int]:
    """The server of a folder and the children it forked, by the arguments they share."""
    if not PROC:
        return [0]
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and folder.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for(condition, seconds=5.0):
    """Whether something comes true soon."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def run(server, program, limits=AMPLE, **names):
    for name, value in names.items():
        program = program.replace(name, repr(str(value)))
    return server.run(textwrap.dedent(program), limits)


REFUSED = {
    "write": "open(VICTIM, 'w')",
    "append": "open(VICTIM, 'ab')",
    "update": "open(VICTIM, 'r+')",
    "create": "open(VICTIM + '2', 'x')",
    "create here": "open('x', 'w')",
    "os.open": "import os; os.open(VICTIM + '2', os.O_CREAT | os.O_WRONLY)",
    "os.open truncates": "import os; os.open(VICTIM, os.O_TRUNC)",
    "pathlib": "import pathlib; pathlib.Path(VICTIM).write_text('')",
    "remove": "import os; os.remove(VICTIM)",
    "rename": "import os; os.rename(VICTIM, VICTIM + '2')",
    "mkdir": "import os; os.mkdir(VICTIM + '2')",
    "rmdir": "import os; os.rmdir(os.getcwd())",
    "rmtree": "import os, shutil; shutil.rmtree(os.path.dirname(VICTIM))",
    "copy": "import shutil; shutil.copy(VICTIM, VICTIM + '2')",
    "link": "import os; os.link(VICTIM, VICTIM + '2')",
    "symlink": "import os; os.symlink(VICTIM, 'x')",
    "truncate": "import os; os.truncate(VICTIM, 0)",
    "chmod": "import os; os.chmod(VICTIM, 0)",
    "chown": "import os; os.chown(VICTIM, 1, 1)",
    "utime": "import os; os.utime(VICTIM, (1, 1))",
    "mkfifo": "import os; os.mkfifo(VICTIM + '2')",
    "mknod": "import os; os.mknod(VICTIM + '2')",
    "chdir": "import os; os.chdir('/')",
    "socket": "import socket; socket.socket()",
    "connect": "import socket; socket.create_connection(('127.0.0.1', 9))",
    "socketpair": "import socket; socket.socketpair()",
    "url": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
    "fork": "import os\nif os.fork() == 0:\n    open(VICTIM, 'w')",
    "fork bomb": "import os\nfor _ in range(20):\n    os.fork()",
    "subprocess": "import subprocess; subprocess.run(['rm', VICTIM])",
    "spawn": "import os; os.posix_spawn('/bin/rm', ['rm', VICTIM], {})",
    "exec": "import os; os.execv('/bin/rm', ['rm', VICTIM])",
    "popen": "import os; os.popen('rm ' + VICTIM).close()",
    "multiprocessing": "import multiprocessing as m; m.get_context('fork').Process().start()",
    "thread": "import threading; threading.Thread(target=print).start()",
    "pool": "from concurrent.futures import ThreadPoolExecutor as P; P().submit(print).result()",
    "kill server": "import os; os.kill(os.getppid(), 9)",
    "kill group": "import os; os.killpg(os.getpgid(os.getppid()), 9)",
    "kill us": f"import os; os.kill({os.getpid()}, 0)",
    "raise limits": "import resource as r; r.setrlimit(r.RLIMIT_CPU, (9, 9))",
    "limit server": "import os, resource as r; r.prlimit(os.getppid(), r.RLIMIT_CPU, (0, 0))",
    "nice": "import os; os.nice(5)",
    "session": "import os; os.setsid()",
    "sendfile": "import os; os.sendfile(1, 0, 0, 1)",
    "own": "import fcntl, os; fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
}


@pytest.mark.parametrize("name", REFUSED)
def test_harm_is_refused(server, victim, name):
    execution = run(server, REFUSED[name], VICTIM=victim)
    assert not execution.passed
    words = ("not permitted", "refused in the sandbox", "can't start new thread", "not allowed")
    assert any(word in execution.reason for word in words), execution.reason


def test_harm_that_raises_nothing_does_nothing_either(server, victim):
    program = """
        import os, tempfile
        try:
            os.system("rm " + VICTIM)
        except OSError:
            pass
        for attempt in range(3):
            try:
                tempfile.NamedTemporaryFile(delete=False)
            except OSError:
                pass
        """
    assert run(server, program, VICTIM=victim).passed


ENDLESS = {
    "loop": "while True: pass",
    "stubborn": """
        def f():
            while True:
                try:
                    while True: pass
                except BaseException:
                    pass
        f()
        """,
    "sleep": "import time; time.sleep(60)",
    "finalizer": """
        class A:
            def __del__(self):
                while True: pass
        del A
        class B:
            def __del__(self):
                while True: pass
        b = B()
        del b
        """,
    "alarm": """
        import signal
        def again(*_):
            signal.alarm(1)
            while True: pass
        signal.signal(signal.SIGALRM, again)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        while True: pass
        """,
    "deaf": """
        import signal
        for number in signal.valid_signals():
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        while True: pass
        """,
    "big number": "10 ** 10 ** 10",
    "pattern": "import re; re.match(r'(a+)+$', 'a' * 64 + 'b')",
    "output": "while True: print('x' * 100_000)",
    "error's text": """
        class E(Exception):
            def __str__(self):
                while True: pass
        raise E
        """,
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_program_is_killed(server, victim, name):
    execution = run(server, ENDLESS[name], QUICK)
    assert not execution.passed
    assert execution.reason == "more than 0.1 s"
    assert 0.1 <= execution.seconds < 5


def test_closed_channel_ends_a_program(server, victim):
    execution = run(server, "import os; os.closerange(0, 64)\nwhile True: pass", AMPLE)
    assert not execution.passed
    assert execution.seconds < 10


MEMORY = {
    "text": "'a' * (1 << 30)",
    "list": "x = []\nwhile True: x.append('a' * 1_000_000)",
    "map": "import mmap; mmap.mmap(-1, 1 << 30)",
    "file": "open('/dev/zero', 'rb').read()",
}


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit memory")
@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_limited(server, victim, name):
    execution = server.run(MEMORY[name], Limits(seconds=20, memory_mib=128))
    assert not execution.passed
    assert "MemoryError" in execution.reason or "memory" in execution.reason


def test_recursion_harms_the_program_alone(server, victim):
    assert "RecursionError" in server.run("def f(): f()\nf()", AMPLE).reason
    deep = (
        "import sys; sys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**5): x = [x]\nrepr(x)"
    )
    execution = server.run(deep, AMPLE)
    assert not execution.passed
    assert "SIGSEGV" in execution.reason or "RecursionError" in execution.reason  # by version
    assert not server.run("(" * 100_000, AMPLE).passed
    assert not server.run("-" * 100_000 + "1", AMPLE).passed


ENDS_EARLY = {
    "exit": "import sys; sys.exit(0)",
    "exit in answer": "def f(): raise SystemExit\nf()\nassert False",
    "hard exit": "import os; os._exit(0)",
    "exit at exit": "import atexit, os; atexit.register(os._exit, 0); raise ValueError",
    "interrupt": "raise KeyboardInterrupt",
    "generator": "raise GeneratorExit",
    "exit from signal": """
        import os, signal, time
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        time.sleep(10)
        """,
    "exit patched": """
        import builtins, os, sys
        sys.exit = os._exit = os.write = os.read = lambda *_: 0
        builtins.BaseException = builtins.Exception = builtins.AssertionError = ValueError
        builtins.exec = builtins.compile = builtins.isinstance = lambda *_: True
        sys.excepthook = print
        raise KeyError
        """,
    "printed": "import os\nprint('P' * 17)\nfor fd in range(8):\n    print(fd, file=open(fd, 'w'))",
    "nonce from frames": """
        import gc, os, sys
        found, frame = [b"\\0" * 16], sys._getframe()
        while frame is not None:
            for names in (frame.f_locals, frame.f_globals):
                found += [v for v in names.values() if isinstance(v, bytes) and len(v) == 16]
            frame = frame.f_back
        for nonce in found:
            for descriptor in range(64):
                try:
                    os.write(descriptor, b"P" + nonce)
                except OSError:
                    pass
        os._exit(0)
        """,
    "trace": """
        import os, sys
        sys.settrace(lambda *_: os._exit(0))
        def f(): pass
        f()
        """,
    "error without words": """
        class E(Exception):
            def __str__(self): raise SystemExit(0)
        raise E
        """,
    "broken": "x = (",
    "null": "x = 1\0",
    "half a pair": "x = '\ud800'",
}


@pytest.mark.parametrize("name", ENDS_EARLY)
def test_program_passes_by_its_last_statement_alone(server, victim, name):
    execution = run(server, ENDS_EARLY[name])
    assert not execution.passed
    assert execution.reason


def test_output_is_thrown_away(server, capfd):
    program = "import sys\nfor _ in range(20): print('x' * 1_000_000)\nprint('y', file=sys.stderr)"
    assert server.run(program, AMPLE).passed
    assert capfd.readouterr() == ("", "")


def test_reason_is_short_and_says_where(server):
    execution = server.run("x = 1\nassert x == 2, 'no' * 100_000", AMPLE)
    assert execution.reason.startswith("AssertionError at line 2: nono")
    assert len(execution.reason) <= 600


def test_program_sees_a_clean_interpreter(server):
    program = """
        import os, sys, random, __main__
        assert dict(os.environ) == {}
        assert os.listdir() == [], os.listdir()
        assert __name__ == "__program__" == __main__.__name__
        assert "annotations" not in globals() and 1 .__class__ is int
        assert not any("site-packages" in path for path in sys.path), sys.path
        assert sys.argv == ["program"]
        try:
            input()
            raise AssertionError
        except EOFError:
            pass
        """
    assert run(server, program).reason == ""


def test_standard_library_is_there(server):
    program = """
        import asyncio, bisect, collections, csv, dataclasses, datetime, decimal, fractions, hashlib
        import heapq, itertools, json, math, random, re, statistics, string, subprocess, typing
        import xml.etree.ElementTree, zlib, unittest, socket, sqlite3

        @dataclasses.dataclass
        class Point:
            x: "int" = 1

        Pair = typing.NamedTuple("Pair", [("a", int)])
        assert Point() == Point(1) and Pair(1).a == 1
        assert hashlib.md5(b"").hexdigest().startswith("d41d")
        assert datetime.date(2024, 2, 29).isoformat() == "2024-02-29" and math.gcd(4, 6) == 2
        """
    assert run(server, program).reason == ""


def test_chance_is_the_same_every_time():
    once, again = run_programs(["import random\nraise KeyError(random.random(), hash('a'))"]) * 2
    assert once.reason == again.reason


@BY_KERNEL
def test_all_other_system_calls_are_refused(server, victim):
    _, column = sandbox_locks._ARCHITECTURES[platform.machine()]
    rows = [*sandbox_locks._ALLOWED_CALLS.values(), sandbox_locks._OPEN, sandbox_locks._OPENAT]
    rows += [sandbox_locks._FCNTL, sandbox_locks._IOCTL, sandbox_locks._PRLIMIT64]
    # The kernel's probes are exempt from filters: they harm nobody but a caller that is no probe.
    rows += [(335, None), (336, None)]
    program = f"""
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        for number in set(range(600)) - { ({row[column] for row in rows}) }:
            assert libc.syscall(number, 0, 0, 0, 0, 0, 0) == -1, number
            assert ctypes.get_errno() in (1, 38), (number, ctypes.get_errno())
        """
    assert run(server, program).reason == ""


@BY_KERNEL
def test_arguments_of_system_calls_are_looked_at(server, victim):
    program = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        path = VICTIM.encode()
        os.close(os.open(path, os.O_RDONLY))
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_TRUNC, os.O_APPEND, os.O_CREAT, 0o20200000, 3):
            assert libc.open(path, flags, 0o600) == -1 and ctypes.get_errno() == 1, flags
            assert libc.openat(-100, path, flags, 0o600) == -1 and ctypes.get_errno() == 1, flags
        for command in (4, 5, 6, 7, 8, 10, 15, 1024, 1025, 1031, 1033):
            assert libc.fcntl(1, command, 0) == -1 and ctypes.get_errno() == 1, command
        limits = (ctypes.c_ulong * 2)(1, 1)
        assert libc.prlimit(0, 0, None, limits) == 0
        for pid, new in ((0, limits), (os.getppid(), limits), (os.getppid(), None)):
            assert libc.prlimit(pid, 0, new, None) == -1 and ctypes.get_errno() == 1, pid
        assert libc.ioctl(0, 0x5412, b"x") == -1 and ctypes.get_errno() == 25
        assert libc.unlink(path) == libc.kill(os.getppid(), 9) == libc.fork() == -1
        """
    assert run(server, program, VICTIM=victim).reason == ""


def has_landlock():
    try:
        return ctypes.CDLL(None).syscall(444, None, 0, 1) > 0
    except (AttributeError, TypeError):
        return False


@pytest.mark.skipif(not PROC, reason="names Linux's devices")
def test_devices_and_other_processes_cannot_be_looked_into(server, victim):
    if server.kind == "seccomp" and not has_landlock():
        pytest.skip("this kernel has no Landlock")
    program = f"""
        import os
        for path in ("/dev/null", "/dev/urandom", "/etc/passwd", os.__file__):
            open(path, "rb").close()
        for place in ("/dev/full", "/dev/tty", "/proc/uptime", "/sys/kernel/profiling",
                      "/proc/{os.getpid()}/fd/0", f"/proc/{{os.getppid()}}/environ"):
            for path in (place, place.encode(), "/etc/../" + place, "/" + place):
                try:
                    os.open(path, os.O_RDONLY)
                except PermissionError:
                    continue
                raise AssertionError(path)
        """
    assert run(server, program).reason == ""


@pytest.mark.skipif(not PROC, reason="without the kernel's help anyway")
def test_interpreter_refuses_where_the_kernel_cannot(tmp_path):
    wrapper = """
        import platform, runpy
        platform.machine = lambda: "a processor without a filter"
        runpy.run_path(SCRIPT, run_name="__main__")
        """
    wrapper = textwrap.dedent(wrapper).replace("SCRIPT", repr(sandbox_child.__file__))
    folder = tmp_path / "folder"
    folder.mkdir()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-S", "-c", wrapper, "best", str(folder)]
        with subprocess.Popen(command, stdin=theirs.fileno()) as process:
            assert ours.recv(sandbox_child.KIND_BYTES).strip() == b"audit"
            ours.shutdown(socket.SHUT_RDWR)
        assert process.returncode == 0
    assert not folder.exists()


def test_filter_is_built_for_both_architectures():
    for architecture in ("x86_64", "aarch64"):
        rows = sandbox_locks.build_filter(architecture)
        assert rows[-1] == (0x06, 0, 0, 0x7FFF0000)
        assert rows[-2] == (0x06, 0, 0, 0x00050001)
        # No jump leaves the program, and none is wider than a byte.
        for index, (code, true, false, _) in enumerate(rows):
            assert max(true, false) < 256
            assert code == 0x06 or index + 1 + max(true, false) < len(rows)


def test_order_is_kept_with_many_workers():
    programs = [f"raise KeyError({number})" if number % 3 else "" for number in range(300)]
    executions = run_programs(programs, AMPLE, workers=3)
    reasons = [f"KeyError at line 1: {n}" if n % 3 else "" for n in range(300)]
    assert [execution.reason for execution in executions] == reasons
    assert [execution.passed for execution in executions] == [not reason for reason in reasons]


def test_runs_side_by_side_from_several_threads():
    found = {}
    threads = [
        threading.Thread(
            target=lambda n: found.update({n: run_programs([f"raise KeyError({n})"] * 3)}),
            args=(n,),
        )
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):
        assert {e.reason for e in found[number]} == {f"KeyError at line 1: {number}"}


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert [e.passed for e in run_programs(["x = 1", "while True: pass"], QUICK)] == [True, False]
    assert list(tmp_path.iterdir()) == []
    assert not PROC or processes_of(str(tmp_path)) == []
    assert run_programs([]) == []


def test_dead_server_is_replaced(monkeypatch):
    real, killed = Server.run, []

    def run(self, program, limits):
        if program == "killer":
            self._process.kill()
            self._process.wait()
            killed.append(self._process.pid)
        return real(self, program, limits)

    monkeypatch.setattr(Server, "run", run)
    executions = run_programs(["x = 1", "killer", "x = 2", "killer", "x = 3"], AMPLE, workers=1)
    assert [execution.passed for execution in executions] == [True, False, True, False, True]
    assert executions[1].reason == "the sandbox died while this program ran"
    assert len(set(killed)) == 2


@pytest.mark.skipif(not PROC, reason="Linux alone ends children with their parent")
def test_program_dies_with_its_server():
    server = Server()
    found = []

    def run():
        try:
            server.run("while True: pass", AMPLE)
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert wait_for(lambda: len(processes_of(server._folder)) == 2)
    os.kill(server._process.pid, signal.SIGKILL)
    thread.join(5)
    assert len(found) == 1
    server._process.wait()
    assert wait_for(lambda: processes_of(server._folder) == [])
    server.close()


@pytest.mark.skipif(not PROC, reason="looks into /proc")
def test_everything_goes_when_our_process_is_killed(tmp_path):
    program = "from d2f.evaluation.sandbox import *; run_programs(['while True: pass'] * 9)"
    path = os.pathsep.join(path for path in sys.path if path)
    environment = {"TMPDIR": str(tmp_path), "PYTHONPATH": path}
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as process:
        assert wait_for(lambda: len(processes_of(str(tmp_path))) >= 2, 30)
        process.kill()
    assert wait_for(lambda: processes_of(str(tmp_path)) == [])
    assert wait_for(lambda: list(tmp_path.iterdir()) == [])


def test_interrupted_run_ends_at_once(monkeypatch):
    def interrupted(futures):
        assert wait_for(lambda: started)
        raise KeyboardInterrupt

    started, real = [], Server.run

    def run(self, program, limits):
        started.append(program)
        return real(self, program, limits)

    monkeypatch.setattr(Server, "run", run)
    monkeypatch.setattr(sandbox, "as_completed", interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_programs(["while True: pass"] * 4, Limits(seconds=60), workers=2)
    assert time.monotonic() - start < 20


def test_system_without_sandbox_is_told(monkeypatch):
    monkeypatch.delattr(os, "fork")
    with pytest.raises(D2FError, match="cannot be run safely"):
        run_programs(["x = 1"])


@pytest.mark.parametrize(
    ("executable", "message"),
    [("", "is empty"), ("/no/such/python", "cannot start"), ("false", "did not start with false")],
)
def test_sandbox_that_does_not_start_is_told(monkeypatch, tmp_path, executable, message):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(D2FError, match=message):
        run_programs(["x = 1"] * 3)
    assert list(tmp_path.iterdir()) == []


def test_limits_are_checked():
    for wrong in (
        {"seconds": 0},
        {"seconds": float("nan")},
        {"memory_mib": 10},
        {"memory_mib": 1 << 60},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Limits(**wrong)
    with pytest.raises(ConfigError, match="at least one worker"):
        run_programs(["x = 1"], workers=0)
