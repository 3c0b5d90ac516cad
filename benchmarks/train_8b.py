"""Measure the distillation at 8B against its bars, each measurement in its own process.

    python benchmarks/train_8b.py --output benchmarks/reports/DATE-train-GPU
    python benchmarks/train_8b.py --parts parity llada --budget 540 --output OUTPUT
    python benchmarks/train_8b.py --tiny --output /tmp/tiny

Each measurement writes a JSON file into OUTPUT and is skipped if that file exists, so the same
command continues an interrupted run. After each measurement README.md and train.png are written
anew from all files. With --budget no measurement starts that would exceed so many seconds. The
script is made for GPUs with 80 GB (the memory of a larger one is limited to that where a bar is
about 80 GB). The parts `two` and `full` need two GPUs and are left out on one. --tiny runs
everything at toy sizes on a CPU. To use a second GPU at the same time, start the script twice with
the same OUTPUT and different --parts and CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from train_8b_report import write_report

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"llada": "llada-8b", "dream": "dream-7b"}
EIGHTY_GB = ("--memory-limit", "78")
"""Limit in GiB for tensors, so that a measured run would fit into a GPU of 80 GB."""
PARTS = ("parity", "llada", "dream", "repeat", "two", "full", "small")
D2F = (sys.executable, "-m", "d2f")
TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A measurement and its command."""

    name: str
    """Name of the measurement, whose result is OUTPUT/name.json."""
    parts: tuple[str, ...]
    """Parts that the measurement belongs to; it runs if one of them is selected."""
    command: tuple[str, ...]
    seconds: int
    """Estimated seconds on an H100 or H200, compiling included."""
    gpus: int = 1
    cpu: bool = True
    """Whether it can run on a CPU."""
    needs: str | None = None
    """Name of the job whose result this one reads."""

    @property
    def limit(self) -> int:
        """Seconds after which the measurement is ended."""
        return 2 * self.seconds + 60


# ------------------------------------------------------------------------------------------- jobs


def make_jobs(options: argparse.Namespace) -> list[Job]:
    """Return all measurements, the most important first."""
    out, tiny = options.output, options.tiny
    parity = (sys.executable, "benchmarks/train_parity.py", "--output", str(out / "parity.json"))
    jobs = [
        Job(
            name="parity",
            parts=("parity",),
            command=(*parity, *(("--tiny", str(out / "tiny")) if tiny else ())),
            seconds=100,
        )
    ]
    for short, shape in SHAPES.items():

        def bench(name: str, *more: str, shape: str = shape) -> tuple[str, ...]:
            return train_command(options, shape, name, *more)

        one, four, most = (f"{short}_{size}" for size in (1, 4, "max"))
        repeat = ("--repeat-batch", "5" if tiny else "100")
        jobs += [
            Job(
                name=one,
                parts=(short, "repeat"),
                command=bench(one, "--micro-batch", "1", *repeat, *EIGHTY_GB),
                seconds=90,
            ),
            Job(
                name=four,
                parts=(short,),
                command=bench(four, "--micro-batch", "4", "--checkpointing", "both", *EIGHTY_GB),
                seconds=110,
            ),
            Job(
                name=most,
                parts=(short,),
                command=bench(
                    most, "--micro-batch", "max", "--checkpointing", "both", "--steps", "3",
                    *EIGHTY_GB,
                ),
                seconds=300,
                cpu=False,
            ),
        ]  # fmt: skip
    return [*sorted(jobs, key=importance), *two_jobs(options), *small_jobs(options)]


def importance(job: Job) -> int:
    """Return the rank of a job: LLaDA before Dream, the largest micro-batches last."""
    return (job.name != "parity") + job.name.startswith("dream") + 2 * job.name.endswith("max")


def train_command(
    options: argparse.Namespace,
    shape: str,
    name: str,
    *more: str,
    program: tuple[str, ...] = D2F,
) -> tuple[str, ...]:
    """Return the command `d2f bench train` for a shape, or for its tiny stand-in."""
    model: tuple[str, ...] = ("--shape", shape)
    if options.tiny:
        model = (
            "--model", str(options.output / "tiny" / shape), "--length", "64", "--device", "cpu",
            "--dtype", "float32",
        )  # fmt: skip
        limited = more.index("--memory-limit") if "--memory-limit" in more else len(more)
        more = (*more[:limited], *more[limited + 2 :], "--steps", "2")
    file = str(options.output / f"{name}.json")
    return (*program, "bench", "train", *model, *more, "--json", file)


def two_jobs(options: argparse.Namespace) -> list[Job]:
    """Return the jobs on two GPUs: against one GPU, and a full fine-tuning."""

    def job(name: str, part: str, seconds: int, gpus: int, *more: str) -> Job:
        program = D2F if gpus == 1 else (*TWO, "-m", "d2f")
        command = train_command(options, "llada-8b", name, *more, program=program)
        return Job(name=name, parts=(part,), command=command, seconds=seconds, gpus=gpus)

    # The cost of gathering weights does not grow with the micro-batch.
    sizes = ("--micro-batch", "4,16")
    whole = ("--full", "--sharding", "full", "--micro-batch", "1", "--checkpointing", "yes")
    return [
        job("two_ddp", "two", 50, 2, *sizes),
        job("two_fsdp", "two", 50, 2, *sizes, "--sharding", "full"),
        job("two_one", "two", 40, 1, *sizes),
        job("full", "full", 100, 2, *whole, "--steps", "3"),
    ]


