"""Load a benchmark by its name."""

from __future__ import annotations

from pathlib import Path

from d2f.errors import ConfigError
from d2f.evaluation.harness import (
    GSM8K_VARIANTS,
    HARNESS_TASKS,
    load_gsm8k_variants,
    load_harness_task,
)
from d2f.evaluation.native import NATIVE_TASKS, load_native_task
from d2f.evaluation.task import CLEAN_UPS, CLEANED_TASKS, Task
from d2f.evaluation.text2sql import TEXT_TO_SQL, load_text_to_sql
from d2f.recipe import one_of

TASKS = (*NATIVE_TASKS, *HARNESS_TASKS, GSM8K_VARIANTS, *TEXT_TO_SQL)
"""The names that a recipe may give."""
CODE_TASKS = ("functions", *CLEANED_TASKS)
"""Tasks whose answers are programs that are run."""
_SPLITS = ("test", "validation")


def load_task(
    name: str,
    *,
    num_examples: int | None = None,
    seed: int = 0,
    split: str = "test",
    data: str | Path | None = None,
    offline: bool = False,
    num_fewshot: int | None = None,
    clean_up: str = "ours",
) -> Task:
    """Load a benchmark.

    Args:
        name: One of `TASKS`.
        num_examples: The first so many problems. None, or more than a fixed benchmark has: all of
            it; for the built-in families None is 1,000.
        seed: Of the built-in families' problems, and of what gsm8k-variants draws and keeps aside.
            Other benchmarks are fixed, few-shot prompts among them, and take no notice.
        split: "test", or "validation": other problems, to choose settings on.
        data: A folder of the benchmark's public files; None: from the hub.
        offline: Ask no network.
        num_fewshot: Examples in the prompt; None: as many as the benchmark demands.
        clean_up: How a program is found in an answer: "ours", or "paper", as the paper's authors
            do it.

    Raises:
        ConfigError: The name or a setting is wrong, or the data cannot be had.

    Example:
        >>> task = load_task("word-problems", num_examples=2)
        >>> [example] = task.examples()[:1]
        >>> task.judge([example], [example.response])[0].correct
        True
    """
    one_of("task", name, TASKS)
    one_of("split", split, _SPLITS)
    one_of("clean_up", clean_up, CLEAN_UPS)
    if clean_up == "paper" and name not in CLEANED_TASKS:
        raise ConfigError(
            f'clean_up is "paper", but the paper cleans up no answers to {name}; leave it out'
        )
    _check_count("num_examples", num_examples, least=1)
    _check_count("num_fewshot", num_fewshot, least=0)
    if name in HARNESS_TASKS:
        return load_harness_task(
            name,
            num_examples=num_examples,
            split=split,
            data=data,
            offline=offline,
            num_fewshot=num_fewshot,
            clean_up=clean_up,
        )
    if num_fewshot:
        raise ConfigError(f"the task {name} has no few-shot prompt; leave num_fewshot out")
    if name == GSM8K_VARIANTS:
        return load_gsm8k_variants(
            num_examples=num_examples, seed=seed, split=split, data=data, offline=offline
        )
    if name in TEXT_TO_SQL:
        return load_text_to_sql(name, num_examples=num_examples, split=split, data=data)
    if data is not None:
        raise ConfigError(f"the task {name} makes up its problems; leave out the data folder")
    return load_native_task(name, num_examples=num_examples, seed=seed, split=split)


def _check_count(name: str, value: int | None, *, least: int) -> None:
    wrong = not isinstance(value, int) or isinstance(value, bool) or value < least
    if value is not None and wrong:
        raise ConfigError(f"{name} must be a whole number from {least} on, not {value!r}")
