"""Write recipes of `d2f eval` for a benchmark, and the jobs that run them."""

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
"""A setting qualifies if it scores at most half a point below its method's best. Of these settings
the fastest is taken; if the grid measured no times, the one of most tokens per forward, and of
equal ones the one that computes least."""


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The folders of recipes and results, and the settings that all recipes share."""

    output: Path
    score_batch: int
    """Number of problems that are answered together for a score."""
    speed_problems: int
    """Number of problems that are answered one by one for a speed."""
    eval_args: Sequence[str] = ()
    """Further arguments of `d2f eval`."""

    def row(self, method: str, name: str, setting: Row) -> Row:
        """Return the row of one method with one setting."""
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
        """Return a recipe as a table.

        Args:
            task: The top level of the recipe.
            models: The models by the names that rows use.
            rows: Rows made by `row`.
            score: Number of problems for a score; None: no scores.
            speed: Whether to measure speeds.
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
        """Return the file that exists once the job with a name is done."""
        return self.output / "done" / name

    def folder(self, name: str, part: str) -> Path:
        """Return the folder of an evaluation's results."""
        return self.output / ("grid" if part == "grid" else "measure") / name

    def grid_summary(self, name: str, method: str, index: int) -> Path:
        """Return the summary of a method's setting in a grid."""
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
        """Return the job that writes a recipe and then runs it.

        Args:
            name: The name of the recipe.
            part: grid, score or speed; grids have a folder of their own.
            build: Makes the recipe when the job starts, from the results of earlier jobs.
            needs: Files that must exist before the job starts.
            cores: Number of CPU cores to measure on; None: a GPU.
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
        """Return the job that writes the report; it runs every time."""
        made = self.done("report")
        made.unlink(missing_ok=True)
        command = ("benchmarks/paper_report.py", str(self.output / "measure"))
        return Job(name="report", command=command, makes=made)


def best(summaries: Iterable[tuple[Path, Row]], where: str, *, floor: float | None = None) -> Row:
    """Return the setting to measure with, and a note of how it was chosen.

    Args:
        summaries: The summary.json of each tried setting, and the setting.
        where: The problems on which the settings were tried, as the note names them.
        floor: A score that is enough; faster settings above it win over better ones. None: the
            best score less `ALLOWANCE` is needed.
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
    """Return the recipe without its settings for speeds."""
    return {key: value for key, value in build().items() if key != "speed"}


def to_toml(table: Mapping[str, Any]) -> str:
    """Return a recipe's text: plain values first, then its tables."""
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
