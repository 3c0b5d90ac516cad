"""Run commands that need each other's results in parallel on the GPUs of a machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout, the working directory of all commands."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command, the file that it makes and the files that it needs."""

    name: str
    command: tuple[str, ...]
    """`d2f` or a script, and its arguments."""
    makes: Path
    """File that exists once the command is done."""
    needs: tuple[Path, ...] = ()
    """Files that must exist before the command starts."""
    prepare: Callable[[], Sequence[str]] = tuple
    """Called before the command starts: writes its recipe, which may depend on the results of
    earlier jobs, and returns further arguments."""
    cores: int | None = None
    """Number of CPU cores to run on, without a GPU; None: run on a GPU."""


class Crew:
    """Runs jobs, one at a time on each GPU; a failed job stops only the jobs that need it.

    The GPUs are the first ones of the machine, or of CUDA_VISIBLE_DEVICES if that is set.
    """

    def __init__(self, gpus: int, logs: Path) -> None:
        self.size = max(gpus, 1)
        self.free = list(range(self.size))
        self.on_gpu = gpus > 0
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        self.names = given.split(",") if given else [str(n) for n in range(self.size)]
        if gpus > len(self.names):
            raise SystemExit(f"--gpus {gpus}: CUDA_VISIBLE_DEVICES={given} has {len(self.names)}")
        self.logs = logs
        self.logs.mkdir(parents=True, exist_ok=True)
        self.running: list[tuple[Job, int, subprocess.Popen, float]] = []
        self.failed: list[str] = []

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs for which the needed files exist or are made by other jobs.

        Raises:
            SystemExit: Ctrl-C or SIGTERM came. It was passed on to the running jobs, which have
                saved their work.
        """
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            self._run(jobs)
        except KeyboardInterrupt:
            print(f"{clock()} stopping: {', '.join(job.name for job, *_ in self.running)}")
            raise SystemExit("stopped; go on with the same command") from None
        finally:
            # Also after an error: no job may go on without this process.
            for _, _, process, _ in self.running:
                process.terminate()
            for _, _, process, _ in self.running:
                process.wait()
            signal.signal(signal.SIGTERM, before)

    def _run(self, jobs: Sequence[Job]) -> None:
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
        environment["CUDA_VISIBLE_DEVICES"] = self.names[gpu] if self.on_gpu else ""
        # Processes that each start threads on all cores can slow each other down a hundredfold.
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // self.size, 1)))
        if job.cores is not None:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(job.cores)}
        program = ("-m", "d2f") if job.command[0] == "d2f" else (job.command[0],)
        command = [sys.executable, *program, *job.command[1:], *further]
        if job.cores is not None:
            command = ["taskset", "--cpu-list", f"0-{job.cores - 1}", *command]
        print(f"{clock()} start {job.name} on {gpu}", flush=True)
        with open(self.logs / f"{job.name}.log", "w") as log:
            # In a session of its own, so that Ctrl-C reaches the job once, through `run`.
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip
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
    """Return the time of day."""
    return time.strftime("%H:%M:%S")
