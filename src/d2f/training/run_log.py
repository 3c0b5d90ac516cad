"""The log of a run: JSONL files, the numbers of their lines, and trackers that the lines go to.

Trackers are those of accelerate: tensorboard, wandb and the like.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2f.errors import ConfigError, unknown_name
from d2f.training.confidence import mean_confidence
from d2f.training.config import TrainConfig, to_table
from d2f.training.objective import block_sums
from d2f.training.processes import Processes
from d2f.training.progress import Record, Reporter
from d2f.training.step_inputs import StepInputs


class LogWindow:
    """Sums since the last line of the log; they stay on the device until the line is written."""

    def __init__(self, step: int, seconds: float) -> None:
        self.timed_from = (step, seconds)
        """Where the clock of the window started."""
        self._losses: list[Tensor] = []
        self._norm: Tensor | None = None
        self._lr = 0.0
        self._blocks: list[tuple[Tensor, Tensor]] = []
        self.confidence: dict[str, Any] | None = None
        """What `measure_confidence` gave."""

    def add(self, loss: Tensor, norm: Tensor, lr: float) -> None:
        """Take a step: its loss, the norm of its gradient, its learning rate."""
        self._losses.append(loss)
        self._norm, self._lr = norm, lr

    def add_blocks(self, inputs: StepInputs, loss_BL: Tensor, num_blocks: int) -> None:
        """Take the losses of a micro-batch's positions, for the mean of each block."""
        if num_blocks:
            counted_BL = inputs.weight_BL > 0
            block_BL = inputs.block_in_sample_BL
            self._blocks.append(block_sums(loss_BL, counted_BL, block_BL, num_blocks))

    def record(
        self, step: int, tokens_per_step: int, seconds: float, processes: Processes
    ) -> dict[str, Any]:
        """The line: mean loss over the window; block losses, norm and rate of its last step."""
        assert self._norm is not None
        steps, elapsed = step - self.timed_from[0], seconds - self.timed_from[1]
        record: dict[str, Any] = {
            "step": step,
            "loss": torch.stack(self._losses).mean().item(),
            "lr": self._lr,
            "grad_norm": self._norm.item(),
            "tokens_per_second": round(steps * tokens_per_step / elapsed) if elapsed > 0 else 0,
            "seconds": round(seconds, 3),
            **mean_confidence(processes.share(self.confidence or {})),
        }
        if self._blocks:
            sums_N = processes.sum(torch.stack([sums for sums, _ in self._blocks]).sum(0))
            counts_N = processes.sum(torch.stack([counts for _, counts in self._blocks]).sum(0))
            means = (sums_N / counts_N.clamp_min(1)).tolist()
            record["loss_per_block"] = [
                round(mean, 6) if count else None
                for mean, count in zip(means, counts_N.tolist(), strict=True)
            ]
        return record


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


PROJECT = "d2f"
# Names of the packages where they are not the tracker's own.
_PACKAGES = {"comet_ml": ("comet_ml",), "tensorboard": ("tensorboard", "tensorboardX")}


def check_trackers(names: Sequence[str]) -> None:
    """Make sure that the trackers are there, before a model is loaded.

    Raises:
        ConfigError: accelerate or a tracker's package is missing, or there is no such tracker.
    """
    if not names:
        return
    known = _classes()
    for name in names:
        if name not in known:
            raise ConfigError(unknown_name("tracker", name, known))
        packages = _PACKAGES.get(name, (name,))
        if not any(find_spec(package) for package in packages):
            raise ConfigError(
                f'trackers = ["{name}"] needs the package {packages[0]}: pip install {packages[0]}'
            )


def _classes() -> dict[str, Any]:
    """The trackers of accelerate by name."""
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    except ImportError:
        raise ConfigError(
            "trackers need the package accelerate: pip install 'd2f[train]'"
        ) from None
    return {str(name): tracker for name, tracker in LOGGER_TYPE_TO_CLASS.items()}


class Trackers:
    """Passes a run's numbers on; only the main process makes one.

    The run is called after its output folder, within the project "d2f". What a tracker cannot take
    is told once and ends it, not the training.

    Args:
        config: The recipe; its settings are recorded with the run.
        reporter: Is told of a tracker that fails.

    Raises:
        ConfigError: As `check_trackers`, or a tracker does not start.
    """

    def __init__(self, config: TrainConfig, reporter: Reporter) -> None:
        check_trackers(config.trackers)
        self._reporter = reporter
        self._trackers: dict[str, Any] = {}
        classes = _classes() if config.trackers else {}
        settings = dict(flat(to_table(config)))
        for name in dict.fromkeys(config.trackers):
            try:
                self._trackers[name] = _start(classes[name], name, Path(config.output))
                self._trackers[name].store_init_configuration(settings)
            except Exception as error:  # each tracker has errors of its own
                raise ConfigError(f"tracker {name} does not start: {_line(error)}") from None

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass on the numbers of a line of the log, under its step."""
        values = {
            name: value
            for name, value in flat(record)
            if isinstance(value, int | float) and name != "step"
        }
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(values, step=record["step"])
            except Exception as error:
                del self._trackers[name]
                self._reporter.note(f"tracker {name} fails, and is left out: {_line(error)}")

    def close(self) -> None:
        """The run is over."""
        for name, tracker in self._trackers.items():
            try:
                tracker.finish()
            except Exception as error:
                self._reporter.note(f"tracker {name} did not end well: {_line(error)}")
        self._trackers.clear()


def _start(tracker: Any, name: str, output: Path) -> Any:
    from accelerate import PartialState

    PartialState()  # accelerate's trackers ask it whether they are on the main process
    run = output.resolve().name
    if name == "wandb":
        started = tracker(PROJECT, name=run, dir=str(output))
    elif getattr(tracker, "requires_logging_directory", False):
        started = tracker(run, str(output / "trackers"))
    else:
        started = tracker(PROJECT)
    if hasattr(started, "start"):  # older releases of accelerate start when they are made
        started.start()
    return started


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a table of tables, as `table.key`; what is no number or text as JSON.

    Example:
        >>> dict(flat({"a": {"b": 1}, "c": [1, 2], "d": None}))
        {'a.b': 1, 'c': '[1, 2]', 'd': 'null'}
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float | str):
            yield f"{prefix}{name}", value
        else:
            yield f"{prefix}{name}", json.dumps(value)


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