def small_jobs(options: argparse.Namespace) -> list[Job]:
    """Return the jobs that train a student with the loss in chunks and score it."""
    out, tiny = options.output, options.tiny
    settings = {
        "model.init": '"src/d2f/shipped/teacher"',
        "precision": '"bfloat16"',
        "loss_memory_mib": 64,
        "max_seconds": options.small_seconds,
    }
    if tiny:
        settings |= {
            "steps": 2, "batch_size": 2, "data.num_problems": 64, "data.num_workers": 1,
            "data.sequence_length": 200, "loss_memory_mib": 1,
        }  # fmt: skip
    run = out / "small" / "student"
    train = [*D2F, "train", "recipes/shipped_student.toml", "--output", str(run)]
    train += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    score = [sys.executable, "benchmarks/shipped_models.py", "--only", "student"]
    score += ["--num-problems", "2", "--batch-size", "2"] if tiny else ["--num-problems", "5120"]

    def scored(name: str, *models: str) -> tuple[str, ...]:
        return (*score, *models, "--output", str(out / f"{name}.json"))

    # The script looks for MODELS/student; the run's model is in final/.
    return [
        Job(
            name="small_train",
            parts=("small",),
            command=(*train, *(("--device", "cpu") if tiny else ())),
            seconds=options.small_seconds + 80,
        ),
        Job(
            name="small_score",
            parts=("small",),
            command=scored("small_score", "--models", str(out / "small" / "models")),
            seconds=60,
            needs="small_train",
        ),
        Job(name="small_shipped", parts=("small",), command=scored("small_shipped"), seconds=60),
    ]


# ---------------------------------------------------------------------------------------- running


def run_jobs(jobs: list[Job], options: argparse.Namespace, gpus: int) -> None:
    """Run the jobs one after the other; a failed one stops only those that need it."""
    start = time.monotonic()
    for number, job in enumerate(jobs, 1):
        head = f"[{number}/{len(jobs)}] {job.name}"
        left = options.budget - (time.monotonic() - start)
        reason = why_not(job, options, gpus, left)
        if reason is None:
            seconds = min(job.limit, left)
            say(f"{head}: at most {seconds:.0f} s, about {job.seconds} …")
            begun = time.monotonic()
            state = run_job(job, options.output, seconds)
            say(f"{head}: {state} after {time.monotonic() - begun:.0f} s")
            report(options.output)
        else:
            say(f"{head}: {reason}")


def report(output: Path) -> None:
    """Write README.md and train.png; an error here must not stop the next measurement."""
    try:
        write_report(output)
    except Exception as error:
        say(f"no report: {type(error).__name__}: {error}; the results are in {output}")


def why_not(job: Job, options: argparse.Namespace, gpus: int, left: float) -> str | None:
    """Return the reason not to run a job now; None if it runs."""
    if is_done(options.output / f"{job.name}.json"):
        return "there already"
    if job.needs is not None and not is_done(options.output / f"{job.needs}.json"):
        return f"not run, it needs {job.needs}"
    if options.tiny:
        return None if job.cpu else "not run, it needs a GPU"
    if job.gpus > gpus:
        return f"not run, it needs {job.gpus} GPUs and there are {gpus}"
    if job.seconds > left:
        return f"not run, about {job.seconds} s do not fit into the {left:.0f} s left"
    return None


def is_done(file: Path) -> bool:
    """Return whether a result exists and is of a complete measurement."""
    try:
        return json.loads(file.read_text()).get("complete", True)
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def run_job(job: Job, output: Path, seconds: float) -> str:
    """Run a job with its output in a log file; return how it ended."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH")])
    )
    log = output / "logs" / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if job.name == "small_train":
        # The folder of an interrupted run would look complete, so it is removed first.
        shutil.rmtree(output / "small", ignore_errors=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            job.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            end(process)
            return "ENDED, out of time"
        except BaseException:
            end(process)
            raise
    if code == 0 and job.name == "small_train":
        keep_small(output)
    return "done" if code == 0 else f"FAILED ({code}): {last_line(log)}"


def end(process: subprocess.Popen) -> None:
    """Stop a job and its child processes, and wait until its memory is free."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5)
            time.sleep(1)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def keep_small(output: Path) -> None:
    """Link the model to where the scoring expects it, and copy the summary as the result."""
    run = output / "small" / "student"
    models = output / "small" / "models"
    models.mkdir()
    (models / "student").symlink_to(run / "final", target_is_directory=True)
    summary = json.loads((run / "training_summary.json").read_text())
    summary["folder"] = summary["recipe"]["output"] = "small/student"
    (output / "small_train.json").write_text(json.dumps(summary, indent=1) + "\n")


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][-200:] if lines else "no output"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def make_tiny_models(folder: Path) -> None:
    from d2f.testing import write_checkpoint

    for shape, kind in (("llada-8b", "llada"), ("dream-7b", "Dream")):
        if not (folder / shape).exists():
            write_checkpoint(folder / shape, kind)


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--only", nargs="*", help="of these parts, measures of these names")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds in all")
    parser.add_argument("--small-seconds", type=int, default=240, help="training in part small")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--list", action="store_true", help="print the measures, and run nothing")
    options = parser.parse_args()
    options.output = options.output.resolve()
    jobs = [job for job in make_jobs(options) if set(job.parts) & set(options.parts)]
    if options.only:
        jobs = [job for job in jobs if job.name in options.only]
    if options.list:
        for job in jobs:
            print(f"{job.name:14s} {','.join(job.parts):14s} {job.gpus} GPU  ~{job.seconds} s")
        print(f"{'all':14s} {'':14s}        ~{sum(job.seconds for job in jobs)} s")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    if options.tiny:
        make_tiny_models(options.output / "tiny")
    run_jobs(jobs, options, num_gpus())
    report(options.output)
    say(f"report: {options.output / 'README.md'}")


if __name__ == "__main__":
    main()
