"""Where pairs of prompt and response come from: generators, JSONL files, data sets of the hub.

Free of torch, since the worker processes that encode problems import it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from d2f.errors import TrainingError
from d2f.problems import ProblemConfig, generate_problems
from d2f.problems.functions import FunctionConfig, generate_function_problems
from d2f.text import Tokenizer

if TYPE_CHECKING:
    from d2f.training.sections import DataConfig

Pair = tuple[str, str]
Knobs = ProblemConfig | FunctionConfig
Task = tuple[int, int, int, Knobs]
"""Seed, first problem, number of problems, and what they are like, which says the generator too."""
CHUNK = 2_000
"""Problems that one task generates; a fixed number, so that workers do not change the data."""
_POOL_FROM = 20_000


@dataclass(kw_only=True)
class Encoded:
    """Token ids of samples, one after the other, and the lengths to cut them up again."""

    tokens: array[int] = field(default_factory=lambda: array("i"))
    prompt_lengths: array[int] = field(default_factory=lambda: array("i"))
    response_lengths: array[int] = field(default_factory=lambda: array("i"))

    def extend(self, other: Encoded) -> None:
        """Append another batch of samples."""
        self.tokens.extend(other.tokens)
        self.prompt_lengths.extend(other.prompt_lengths)
        self.response_lengths.extend(other.response_lengths)


def read_pairs(config: DataConfig, limit: int | None = None) -> Iterator[Pair]:
    """The pairs of a run's data, at most `limit` of them.

    Raises:
        TrainingError: A file cannot be read, or a line is no object with two texts; the message
            names the file and the line.
    """
    knobs = _knobs(config)
    if knobs is not None:
        assert config.num_problems is not None
        count = min(config.num_problems, limit or config.num_problems)
        yield from _problem_pairs(count, config.seed, knobs, 0)
        return
    rows = _jsonl_rows(config.paths) if config.kind == "jsonl" else _hub_rows(config)
    for number, (where, row) in enumerate(rows):
        if limit is not None and number >= limit:
            return
        yield _pair(row, config, where)


def read_held_out(config: DataConfig, count: int) -> list[Pair]:
    """Pairs to look at while training: problems of the test split, or the first rows of files.

    Raises:
        TrainingError: As `read_pairs`.
    """
    knobs = _knobs(config)
    if knobs is None:
        return list(read_pairs(config, count))
    return list(_problem_pairs(count, config.seed, knobs, 0, "test"))


def encode_data(config: DataConfig, tokenizer: Tokenizer, folder: Path) -> Encoded:
    """Encode all pairs; `folder` is where worker processes find the same tokenizer.

    The result does not depend on the number of processes.
    """
    knobs = _knobs(config)
    if knobs is None:
        return encode_pairs(tokenizer, read_pairs(config), config.response_suffix)
    assert config.num_problems is not None
    starts = range(0, config.num_problems, CHUNK)
    tasks = [
        (config.seed, start, min(CHUNK, config.num_problems - start), knobs) for start in starts
    ]
    workers = config.num_workers or (_num_cores() if config.num_problems >= _POOL_FROM else 1)
    result = Encoded()
    if workers == 1:
        for task in tasks:
            result.extend(_encode_problems(tokenizer, config.response_suffix, task))
        return result
    # Not fork: torch and the tokenizer run threads of their own, which a fork would cut off.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(tasks)), context, _start_worker, (str(folder), config.response_suffix)
    ) as pool:
        for part in pool.map(_run_task, tasks):
            result.extend(part)
    return result


def encode_pairs(tokenizer: Tokenizer, pairs: Iterable[Pair], suffix: str = "") -> Encoded:
    """Encode pairs: the prompt through the chat template, the response as it is."""
    result = Encoded()
    for prompt, response in pairs:
        prompt_ids = tokenizer.encode_prompt(prompt)
        response_ids = tokenizer.encode(response + suffix)
        result.tokens.extend(prompt_ids)
        result.tokens.extend(response_ids)
        result.prompt_lengths.append(len(prompt_ids))
        result.response_lengths.append(len(response_ids))
    return result


def _knobs(config: DataConfig) -> Knobs | None:
    """What generated problems are like; None for data that are read."""
    if config.kind == "functions":
        return config.functions
    return config.problems if config.kind == "problems" else None


def _problem_pairs(
    count: int, seed: int, knobs: Knobs, start: int, split: str = "train"
) -> Iterator[Pair]:
    if isinstance(knobs, FunctionConfig):
        for function in generate_function_problems(
            count, seed=seed, split=split, config=knobs, start=start
        ):
            yield function.prompt, function.response
        return
    for problem in generate_problems(count, seed=seed, split=split, config=knobs, start=start):
        yield problem.prompt, problem.response


def _encode_problems(tokenizer: Tokenizer, suffix: str, task: Task) -> Encoded:
    seed, start, count, knobs = task
    pairs = _problem_pairs(count, seed, knobs, start)
    return encode_pairs(tokenizer, pairs, suffix)


_worker: list[tuple[Tokenizer, str]] = []


def _start_worker(folder: str, suffix: str) -> None:
    # One process per core already; the tokenizer's own threads would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.append((Tokenizer.load(folder), suffix))


def _run_task(task: Task) -> Encoded:
    return _encode_problems(*_worker[-1], task)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _jsonl_rows(paths: Iterable[str]) -> Iterator[tuple[str, object]]:
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    where = f"{path}:{number}"
                    if not line.strip():
                        continue
                    try:
                        yield where, json.loads(line)
                    except json.JSONDecodeError as error:
                        raise TrainingError(f"{where}: not valid JSON: {error}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise TrainingError(f"cannot read data {path}: {error}") from None


def _hub_rows(config: DataConfig) -> Iterator[tuple[str, object]]:
    try:
        import datasets  # late: it takes seconds, and only this kind of data needs it
    except ImportError:
        raise TrainingError(
            "data of kind 'hub' needs the package datasets: pip install 'd2f[train]'"
        ) from None
    for name in config.paths:
        for number, row in enumerate(datasets.load_dataset(name, split=config.split), 1):
            yield f"{name}:{number}", row


def _pair(row: object, config: DataConfig, where: str) -> Pair:
    texts = []
    for name in (config.prompt_field, config.response_field):
        text = row.get(name) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise TrainingError(f"{where}: expected an object with a text in '{name}'")
        texts.append(text)
    return texts[0], texts[1]
