"""The settings of an evaluation, and the recipes that write them down.

A recipe is a TOML file with the fields of `EvalRecipe`: a task, the models, and one table
`[[rows]]` for each method that answers the task's problems.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from d2f.engine.policy import check_decoding
from d2f.errors import ConfigError, unknown_name
from d2f.evaluation.results import EXPERIMENTS, METHODS
from d2f.evaluation.task import CLEAN_UPS
from d2f.recipe import at_least, from_table, one_of, read_recipe

GOLD = "gold"
"""The length that gives an answer as many tokens as the longest gold answer has."""
MOST_TOGETHER = 4096
"""Problems in a batch; an engine makes room for all of them."""
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.+=-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """`[models.NAME]`: a model that rows name."""

    path: str
    """Folder, hub id, GGUF file, or `shipped:student` and its like."""
    adapter: str | None = None
    """LoRA adapter: folder or hub id."""
    chat_template: bool | None = None
    """Put prompts into the chat template; none: if the tokenizer has one."""
    eos: tuple[int | str, ...] = ()
    """Tokens that end an answer beside the model's own ends: ids, or texts of single tokens."""
    replace_eos: bool = False
    """Leave the model's own ends out, so that only `eos` and stop strings end an answer."""
    add_bos: bool | None = None
    """Begin prompts with the tokenizer's BOS, never with two; false adds none; none: as the
    tokenizer says."""
    simulated: str | None = None
    """The part of the model that is not real, such as random weights; the tables say so."""


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """`[score]`: how many problems are judged, and in which batches."""

    num_problems: int | None = None
    """The first so many problems of the task; none: all."""
    batch_size: int = 64
    """Most problems that are answered together."""

    def __post_init__(self) -> None:
        _check_counts(self, "score.", "num_problems", "batch_size")


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """`[speed]`: how many problems are timed, all rows side by side."""

    num_problems: int = 100
    """The first so many problems of the task."""
    num_runs: int = 3
    """Rounds that count, in each of which all rows take their turn."""
    batch_size: int = 1
    """Problems that are answered together."""

    def __post_init__(self) -> None:
        _check_counts(self, "speed.", "num_problems", "num_runs", "batch_size")


