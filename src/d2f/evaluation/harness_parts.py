"""One of lm-eval's task objects with its data: from the hub or from a local folder."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from d2f.errors import ConfigError
from d2f.evaluation.benchmark_files import Row, read_split
from d2f.evaluation.harness_definitions import quiet

_Rows = Mapping[str, list[tuple[str, Row]]]
"""Per split: rows, each with the place where it stands."""


def build_part(
    name: str, definition: Mapping[str, Any], data: str | Path | None, offline: bool
) -> Any:
    """A task object of lm-eval.

    Args:
        name: Of the benchmark, or of the group that the definition belongs to.
        definition: As `read_definitions` gives it.
        data: A folder of the public files; None: from the hub.
        offline: Ask no network.

    Raises:
        ConfigError: The data cannot be had or read.
    """
    if data is None:
        return _from_hub(name, definition, offline)
    named = (definition.get(key) for key in ("test_split", "fewshot_split"))
    splits = {str(split) for split in named if split is not None}
    # The task asks for its training split only to find few-shot examples; that is read above.
    definition = {**definition, "training_split": None}
    rows = {split: read_split(name, split, data) for split in sorted(splits)}
    return part_of_rows(definition, rows)


def _from_hub(name: str, definition: Mapping[str, Any], offline: bool) -> Any:
    with quiet():
        try:
            with _no_network() if offline else contextlib.nullcontext():
                return _task_class()(config=dict(definition))
        except Exception as error:  # of the hub's client, of datasets, of the network
            lines = str(error).strip().splitlines()
            reason = (lines[0] if lines else type(error).__name__).rstrip(".")
            where = "the hub's local cache has no" if offline else "the hub does not give the"
            raise ConfigError(
                f"{where} data set {definition['dataset_path']} of the task {name}: {reason}. "
                + ("Leave out offline, or name" if offline else "Check the network, or name")
                + " a folder of the public files as data"
            ) from error


@contextlib.contextmanager
def _no_network() -> Iterator[None]:
    """What HF_HUB_OFFLINE=1 does, for libraries that read it when they were imported."""
    import datasets.config
    import huggingface_hub.constants

    settings = (datasets.config, huggingface_hub.constants)
    before = [setting.HF_HUB_OFFLINE for setting in settings]
    for setting in settings:
        setting.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.HF_HUB_OFFLINE = value


def part_of_rows(definition: Mapping[str, Any], rows: _Rows) -> Any:
    """A task object of lm-eval on rows at hand.

    Args:
        definition: As `read_definitions` gives it.
        rows: Per split that it names, each row with the place where it stands.

    Raises:
        ConfigError: A row is not what the task's own functions can use.
    """
    with quiet():
        try:
            return _task_class()(config=dict(definition), rows=rows)
        except Exception:
            _blame_a_row(definition, rows)
            raise


@functools.cache
def _task_class() -> Any:
    import datasets
    from lm_eval.api.task import ConfigurableTask

    class HarnessPart(ConfigurableTask):
        """lm-eval's task, on rows at hand if there are any.

        It renders an example of the few-shot prompt once, not for every problem anew, which would
        take longer than all the rest.
        """

        def __init__(self, config: dict[str, Any], rows: _Rows | None = None) -> None:
            self._rows = rows
            self._rendered: dict[tuple[str, int], Any] = {}
            super().__init__(config=config)
            # They live as long as the task, so that their ids tell them apart.
            self._shots = {id(doc) for doc in self.sampler.df}

        def download(self, dataset_kwargs: Any = None, **kwargs: Any) -> None:
            if self._rows is None:
                super().download(dataset_kwargs, **kwargs)
                return
            self.dataset = {
                split: datasets.Dataset.from_list([row for _, row in found])
                for split, found in self._rows.items()
            }

        def doc_to_text(self, doc: Any, doc_to_text: Any = None) -> Any:
            return self._once(super().doc_to_text, doc, doc_to_text)

        def doc_to_target(self, doc: Any, doc_to_target: Any = None) -> Any:
            return self._once(super().doc_to_target, doc, doc_to_target)

        def _once(self, render: Callable[[Any, Any], Any], doc: Any, template: Any) -> Any:
            if id(doc) not in getattr(self, "_shots", ()):
                return render(doc, template)
            key = (render.__name__, id(doc))
            if key not in self._rendered:
                self._rendered[key] = render(doc, template)
            return self._rendered[key]

    return HarnessPart


def _blame_a_row(definition: Mapping[str, Any], rows: _Rows) -> None:
    import datasets

    process = definition.get("process_docs")
    if process is None:
        return
    for where, row in (pair for found in rows.values() for pair in found):
        try:
            process(datasets.Dataset.from_list([row]))
        except Exception as error:
            raise ConfigError(
                f"{where}: lm-eval's task {definition['task']} cannot use this row "
                f"({type(error).__name__}); does its solution end in \\boxed{{…}}?"
            ) from None
