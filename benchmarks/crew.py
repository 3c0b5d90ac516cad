"""Commands that wait for each other's results, side by side on the GPUs of a machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Where all commands run."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command."""

    name: str
    command: tuple[str, ...]
    """`d2f` and its arguments, or a script and its."""
    makes: Path
    """Exists once it is done."""
    needs: tuple[Path, ...] = ()
    """Must exist before it starts."""
    prepare: Callable[[], Sequence[str]] = tuple
    """Called before it starts: writes its recipe, which may depend on what earlier jobs found, and
    gives further arguments."""
    cores: int | None = None
    """Run on so many cores of the processor, and on no GPU."""


class Crew:
    """Runs jobs, one on each GPU; a job that fails stops nothing but what needs it."""

    def __init__(self, gpus: int, logs: Path) -> None:
        self.size = max(gpus, 1)
        self.free = list(range(self.size))
        self.on_gpu = gpus > 0
        self.logs = logs
        self.logs.mkdir(parents=True, exist_ok=True)
        self.running: list[tuple[Job, int, subprocess.Popen, float]] = []
        self.failed: list[str] = []

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs whose needs get met."""
        waiting = [job for job in jobs if not job.makes.exists()]
        while waiting or self.running:
            self._collect()
            ready = [job for job in waiting if all(path.exists() for path in job.needs)]
            while ready and self.free:
                job = ready.pop(0)
                waiting.remove(job)
                self._start(job, self.free.pop(0))
            if waiting and not ready and not self.running:
                missing = ", ".join(job.name for job in waiting)
                print(f"not run, since what they need is missing: {missing}", flush=True)
                self.failed += [job.name for job in waiting]
                return
            time.sleep(0.5)

    def _start(self, job: Job, gpu: int) -> None:
        further = job.prepare()
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        if self.on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        # Processes that each take all cores for their threads slow each other down a hundredfold.
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // self.size, 1)))
        if job.cores is not None:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(job.cores)}
        program = ("-m", "d2f") if job.command[0] == "d2f" else (job.command[0],)
        command = [sys.executable, *program, *job.command[1:], *further]
        if job.cores is not None:
            command = ["taskset", "--cpu-list", f"0-{job.cores - 1}", *command]
        log = open(self.logs / f"{job.name}.log", "w")  # noqa: SIM115 (the process owns it)
        print(f"{clock()} start {job.name} on {gpu}", flush=True)
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )
        self.running.append((job, gpu, process, time.monotonic()))

    def _collect(self) -> None:
        for entry in list(self.running):
            job, gpu, process, start = entry
            if process.poll() is None:
                continue
            self.running.remove(entry)
            self.free.append(gpu)
            state = "done"
            if process.returncode == 0:
                job.makes.parent.mkdir(parents=True, exist_ok=True)
                job.makes.touch()
            else:
                state = f"FAILED ({process.returncode})"
                self.failed.append(job.name)
            print(f"{clock()} {state} {job.name}, {time.monotonic() - start:.0f} s", flush=True)


def clock() -> str:
    """Time of day."""
    return time.strftime("%H:%M:%S")
