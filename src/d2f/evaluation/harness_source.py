"""Read lm-eval's tasks: their definitions from the installed package, their rows from anywhere.

A definition is a YAML file with prompts, stop strings, filters and metrics, some of them Python
functions beside the file. They are read at run time and never copied, so that prompts and scores
are those of lm-eval. Its functions for that are private; hence the one version.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from d2f.errors import ConfigError
from d2f.evaluation.benchmark_files import DataRow, read_split

LM_EVAL_VERSION = "0.4.13"
_MINERVA = "minerva_math/minerva_math"
_SUBJECTS = (
    "algebra", "counting_and_prob", "geometry", "intermediate_algebra", "num_theory", "prealgebra",
    "precalc",
)  # fmt: skip
DEFINITIONS: dict[str, tuple[str, ...]] = {
    "gsm8k": ("gsm8k/gsm8k.yaml",),
    "gsm8k_cot": ("gsm8k/gsm8k-cot.yaml",),
    "minerva_math": tuple(f"{_MINERVA}_{subject}.yaml" for subject in _SUBJECTS),
    "minerva_math500": (f"{_MINERVA}500.yaml",),
    "humaneval": ("humaneval/humaneval.yaml",),
    "mbpp": ("mbpp/mbpp.yaml",),
}
"""The files of each task, below lm-eval's folder of tasks; several where it is a group."""


def read_definitions(name: str, code_eval: Any = None) -> list[dict[str, Any]]:
    """Give the definitions of one of `DEFINITIONS`, with their functions.

    `code_eval` takes the place of the hub's metric of this name, for `CLEANED_TASKS`.

    Raises:
        ConfigError: lm-eval is missing, another version, or lacks what the task needs.

    Example:
        `read_definitions("gsm8k")[0]["num_fewshot"]` is 5.
    """
    folder = find_lm_eval(name) / "tasks"
    with quiet(), _own_code_eval(name, code_eval):
        from lm_eval.tasks._yaml_loader import load_yaml

        try:
            return [load_yaml(folder / file) for file in DEFINITIONS[name]]
        except (ModuleNotFoundError, AssertionError):  # as minerva_math words what it lacks
            raise ConfigError(
                f"the task {name} needs sympy, math_verify and antlr4-python3-runtime 4.11: "
                "pip install 'd2f[eval]'"
            ) from None


def find_lm_eval(name: str) -> Path:
    """The folder of the installed lm-eval.

    Raises:
        ConfigError: It is not installed, or another version.
    """
    try:
        version = importlib.metadata.version("lm_eval")
        spec = importlib.util.find_spec("lm_eval")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"the task {name} is lm-eval's, which is not installed: pip install 'd2f[eval]'"
        )
    if version != LM_EVAL_VERSION:
        raise ConfigError(
            f"the task {name} is read from lm-eval {LM_EVAL_VERSION}, but {version} is installed: "
            "pip install 'd2f[eval]'"
        )
    return Path(spec.submodule_search_locations[0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval and datasets from warning and drawing bars; what matters is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets

        logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
        level = logger.level
        logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            logger.setLevel(level)
            if not bars:
                datasets.enable_progress_bars()


@contextlib.contextmanager
def _own_code_eval(name: str, code_eval: Any) -> Iterator[None]:
    """Let the module beside a code task's file find our `code_eval` when it asks the hub for it."""
    if code_eval is None:
        yield
        return
    # In the place of the package evaluate, whose import brings in torch and transformers and takes
    # ten times as long as everything else here.
    stand_in: Any = ModuleType("evaluate")
    stand_in.load = lambda *_args, **_kwargs: code_eval
    module = f"lm_eval.tasks.{name}.utils"
    before = {known: sys.modules.pop(known, None) for known in ("evaluate", module)}
    sys.modules["evaluate"] = stand_in
    try:
        yield
    finally:
        # Ours must not be found by who uses lm-eval itself in this process.
        for known, loaded in before.items():
            sys.modules.pop(known, None)
            if loaded is not None:
                sys.modules[known] = loaded


_Rows = Mapping[str, list[tuple[str, DataRow]]]
"""Rows of each split, each with the place where it stands."""


def build_part(
    name: str, definition: Mapping[str, Any], data: str | Path | None, offline: bool
) -> Any:
    """Make a task object of lm-eval, on a folder of the public files or, without, on the hub's.

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
    """Do what HF_HUB_OFFLINE=1 does, for libraries that read it when they were imported."""
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
    """Make a task object of lm-eval on the rows of each split that its definition names.

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
