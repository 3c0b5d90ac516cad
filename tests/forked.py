"""Processes of their own, forked from one that has imported what takes long.

Importing torch takes longer than most of what tests start processes for. So one process by itself,
this file as a script, imports it once. It then forks whatever `run_forked` asks for: a line of JSON
comes on its stdin for each group of processes, their exit codes go to its stdout.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
OTHERS = ("torch", "numpy", "safetensors.torch", "tokenizers", "typer", "rich.console")
"""Packages that nearly all of them need."""
GROUP = (
    "accelerate", "torch._dynamo", "torch.distributed.fsdp", "d2f.cli.main", "d2f.training.run",
)  # fmt: skip
"""What the processes of a group need beside."""


class Finished(NamedTuple):
    """Exit codes and stderr by rank, and the stdout of all."""

    codes: list[int]
    errors: list[str]
    out: str


def run_code(code: str, *arguments: object, folder: Path = ROOT) -> Finished:
    """Run code in a process of its own, as `python -c` does, with the package of this checkout."""
    return run_forked([{}], folder, (), code=code, arguments=["-c", *map(str, arguments)])


def run_group(world_size: int, module: str, *arguments: object) -> Finished:
    """Run a module in so many processes, in the environment that torchrun makes."""
    from torch.distributed import TCPStore

    # As torchrun's agent, this process keeps the store in which the others meet.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environments = [
        {
            "WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        }
        for rank in range(world_size)
    ]  # fmt: skip
    words = [module, *map(str, arguments)]
    return run_forked(environments, ROOT, GROUP, module=module, arguments=words)


def run_forked(
    environments: Sequence[dict[str, str]], folder: Path, imports: Sequence[str], **what: Any
) -> Finished:
    """One process for each environment, which is added to this process's."""
    server = start_server()
    with tempfile.TemporaryDirectory() as output:
        order = what | {
            "environments": [{**os.environ, **one} for one in environments],
            "folder": str(folder),
            "imports": list(imports),
            "output": output,
        }
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            server.stdin.write(json.dumps(order) + "\n")
            server.stdin.flush()
            answer = server.stdout.readline()
            assert answer, "the process that forks others has ended"
        except BaseException:
            # Out of time, or stopped: nobody waits for them any more.
            os.killpg(server.pid, signal.SIGKILL)
            start_server.cache_clear()
            raise
        errors = [Path(output, f"stderr-{rank}").read_text() for rank in range(len(environments))]
        return Finished(json.loads(answer), errors, Path(output, "stdout").read_text())


@functools.cache
def start_server() -> subprocess.Popen[str]:
    path = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    server = subprocess.Popen(
        [sys.executable, __file__],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(server.communicate)
    return server


# ------------------------------------------------------------------ in the process that forks


def serve() -> dict[str, Any]:
    """Fork until stdin ends; returns in each process that was forked, with what it is to do."""
    for name in OTHERS:
        importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        for name in order["imports"]:
            importlib.import_module(name)
        children = []
        for rank, environment in enumerate(order["environments"]):
            child = os.fork()
            if child == 0:
                return order | {"rank": rank, "environment": environment}
            children.append(child)
        states = [os.waitpid(child, 0)[1] for child in children]
        sys.stdout.write(json.dumps([os.waitstatus_to_exitcode(state) for state in states]) + "\n")
        sys.stdout.flush()
    raise SystemExit


def become(order: dict[str, Any]) -> None:
    """Leave what this process has of the one that forked it."""
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, f"{order['output']}/stdout", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, f"{order['output']}/stderr-{order['rank']}", os.O_WRONLY | os.O_CREAT),
    ):
        file = os.open(name, flags, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.argv, sys.path[0] = order["arguments"], order["folder"]


def main() -> None:
    order = serve()
    become(order)
    if "module" in order:
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
    else:
        exec(compile(order["code"], "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