@dataclass(frozen=True, kw_only=True)
class GridEntry:
    """`[rows.grid]`: how the row's settings were chosen."""

    where: str
    """Problems on which settings were tried; never those of the recipe."""
    tried: int
    """Number of settings that were tried."""
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """The best of the settings that were tried."""


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """`[[rows]]`: one method."""

    name: str
    """Name of the row and of its folder."""
    method: str = ""
    """Name of the method in tables; none: the row's name."""
    label: str = ""
    """Name that people read; none: the row's name."""
    model: str
    """Name of one of `[models]`."""
    strategy: str
    max_new_tokens: int | str | None = None
    """Most tokens of an answer; "gold": what the longest gold answer and its EOS need, rounded up
    to a block of 32; none: the recipe's."""
    early_stop: bool = True
    """Stop at EOS and at the stop strings of the task; false decodes all that was opened."""
    eos: tuple[int | str, ...] | None = None
    """Setting that replaces the model's entry of the same name."""
    replace_eos: bool | None = None
    """Setting that replaces the model's entry of the same name."""
    temperature: float = 0.0
    seed: int = 0
    """Seed of the sampling noise; each problem adds its index."""
    score: bool = True
    """Take part in `[score]`."""
    speed: bool = True
    """Take part in `[speed]`."""
    num_problems: int | None = None
    """Number of problems that replaces `score.num_problems`."""
    speed_problems: int | None = None
    """Number of problems that replaces `speed.num_problems`: slow methods take fewer."""
    speed_batch_size: int | None = None
    """Batch size that replaces `speed.batch_size`."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """Values that the row stands for in its experiment, as `add_threshold = 0.1`, for reports."""
    grid: GridEntry | None = None
    policy: Mapping[str, Any] = field(default_factory=dict)
    """`[rows.policy]`: fields that differ from the policy that the model recommends."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """`[rows.options]`: what only this strategy takes."""

    def __post_init__(self) -> None:
        if not _FOLDER_NAME.fullmatch(self.name):
            raise ConfigError(
                f"name is {self.name!r}; it names a folder: at most 100 letters, digits, - _ . + ="
            )
        object.__setattr__(self, "method", self.method or self.name)
        object.__setattr__(self, "label", self.label or self.name)
        if self.method != self.strategy:
            one_of("method", self.method, tuple(METHODS))
        _check_limit(self.max_new_tokens)
        _check_counts(self, "", "num_problems", "speed_problems", "speed_batch_size")
        at_least("temperature", self.temperature, 0)
        check_decoding(self.strategy, self.policy, self.options)


@dataclass(frozen=True, kw_only=True)
class EvalRecipe:
    """An evaluation: the top level of a recipe.

    Raises `ConfigError` for values out of range and for rows that name no model.

    Example:
        >>> recipe = EvalRecipe(
        ...     task="word-problems", output="runs/eval", family="word problems", max_new_tokens=96,
        ...     score=ScoreSettings(num_problems=100),
        ...     models={"student": ModelEntry(path="shipped:student")},
        ...     rows=(RowSettings(name="serial", model="student", strategy="serial"),),
        ... )
        >>> recipe.rows[0].method, recipe.num_examples
        ('serial', 100)
    """

    task: str
    """Name of the benchmark."""
    output: str
    """Folder; each row has one of its own in it."""
    family: str
    """Model family, as tables show it."""
    test_set: str = ""
    """Name of the test set in tables; none: the task."""
    experiment: str = "methods"
    num_fewshot: int | None = None
    """Examples in each prompt; none: the task's own number."""
    data: str | None = None
    """Folder of the task's files; none: the hub."""
    offline: bool = False
    """Ask the hub for nothing."""
    seed: int = 0
    """Seed of problems that are generated, and of few-shot examples."""
    split: str = "test"
    clean_up: str = "ours"
    """The way to find a program in an answer: "ours", or "paper", as the authors of D2F do it."""
    max_new_tokens: int | str = GOLD
    """Length of answers for rows that say nothing else."""
    score: ScoreSettings | None = None
    speed: SpeedSettings | None = None
    models: Mapping[str, ModelEntry]
    rows: tuple[RowSettings, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "test_set", self.test_set or self.task)
        if not self.output.strip():
            raise ConfigError("output is empty; name the folder to write to")
        one_of("experiment", self.experiment, EXPERIMENTS)
        one_of("clean_up", self.clean_up, CLEAN_UPS)
        _check_limit(self.max_new_tokens)
        at_least("num_fewshot", self.num_fewshot, 0)
        if self.score is None and self.speed is None:
            raise ConfigError("the recipe measures nothing; it needs [score] or [speed] or both")
        if not self.rows:
            raise ConfigError("the recipe has no [[rows]]")
        for row in self.rows:
            if row.model not in self.models:
                raise ConfigError(
                    f"row {row.name}: {unknown_name('model', row.model, self.models)}"
                )
        names = [row.name for row in self.rows]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"two rows have the name '{twice}'; each row has a folder of its own")

    def score_problems(self, row: RowSettings) -> int | None:
        """Give the number of problems that score a row; None: all."""
        assert self.score is not None
        return self.score.num_problems if row.num_problems is None else row.num_problems

    def speed_problems(self, row: RowSettings) -> int:
        """Give the number of problems that measure a row's speed."""
        assert self.speed is not None
        return row.speed_problems or self.speed.num_problems

    def speed_batch_size(self, row: RowSettings) -> int:
        """Give the number of problems that are answered together when speed is measured."""
        assert self.speed is not None
        return row.speed_batch_size or self.speed.batch_size

    @property
    def num_examples(self) -> int | None:
        """Give the number of problems that the task must have; None: all."""
        counts: list[int | None] = []
        if self.score is not None:
            counts += [self.score_problems(row) for row in self.rows if row.score]
        if self.speed is not None:
            counts += [self.speed_problems(row) for row in self.rows if row.speed]
        known = [count for count in counts if count is not None]
        return max(known, default=1) if len(known) == len(counts) else None

    def limited(self, num_problems: int) -> EvalRecipe:
        """Limit the recipe to so many problems."""

        def least(count: int | None) -> int:
            return num_problems if count is None else min(count, num_problems)

        score, speed = self.score, self.speed
        rows = tuple(
            replace(
                row,
                num_problems=None if row.num_problems is None else least(row.num_problems),
                speed_problems=None if row.speed_problems is None else least(row.speed_problems),
            )
            for row in self.rows
        )
        return replace(
            self,
            rows=rows,
            score=score and replace(score, num_problems=least(score.num_problems)),
            speed=speed and replace(speed, num_problems=least(speed.num_problems)),
        )

    def selected(self, names: Sequence[str]) -> EvalRecipe:
        """Limit the recipe to the named rows; none named: all.

        Raises:
            ConfigError: There is no such row.
        """
        known = [row.name for row in self.rows]
        for name in names:
            if name not in known:
                raise ConfigError(unknown_name("row", name, known))
        rows = tuple(row for row in self.rows if row.name in names)
        return replace(self, rows=rows or self.rows)


def _check_counts(settings: object, table: str, *names: str) -> None:
    """Refuse counts below 1, and batches for which no machine has the memory."""
    for name in names:
        value = getattr(settings, name)
        at_least(f"{table}{name}", value, 1)
        if name.endswith("batch_size") and value is not None and value > MOST_TOGETHER:
            raise ConfigError(f"{table}{name} is {value}; it must be at most {MOST_TOGETHER}")


def _check_limit(limit: int | str | None) -> None:
    """Refuse what is neither a number of tokens nor `gold`."""
    if isinstance(limit, str):
        if limit != GOLD:
            raise ConfigError(f'max_new_tokens is {limit!r}; it must be a number or "{GOLD}"')
    else:
        at_least("max_new_tokens", limit, 1)


def load_eval_recipe(path: str | Path, overrides: Sequence[str] = ()) -> EvalRecipe:
    """Read an evaluation recipe.

    Args:
        path: A TOML file.
        overrides: Settings that replace the file's, as `key=value`, `table.key=value` or, of a
            row, `rows.NAME.key=value`.

    Raises:
        ConfigError: The file is missing or no TOML; an unknown key or table (the message names the
            nearest known one); a missing, wrongly typed or impossible value.

    Example:
        `load_eval_recipe("recipes/eval/word_problems.toml", ["score.num_problems=50"])`
    """
    return from_table(EvalRecipe, read_recipe(path, overrides), str(path))


def to_table(recipe: EvalRecipe) -> dict[str, Any]:
    """Give the settings as plain JSON values, defaults included."""
    return json.loads(json.dumps(asdict(recipe)))
