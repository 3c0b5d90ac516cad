"""lm-eval's official definitions of benchmarks, read from the installed package.

A definition is a YAML file with prompts, stop strings, filters and metrics, some of them Python
functions beside the file. They are read at run time and never copied, so that prompts and scores
are those of lm-eval. Its functions for that are private; hence the one version.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from d2f.errors import ConfigError

LM_EVAL_VERSION = "0.4.13"
_MINERVA = "minerva_math/minerva_math"
DEFINITIONS: dict[str, tuple[str, ...]] = {
    "gsm8k": ("gsm8k/gsm8k.yaml",),
    "gsm8k_cot": ("gsm8k/gsm8k-cot.yaml",),
    "minerva_math": tuple(
        f"{_MINERVA}_{subject}.yaml"
        for subject in (
            "algebra",
            "counting_and_prob",
            "geometry",
            "intermediate_algebra",
            "num_theory",
            "prealgebra",
            "precalc",
        )
    ),
    "minerva_math500": (f"{_MINERVA}500.yaml",),
    "humaneval": ("humaneval/humaneval.yaml",),
    "mbpp": ("mbpp/mbpp.yaml",),
}
"""The files of each task, below lm-eval's folder of tasks; several where it is a group."""
CODE_TASKS = ("humaneval", "mbpp")
"""The tasks whose answers are programs to run."""


def read_definitions(name: str, code_eval: Any = None) -> list[dict[str, Any]]:
    """The definitions of a task, with their functions.

    Args:
        name: One of `DEFINITIONS`.
        code_eval: What takes the place of the hub's metric `code_eval`, for `CODE_TASKS`.

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
