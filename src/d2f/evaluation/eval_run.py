"""Run a whole evaluation: every row's score, then the speed of all, then a summary of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

from d2f.errors import ConfigError
from d2f.evaluation.eval_progress import Reporter
from d2f.evaluation.eval_recipe import EvalRecipe, to_table
from d2f.evaluation.eval_row import Engines, EvalRow, LoadedModel, LoadModel
from d2f.evaluation.eval_score import known_problems, score_row, summarise_score
from d2f.evaluation.eval_speed import Racer, SpeedGroup, summarise_speed, whole_rounds
from d2f.evaluation.results import Record, RowFolder, check_writable
from d2f.evaluation.task import CLEANED_TASKS, Task
from d2f.hub import expanded

# Of the environment, what a time depends on.
_MACHINE = ("processor", "device", "dtype", "torch", "git_commit")


class Evaluation:
    """A recipe's rows, ready to be measured.

    Args:
        recipe: The whole recipe.
        task: Its benchmark, with as many examples as the recipe asks for.
        load_model: Loads one of its models by name.
        environment: Where it runs, as `describe_environment` tells it.
        rows: Names of the rows to measure; none: all.
        backend: As `EngineConfig` takes it.
        recipe_file: Name of the recipe's file, for the summaries.
        fresh: Throw away earlier results of these rows.

    Raises:
        ConfigError: An unknown row, a row that its model cannot do, or results of other settings.
        CheckpointError: A model is missing or broken.

    Example:
        `Evaluation(recipe, load_task(recipe.task), load_model, environment).run()`
    """

    def __init__(
        self,
        recipe: EvalRecipe,
        task: Task,
        load_model: LoadModel,
        environment: Mapping[str, Any],
        *,
        rows: Sequence[str] = (),
        backend: str = "auto",
        recipe_file: str = "",
        fresh: bool = False,
    ) -> None:
        self._recipe, self._environment = recipe, environment
        self._backend, self._file = backend, recipe_file
        examples = list(task.examples())
        if not examples:
            raise ConfigError(f"task {recipe.task} has no problems")
        self._num_examples = len(examples)
        own_fewshot = task.num_fewshot
        self._num_fewshot = recipe.num_fewshot if own_fewshot is None else own_fewshot
        selected = recipe.selected(rows)
        # Before the weights, which may take minutes.
        output = expanded(recipe.output)
        check_writable(output)
        loaded: dict[str, LoadedModel] = {}
        for settings in selected.rows:
            if settings.model not in loaded:
                loaded[settings.model] = load_model(settings.model)
        self._rows = [
            EvalRow(settings, recipe, task, examples, loaded[settings.model])
            for settings in selected.rows
        ]
        self._folders = {row.name: RowFolder(output / row.name) for row in self._rows}
        for row in self._rows:
            self._open(row, fresh)

    def _open(self, row: EvalRow, fresh: bool) -> None:
        """Make sure that the row's folder holds results of these settings or none."""
        folder = self._folders[row.name]
        if fresh:
            folder.clear()
        recipe = self._recipe
        answers = row.describe() | {
            # Where it lies does not matter, nor what it is called.
            "model": {"sha256": row.loaded.description["sha256"]},
            "task": recipe.task,
            "split": recipe.split,
            "problem_seed": recipe.seed,
            "num_fewshot": self._num_fewshot,
            **({"clean_up": recipe.clean_up} if recipe.task in CLEANED_TASKS else {}),
            "device": str(self._environment["device"]).partition(":")[0],
            "dtype": self._environment["dtype"],
            "backend": self._backend,
        }
        if row.stop and not row.settings.early_stop:
            # Older versions ended such answers at a stop string, with fewer forwards.
            answers["decodes_behind_stops"] = True
        folder.require_same("answers", answers)
        if recipe.score is not None and row.settings.score:
            score = {"batch_size": recipe.score.batch_size}
            folder.require_same("score", score)
            folder.note_settings("score", score)
            known_problems(row, folder)
        folder.note_settings("answers", answers)

    def run(self, reporter: Reporter | None = None) -> list[Record]:
        """Measure what is missing.

        What is measured is on the disk at once; after an interruption the same call goes on.

        Returns:
            The summary of each row, as its folder has it.
        """
        reporter = reporter or Reporter()
        self._score(reporter)
        self._speed(reporter)
        return [self._summarise(row) for row in self._rows]

    def _score(self, reporter: Reporter) -> None:
        if self._recipe.score is None:
            return
        batch_size = self._recipe.score.batch_size
        with closing(Engines(self._rows, self._backend)) as engines:
            for row in self._rows:
                if not row.settings.score:
                    continue
                new = score_row(
                    row,
                    engines.of(row, batch_size),
                    self._folders[row.name],
                    count=self._count(row),
                    batch_size=batch_size,
                    reporter=reporter,
                )
                self._note_environment(row, new)
                self._summarise(row)

    def _speed(self, reporter: Reporter) -> None:
        recipe = self._recipe
        if recipe.speed is None:
            return
        groups: dict[int, list[Racer]] = {}
        for row in self._rows:
            if row.settings.speed:
                count = min(recipe.speed_problems(row.settings), self._num_examples)
                racer = Racer(row=row, folder=self._folders[row.name], num_problems=count)
                groups.setdefault(recipe.speed_batch_size(row.settings), []).append(racer)
        for batch_size, racers in groups.items():
            group = SpeedGroup(
                racers,
                batch_size=batch_size,
                num_runs=recipe.speed.num_runs,
                settings={name: self._environment.get(name) for name in _MACHINE},
                reporter=reporter,
            )
            if group.done:
                continue
            with closing(Engines([racer.row for racer in racers], self._backend)) as engines:
                group.measure(engines)
            for racer in racers:
                self._note_environment(racer.row, True)

    def _count(self, row: EvalRow) -> int:
        wanted = self._recipe.score_problems(row.settings)
        return self._num_examples if wanted is None else min(wanted, self._num_examples)

    def _note_environment(self, row: EvalRow, measured: bool) -> None:
        """Remember where a row was last measured."""
        folder = self._folders[row.name]
        if measured or folder.settings("environment") is None:
            folder.note_settings("environment", self._environment)

    def _summarise(self, row: EvalRow) -> Record:
        recipe, settings, folder = self._recipe, row.settings, self._folders[row.name]
        summary: Record = {
            "format": 1,
            "row": row.name,
            "method": settings.method,
            "label": settings.label,
            "experiment": recipe.experiment,
            "family": recipe.family,
            "test_set": recipe.test_set,
            "task": recipe.task,
            "labels": dict(settings.labels),
            "simulated": recipe.models[settings.model].simulated,
            **row.describe(),
            "num_fewshot": self._num_fewshot,
            "split": recipe.split,
            "grid": settings.grid and asdict(settings.grid),
            "score": self._score_of(row),
            "speed": self._speed_of(row),
            "environment": folder.settings("environment"),
            "recipe": to_table(recipe),
            "recipe_file": self._file,
        }
        return folder.write_summary(summary)

    def _score_of(self, row: EvalRow) -> Record | None:
        known = self._folders[row.name].problems()
        score, count = self._recipe.score, self._count(row) if self._recipe.score else 0
        if score is None or not row.settings.score or any(i not in known for i in range(count)):
            return None
        return summarise_score([known[i] for i in range(count)], batch_size=score.batch_size)

    def _speed_of(self, row: EvalRow) -> Record | None:
        folder = self._folders[row.name]
        known = folder.settings("speed")
        if self._recipe.speed is None or not row.settings.speed or known is None:
            return None
        lines = folder.speed()
        rounds = whole_rounds(lines, known.get("indices", ()))
        whole = [line for line in lines if line["round"] in rounds]
        return summarise_speed(whole, batch_size=known["batch_size"])
