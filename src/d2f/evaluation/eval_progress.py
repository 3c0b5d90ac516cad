"""Report the progress of an evaluation: by bars or plain lines on stderr, or not at all."""

from __future__ import annotations

import time

PLAIN_SECONDS = 10.0


class Reporter:
    """Takes the progress of rows, and says nothing of it."""

    def progress(self, row: str, done: int, total: int, text: str) -> None:
        """Take how many of a row's answers are there; `text` is the running result."""

    def note(self, text: str) -> None:
        """Take something that the user should know."""

    def close(self) -> None:
        """Take that the evaluation is over."""


class Terminal(Reporter):
    """Draws a bar for each row on stderr, or prints a line every ten seconds without a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self._console = Console(stderr=True, highlight=False)
        self._live = self._console.is_terminal
        self._bars: dict[str, TaskID] = {}
        self._last: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description:>18}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            Remaining(compact=True),
            console=self._console,
        )
        if self._live:
            self._progress.start()

    def progress(self, row: str, done: int, total: int, text: str) -> None:
        """Move the row's bar."""
        if self._live:
            if row not in self._bars:
                self._bars[row] = self._progress.add_task(row, total=total, completed=done, text="")
            self._progress.update(self._bars[row], completed=done, total=total, text=text)
            return
        now = time.monotonic()
        if done >= total or now - self._last.get(row, 0.0) >= PLAIN_SECONDS:
            self._last[row] = now
            self.note(f"{row}  {done}/{total}  {text}")

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bars where they are."""
        if self._live:
            self._progress.stop()
