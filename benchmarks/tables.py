"""Recipes of `d2f eval` that a benchmark writes, and the jobs that run them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crew import Job

from d2f.evaluation.results import METHODS

Row = dict[str, Any]

STUDENTS = {"autoregressive": "autoregressive", "serial": "student", "pipelined": "student"}
"""The model that a method decodes with, where that is not the teacher."""
ALLOWANCE = 0.005
"""A setting qualifies when it scores at most half a point below its method's best; of those that
do, the fastest is taken. Where the grid took no times, that is the one of most tokens per forward,
of equals the one that computes least."""


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Where recipes and results go, and what all recipes have in common."""

    output: Path
    score_batch: int
    """Problems that are answered together for a score."""
    speed_problems: int
    """Problems that are answered one by one for a speed."""
    eval_args: Sequence[str] = ()
    """More for `d2f eval`."""

    def row(self, method: str, name: str, setting: Row) -> Row:
        """One method with one setting."""
        row: Row = {
            "name": name,
            "method": method,
            "model": STUDENTS.get(method, "teacher"),
            "strategy": METHODS[method],
            "max_new_tokens": "gold",
            **setting,
        }
        if method in ("vanilla", "vanilla-512", "control"):
            row["early_stop"] = False
        return row

    def recipe(
        self,
        task: Row,
        models: Mapping[str, Row],
        rows: Sequence[Row],
        *,
        score: int | None = None,
        speed: bool = False,
    ) -> Row:
        """A recipe: what the task says, the models that the rows name, and what is measured.

        Args:
            task: The top level of the recipe.
            models: By name.
            rows: What `row` makes.
            score: Problems that a score counts; None: no scores.
            speed: Measure speeds.
        """
        used = {row["model"] for row in rows}
        table = {
            "seed": 1,
            **task,
            "models": {name: model for name, model in models.items() if name in used},
            "rows": list(rows),
        }
        if score is not None:
            table["score"] = {"num_problems": score, "batch_size": self.score_batch}
        if speed:
            table["speed"] = {
                "num_problems": self.speed_problems,
                "num_runs": 3,
                "batch_size": 1,
            }
        return table

    def done(self, name: str) -> Path:
        """Exists when the job of this name is done."""
        return self.output / "done" / name

    def folder(self, name: str, part: str) -> Path:
        """Where an evaluation's results go."""
        return self.output / ("grid" if part == "grid" else "measure") / name

    def grid_summary(self, name: str, method: str, index: int) -> Path:
        """What a setting of a method came to, in the grid of this name's problems."""
        folder = self.folder(f"grid-{name}-{method}", "grid")
        return folder / f"{method}-{index}" / "summary.json"

    def evaluation(
        self,
        name: str,
        part: str,
        build: Callable[[], Row],
        needs: tuple[Path, ...] = (),
        cores: int | None = None,
    ) -> Job:
        """The job that writes a recipe when its turn comes, and runs it.

        Args:
            name: Of the recipe.
            part: grid, score or speed; grids have a folder of their own.
            build: Makes the recipe, from what earlier jobs found.
            needs: Files that must be there.
            cores: Measure on so many cores of the processor.
        """
        path = self.output / "recipes" / f"{name}.toml"

        def prepare() -> tuple[str, ...]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(to_toml({**build(), "output": str(self.folder(name, part))}))
            return ()

        job = f"score-{name}" if part == "score" else name
        here = ("--device", "cpu") if cores else ()
        return Job(
            name=job,
            command=("d2f", "eval", str(path), *here, *self.eval_args),
            makes=self.done(job),
            needs=needs,
            prepare=prepare,
            cores=cores,
        )

    def report(self) -> Job:
        """The job that writes the report, anew each time."""
        made = self.done("report")
        made.unlink(missing_ok=True)
        command = ("benchmarks/paper_report.py", str(self.output / "measure"))
        return Job(name="report", command=command, makes=made)


def best(summaries: Iterable[tuple[Path, Row]], where: str, *, floor: float | None = None) -> Row:
    """The setting to measure with, and a note of how it was chosen.

    Args:
        summaries: The summary.json of each setting that was tried, and the setting.
        where: Which problems they were tried on.
        floor: A score that is enough, so that more is not paid for with speed; None: the best.
    """
    results = [(json.loads(path.read_text()), setting) for path, setting in summaries]
    top = max(result["score"]["score"] for result, _ in results)
    top = top if floor is None else min(top, floor)
    result, setting = max(
        (pair for pair in results if pair[0]["score"]["score"] >= top - ALLOWANCE),
        key=lambda pair: _swiftness(pair[0]),
    )
    chosen = {**setting.get("policy", {}), **setting.get("options", {})}
    where = f"{result['score']['num_problems']} {where}"
    return {**setting, "grid": {"where": where, "tried": len(results), "chosen": chosen}}


def _swiftness(result: Row) -> tuple[float, ...]:
    score, speed = result["score"], result.get("speed")
    if speed is not None:
        return (speed["tokens_per_second"]["median"],)
    return score["tokens_per_forward"], -score["query_tokens_per_forward"]


def without_speed(build: Callable[[], Row]) -> Row:
    """The recipe without what it says of speeds."""
    return {key: value for key, value in build().items() if key != "speed"}


def to_toml(table: Mapping[str, Any]) -> str:
    """A recipe's text: plain values first, then its tables."""
    lines = [f"{key} = {_value(v)}" for key, v in table.items() if key not in ("models", "rows")]
    lines = [line for line in lines if line]
    for name, model in table["models"].items():
        lines += ["", f"[models.{json.dumps(name)}]"]
        lines += [f"{key} = {_value(v)}" for key, v in model.items()]
    for row in table["rows"]:
        lines += ["", "[[rows]]"]
        lines += [f"{key} = {_value(v)}" for key, v in row.items()]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(f"{json.dumps(key)} = {_value(v)}" for key, v in value.items())
        return "{ " + inner + " }"
    return json.dumps(value)
