"""Real processes of a run on CPUs or GPUs, forked from one that has imported what they need.

`python -m tests.unit.process_group WORLD_SIZE PORT FOLDER MODULE ARGUMENT …` runs the module in so
many processes. Each writes its stderr to a file in the folder; their exit codes come on stdout's
last line. Importing takes longer than most runs, and one process does it for all.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]


class Done(NamedTuple):
    """What a group of processes leaves: exit codes and stderr by rank, and their common stdout."""

    codes: list[int]
    errors: list[str]
    out: str


def run_group(world_size: int, module: str, *arguments: object) -> Done:
    """The module in so many processes, in the environment that torchrun makes."""
    # As torchrun's agent, this process keeps the store in which the others meet.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "tests.unit.process_group",
            *map(str, (world_size, store.port, folder, module, *arguments)),
        ]  # fmt: skip
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        }
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        out, _, codes = done.stdout.rstrip("\n").rpartition("\n")
        errors = [Path(folder, str(rank)).read_text() for rank in range(world_size)]
    return Done(json.loads(codes), errors, out)


def import_all() -> None:
    """What the processes would import one by one."""
    import accelerate  # noqa: F401
    import tokenizers  # noqa: F401
    import torch._dynamo
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp  # noqa: F401

    import d2f.cli.main
    import d2f.training.run  # noqa: F401


def fork(world_size: int) -> int:
    """The rank of a new process; the old one tells how all have ended, and ends."""
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            return rank
        children.append(child)
    states = [os.waitpid(child, 0)[1] for child in children]
    sys.stdout.write("\n" + json.dumps([os.waitstatus_to_exitcode(state) for state in states]))
    raise SystemExit


def main() -> None:
    world_size, port, folder, module, *arguments = sys.argv[1:]
    import_all()
    rank = fork(int(world_size))
    with open(Path(folder, str(rank)), "wb") as file:
        os.dup2(file.fileno(), 2)
    os.environ |= {
        "WORLD_SIZE": world_size, "RANK": str(rank), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
