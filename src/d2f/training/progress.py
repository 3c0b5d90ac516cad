"""A bar, or plain lines, that tell on stderr how a run goes."""

from __future__ import annotations

import time

from d2f.training.run_log import Record, Reporter


class Terminal(Reporter):
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
