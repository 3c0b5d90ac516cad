"""The log of a run in tensorboard, wandb and the like, through accelerate's trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from d2f.errors import ConfigError, first_line, unknown_name
from d2f.training.config import TrainConfig, to_table

PROJECT = "d2f"
# Names of the packages where they are not the tracker's own.
_PACKAGES = {"comet_ml": ("comet_ml",), "tensorboard": ("tensorboard", "tensorboardX")}


def check_trackers(names: Sequence[str]) -> dict[str, Any]:
    """Give the classes of these trackers of accelerate, once each.

    Raises `ConfigError` if accelerate or a tracker's package is missing, or a name is unknown.
    """
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    except ImportError:
        raise ConfigError(
            "trackers need the package accelerate: pip install 'd2f[train]'"
        ) from None
    known = {str(name): tracker for name, tracker in LOGGER_TYPE_TO_CLASS.items()}
    for name in names:
        if name not in known:
            raise ConfigError(unknown_name("tracker", name, known))
        packages = _PACKAGES.get(name, (name,))
        if not any(find_spec(package) for package in packages):
            raise ConfigError(
                f'trackers = ["{name}"] needs the package {packages[0]}: pip install {packages[0]}'
            )

    return {name: known[name] for name in names}


class Trackers:
    """Passes a run's numbers on; only the main process makes one.

    The run is called after its output folder, within the project "d2f". What a tracker cannot take
    is told once to `note` and ends it, not the training. The recipe is recorded with the run.
    Raises `ConfigError` as `check_trackers`, or if a tracker does not start.
    """

    def __init__(self, config: TrainConfig, note: Callable[[str], object]) -> None:
        self._note = note
        self._trackers: dict[str, Any] = {}
        settings = dict(flat(to_table(config)))
        for name, tracker in check_trackers(config.trackers).items():
            try:
                self._trackers[name] = _start(tracker, name, Path(config.output))
                self._trackers[name].store_init_configuration(settings)
            except Exception as error:  # each tracker has errors of its own
                raise ConfigError(f"tracker {name} does not start: {first_line(error)}") from None

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass on the numbers of a line of the log, under its step."""
        numbers = {k: v for k, v in flat(record) if isinstance(v, int | float) and k != "step"}
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(numbers, step=record["step"])
            except Exception as error:
                del self._trackers[name]
                self._note(f"tracker {name} fails, and is left out: {first_line(error)}")

    def close(self) -> None:
        """End every tracker, as the run is over."""
        for name, tracker in self._trackers.items():
            try:
                tracker.finish()
            except Exception as error:
                self._note(f"tracker {name} did not end well: {first_line(error)}")
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
