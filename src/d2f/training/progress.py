"""What a run tells while it runs: a JSONL log, and a bar or plain lines on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

Record = Mapping[str, Any]


class Reporter(Protocol):
    """Takes the records of a run."""

    def record(self, record: Record) -> None:
        """A line of the log: step, loss, lr, and so on."""

    def sample(self, sample: Record) -> None:
        """A sample answer."""

    def evaluation(self, record: Record) -> None:
        """A line of evaluations.jsonl, and `best_step`, where the best one was."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def close(self) -> None:
        """The run is over."""


class JsonLog:
    """A JSONL file that a resumed run goes on with."""

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if after_step and path.exists():
            # Lines of steps that the resumed run makes again.
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step(line) <= after_step]
        part = path.with_name(path.name + ".part")
        part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(part, path)

    def write(self, records: Iterable[Record]) -> None:
        """Append records: all of them, or none where the disk is full.

        Raises:
            OSError: The file cannot be written.
        """
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError:
            # Half a line would spoil the next one.
            with contextlib.suppress(OSError):
                os.truncate(self.path, before)
            raise


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _step(line: str) -> float:
    """The step of a log line; of one that a crash cut short, none that is kept."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Silent:
    """Reports nothing."""

    def record(self, record: Record) -> None:
        """Nothing."""

    def sample(self, sample: Record) -> None:
        """Nothing."""

    def evaluation(self, record: Record) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Terminal:
    """A progress bar on stderr; where stderr is no terminal, a line every ten seconds."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(stderr=True, highlight=False)
        self._live = self._console.is_terminal
        self._last = 0.0
        self._score = ""
        self._progress = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f}%  {task.fields[text]}"),
            console=self._console,
        )
        self._task = self._progress.add_task("", total=1.0, step=0, text="starting")
        if self._live:
            self._progress.start()

    def record(self, record: Record) -> None:
        """Move the bar."""
        share, seconds = record["progress"], record["seconds"]
        left = seconds * (1 - share) / share if share else 0.0
        text = (
            f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"{_duration(left)} left{self._score}"
        )
        if self._live:
            self._progress.update(self._task, completed=share, step=record["step"], text=text)
        elif share >= 1 or time.monotonic() - self._last >= 10:
            self._last = time.monotonic()
            self.note(f"step {record['step']}  {share:.0%}  lr {record['lr']:.2e}  {text}")

    def sample(self, sample: Record) -> None:
        """Show the end of a prompt and the answer."""
        prompt = " ".join(str(sample["prompt"]).split())[-60:]
        answer = " ".join(str(sample["answer"]).split())[:160]
        self.note(f"step {sample['step']}  … {prompt} -> {answer}")

    def evaluation(self, record: Record) -> None:
        """Show the score, and keep it in sight."""
        rate = record.get("tokens_per_forward")
        score = f"{record['score']:.1%}"
        error = f" ±{100 * record['standard_error']:.1f}" if "standard_error" in record else ""
        speed = f", {rate:.2f} tokens per forward" if rate is not None else ""
        best = (
            "the best so far"
            if record["best_step"] == record["step"]
            else (f"the best was at step {record['best_step']}")
        )
        self.note(f"step {record['step']}  score {score}{error}{speed}; {best}")
        self._score = f"  score {score}"

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar where it is."""
        if self._live:
            self._progress.stop()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
