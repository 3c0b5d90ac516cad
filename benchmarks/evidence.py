"""Produce the evidence of a report: train the models to compare, choose settings, measure.

Everything is done by `d2f train`, `d2f eval` and `paper_report.py`, as a user would run them. The
recipes that this script writes stay in OUTPUT/recipes, so each number can be made again alone. What
is finished is skipped when the script runs again. With several GPUs, jobs run side by side, each on
a GPU of its own.

    python benchmarks/evidence.py --output results/evidence --gpus 1

Parts: `train` (students and control of the ablations, the models of the second family), `grid`
(settings of each method, on validation problems), `score` and `speed` (the tables, on test
problems), `report`. The first three run together. While speeds are measured, only other
measurements of speed run on the machine, each on a GPU of its own.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crew import Crew, Job
from tables import Row, Tables, best, without_speed

from d2f.training.checkpoint import list_checkpoints

PARTS = ("train", "grid", "score", "speed", "report")
SHIPPED = Path("src/d2f/shipped")
SCHEDULES = {
    "monotone": ("monotone", 0.3, 0.7),
    "random": ("random", 0.3, 0.7),
    "monotone-to-1": ("monotone", 0.3, 1.0),
}
"""Table 4: the paper's two, and one whose last blocks may be masked whole, as all blocks begin."""
SEEDS = (1, 2, 3)
NOISE_LEVELS = ((0.95, 0.9), (0.9, 0.9), (0.85, 0.9), (0.95, 0.98))
"""Activate and confidence thresholds of table 4: the paper's, and what suits the shipped student's
confidence."""
BATCHES = (1, 4, 16, 64, 256)
UNPAGED = ("fast-dllm-parallel", "fast-dllm-prefix", "fast-dllm-dual")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of problems and the models trained on them."""

    name: str
    task: str
    title: str
    teacher_recipe: str
    """Recipe of the teacher's last stage."""
    autoregressive: str
    teacher: str
    student: str

    def models(self) -> dict[str, Row]:
        """The models under the names that recipes use."""
        names = ("autoregressive", "teacher", "student")
        return {name: {"path": getattr(self, name)} for name in names}


class Plan:
    """The jobs of a run, which follow from its options."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tables = Tables(
            output=options.output,
            score_batch=options.score_batch,
            speed_problems=options.speed_problems,
            eval_args=options.eval_args,
        )
        runs = str(options.runs)
        families = (
            Family(
                name="words",
                task="word-problems",
                teacher_recipe="shipped_teacher_any_length",
                title="word problems, 5.8M",
                autoregressive="shipped:autoregressive",
                teacher="shipped:teacher",
                student="shipped:student",
            ),
            Family(
                name="functions",
                task="functions",
                teacher_recipe="functions_teacher",
                title="functions, 17M",
                autoregressive=f"{runs}/functions_autoregressive/final",
                teacher=f"{runs}/functions_teacher/final",
                student=f"{runs}/functions_student/final",
            ),
        )
        self.families = [family for family in families if family.name in options.families]

    # ------------------------------------------------------------------------------------ train

    def train(self) -> Iterator[Job]:
        """Return the trainings: second family, teachers of long sequences, students, control."""
        if "functions" in self.options.families:
            earlier: tuple[Path, ...] = ()
            for stage in ("autoregressive", "teacher", "student"):
                job = self._training(f"functions_{stage}", f"functions_{stage}", [], earlier)
                earlier = (job.makes,)
                yield job
        for family in self.families:
            yield self._long_teacher(family)
        if "words" not in self.options.families:
            return
        steps = [f"steps={self.options.steps}", f"model.init={SHIPPED / 'teacher'}"]
        yield self._training(
            "control",
            "shipped_teacher_any_length",
            [*steps, "batch_size=256", "seed=3", "data.seed=3"],
        )
        for (name, (kind, low, high)), seed in itertools.product(SCHEDULES.items(), SEEDS):
            noise = [f"noise.kind={kind}", f"noise.low={low}", f"noise.high={high}"]
            yield self._training(
                noise_run(name, seed), "shipped_student", [*steps, *noise, f"seed={seed}"]
            )

    def _long_teacher(self, family: Family) -> Job:
        """Return the training that teaches positions up to the paper's 512 and a few more."""
        init = family.teacher.replace("shipped:", f"{SHIPPED}/")
        settings = [
            *(f"model.init={init}", f"steps={self.options.long_steps}", "seed=9", "data.seed=9"),
            *("batch_size=128", "data.sequence_length=640", "data.num_problems=400000"),
            *("optimizer.lr=4e-4", "optimizer.warmup_steps=50"),
        ]
        weights = Path(init) / "model.safetensors"
        return self._training(
            f"{family.name}_teacher_long", family.teacher_recipe, settings, (weights,)
        )

    def _training(
        self, name: str, recipe: str, settings: Sequence[str], needs: tuple[Path, ...] = ()
    ) -> Job:
        folder = self.options.runs / name
        sets = [part for setting in settings for part in ("--set", setting)]
        return Job(
            name=f"train-{name}",
            command=(
                *("d2f", "train", f"recipes/{recipe}.toml", "--output", str(folder)),
                *(*sets, *self.options.train_args),
            ),
            makes=folder / "final" / "model.safetensors",
            needs=needs,
            prepare=lambda: ("--resume",) if list_checkpoints(folder) else (),
        )

    # ------------------------------------------------------------------------------------- grid

    def grid(self) -> Iterator[Job]:
        """Return one evaluation per family and method, on validation problems."""
        for family in self.families:
            for method, settings in grids().items():
                rows = [
                    self.tables.row(method, f"{method}-{index}", setting)
                    for index, setting in enumerate(settings)
                ]
                table = self._recipe(family, "methods", rows, score=self.options.grid_problems)
                table |= {"split": "validation", "seed": 7}
                if method == "dllm-cache":
                    # These settings answer one problem at a time with one token per step.
                    table["score"]["num_problems"] = min(256, self.options.grid_problems)
                paths = [Path(model["path"]) for model in table["models"].values()]
                weights = tuple(p / "model.safetensors" for p in paths if "shipped:" not in str(p))
                build = functools.partial(dict, table)
                yield self.tables.evaluation(f"grid-{family.name}-{method}", "grid", build, weights)

    def chosen(self, family: Family) -> dict[str, Row]:
        """Return each method's best setting by validation score, with a note of its grid."""
        return {
            method: best(
                [
                    (self.tables.grid_summary(family.name, method, i), setting)
                    for i, setting in enumerate(settings)
                ],
                "validation problems",
            )
            for method, settings in grids().items()
        }

    # ---------------------------------------------------------------------------------- measure

    def score(self) -> Iterator[Job]:
        """Return the evaluations that count answers."""
        for family in self.families:
            needs = self._grid_files(family)
            for name, build in self._tables(family).items():
                if not name.startswith("batch-"):
                    models = self._trained(family, name)
                    scores = functools.partial(without_speed, functools.partial(build, family))
                    yield self.tables.evaluation(
                        f"{family.name}-{name}", "score", scores, (*needs, *models)
                    )

    def speed(self) -> Iterator[Job]:
        """Return the evaluations that measure speed, after all scores."""
        for family in self.families:
            for name, build in self._tables(family).items():
                full = f"{family.name}-{name}"
                scored = self.tables.done(f"score-{full}")
                needs = () if name.startswith("batch-") else (scored,)
                yield self.tables.evaluation(full, "speed", functools.partial(build, family), needs)

    def _tables(self, family: Family) -> dict[str, Callable[[Family], Row]]:
        tables: dict[str, Callable[[Family], Row]] = {
            "methods": self._methods,
            "thresholds": self._thresholds,
            "steps": self._steps,
            "block-size": self._block_size,
        }
        tables |= {f"batch-{size}": functools.partial(self._batch, size=size) for size in BATCHES}
        if family.name == "words":
            tables |= {"control": self._control, "noise": self._noise}
        return tables

    def _trained(self, family: Family, table: str) -> tuple[Path, ...]:
        """Return the trained weights that a table needs beside the family's own."""
        runs = {
            "methods": [f"{family.name}_teacher_long"],
            "control": ["control"],
            "noise": [noise_run(name, seed) for name in SCHEDULES for seed in SEEDS],
        }
        names = runs.get(table, [])
        return tuple(self.options.runs / name / "final" / "model.safetensors" for name in names)

    def _methods(self, family: Family) -> Row:
        chosen = self.chosen(family)
        names = ("autoregressive", "vanilla", "vanilla-eos-stop", "vanilla-512", "dllm-cache")
        names += (*UNPAGED, "undistilled", "serial", "pipelined")
        rows = []
        for method in names:
            setting = chosen.get(method, chosen["vanilla"] if "vanilla" in method else {})
            row = self.tables.row(method, method, setting)
            if method == "vanilla-512":
                row |= {"max_new_tokens": 512, "num_problems": self.options.slow_problems}
                row |= {"model": "teacher-long", "label": "vanilla-512 (teacher of 640 positions)"}
            rows.append(row)
        table = self._recipe(family, "methods", rows, score=self.options.problems, speed=True)
        table["models"]["teacher-long"] = {"path": str(self._long_folder(family))}
        return table

    def _long_folder(self, family: Family) -> Path:
        return self.options.runs / f"{family.name}_teacher_long" / "final"

    def _thresholds(self, family: Family) -> Row:
        policy = self.chosen(family)["pipelined"]["policy"]
        levels = (0.99, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7)
        rows = []
        for level, add in itertools.product(levels, ("same", 0.7, 0.5, 0.1)):
            if level == add:
                continue  # "same" has it
            changed = {
                "confidence_threshold": level,
                "activate_threshold": level,
                "add_threshold": level if add == "same" else add,
            }
            setting = {"policy": {**policy, **changed}, "labels": changed}
            rows.append(self.tables.row("pipelined", f"{level}-add-{add}", setting))
        return self._recipe(family, "thresholds", rows, score=self.options.problems, speed=True)

    def _steps(self, family: Family) -> Row:
        vanilla = self.chosen(family)["vanilla"]
        limit = json.loads(self.tables.grid_summary(family.name, "vanilla", 0).read_text())[
            "max_new_tokens"
        ]
        rows = []
        for share in (1, 2, 4, 8):
            options = {**vanilla["options"], "num_steps": limit // share}
            setting = {
                "options": options,
                "max_new_tokens": limit,
                "labels": {"tokens_per_step": share},
            }
            rows.append(self.tables.row("vanilla-eos-stop", f"{share}-tokens-a-step", setting))
        return self._recipe(family, "steps", rows, score=self.options.problems, speed=True)

    def _block_size(self, family: Family) -> Row:
        policy = self.chosen(family)["pipelined"]["policy"]
        rows = []
        for size in (8, 16, 32, 48, 64, 96):
            setting = {"policy": {**policy, "block_size": size}, "labels": {"block_size": size}}
            rows.append(self.tables.row("pipelined", f"blocks-of-{size}", setting))
        return self._recipe(family, "block-size", rows, score=self.options.problems, speed=True)

    def _batch(self, family: Family, size: int) -> Row:
        chosen = self.chosen(family)
        rows = []
        for method in ("autoregressive", "serial", "pipelined"):
            setting = {**chosen.get(method, {}), "labels": {"batch_size": size}}
            rows.append(self.tables.row(method, f"{method}-at-{size}", setting))
        table = self._recipe(family, "batch", rows, speed=True)
        count = max(self.options.speed_problems, 2 * size)
        table["speed"] |= {"batch_size": size, "num_problems": count}
        return table

    def _control(self, family: Family) -> Row:
        chosen = self.chosen(family)
        changed = {"model": "control"}
        rows = [
            self.tables.row("vanilla", "teacher", chosen["vanilla"]),
            self.tables.row("control", "control", chosen["vanilla"]) | changed,
            self.tables.row("undistilled", "teacher-pipelined", chosen["pipelined"]),
            self.tables.row("control", "control-pipelined", chosen["pipelined"])
            | changed
            | {"strategy": "pipelined"},
            self.tables.row("pipelined", "student", chosen["pipelined"]),
        ]
        table = self._recipe(family, "control", rows, score=self.options.problems, speed=True)
        table["models"]["control"] = {"path": str(self.options.runs / "control" / "final")}
        return table

    def _noise(self, family: Family) -> Row:
        rows, models = [], {}
        for schedule, seed, level in itertools.product(SCHEDULES, SEEDS, NOISE_LEVELS):
            model = noise_run(schedule, seed)
            models[model] = {"path": str(self.options.runs / model / "final")}
            activate, confidence = level
            varied = {"activate_threshold": activate, "confidence_threshold": confidence}
            setting = {
                "policy": {"block_size": 32, "add_threshold": 0.1, **varied},
                "labels": {"schedule": schedule, "seed": seed, **varied},
                "model": model,
            }
            name = f"{model}-{activate}-{confidence}"
            rows.append(self.tables.row("pipelined", name, setting))
        table = self._recipe(family, "noise", rows, score=self.options.problems, speed=True)
        return table | {"models": models}

    # ---------------------------------------------------------------------------------- recipes

    def _recipe(
        self,
        family: Family,
        experiment: str,
        rows: Sequence[Row],
        *,
        score: int | None = None,
        speed: bool = False,
    ) -> Row:
        task = {
            "task": family.task,
            "family": family.title,
            "test_set": family.task,
            "experiment": experiment,
        }
        return self.tables.recipe(task, family.models(), rows, score=score, speed=speed)

    def _grid_files(self, family: Family) -> tuple[Path, ...]:
        return tuple(self.tables.done(f"grid-{family.name}-{method}") for method in grids())


URGENCY = (
    *("train-functions", "train-", "grid-", "score-functions-methods", "score-"),
    *("functions-methods", "words-methods", ""),
)
"""Beginnings of jobs' names, those that other jobs wait for first."""


def grids() -> dict[str, list[Row]]:
    """Return the settings of each method's grid."""
    lengths = (8, 16, 32, 64)
    policies = [
        {
            "block_size": size,
            "add_threshold": add,
            "activate_threshold": 0.95,
            "confidence_threshold": confidence,
        }
        for size, add, confidence in itertools.product(
            (16, 32, 64), (0.1, 0.5), (0.9, 0.95, 0.98, 0.99)
        )
    ]
    accelerated = [
        {"options": {"block_length": length, "threshold": threshold}}
        for length, threshold in itertools.product(lengths, (0.9, 0.95, 0.98))
    ]
    serial = [
        {"policy": {"block_size": size, "confidence_threshold": confidence}}
        for size, confidence in itertools.product((16, 32, 64), (0.9, 0.95, 0.98, 0.99))
    ]
    return {
        "vanilla": [{"options": {"block_length": length}} for length in lengths],
        "dllm-cache": [
            {
                "options": {
                    "block_length": 32,
                    "prompt_interval": 50,
                    "response_interval": interval,
                    "refresh_share": share,
                }
            }
            for interval, share in itertools.product((2, 4, 7), (0.25, 0.5))
        ],
        **dict.fromkeys(UNPAGED, accelerated),
        "undistilled": [{"policy": policy} for policy in policies],
        "serial": serial,
        "pipelined": [{"policy": policy} for policy in policies],
    }


def urgency(job: Job) -> int:
    """Return the rank of a job among those that could start."""
    return next(place for place, start in enumerate(URGENCY) if job.name.startswith(start))


def noise_run(schedule: str, seed: int) -> str:
    """Return the name of a student of table 4."""
    return f"noise_{schedule}_{seed}".replace("-", "_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/evidence"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where models are trained")
    parser.add_argument("--gpus", type=int, default=1, help="0: the CPU")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--families", nargs="*", default=["words", "functions"])
    parser.add_argument("--steps", type=int, default=2000, help="of each student of an ablation")
    parser.add_argument("--long-steps", type=int, default=1500, help="of the long teachers")
    parser.add_argument("--problems", type=int, default=1024, help="that a score counts")
    parser.add_argument("--slow-problems", type=int, default=1024, help="… of vanilla with 512")
    parser.add_argument("--grid-problems", type=int, default=1024)
    parser.add_argument("--speed-problems", type=int, default=100)
    parser.add_argument("--score-batch", type=int, default=512)
    parser.add_argument("--train-args", type=shlex.split, default=[], help="more for d2f train")
    parser.add_argument("--eval-args", type=shlex.split, default=[], help="more for d2f eval")
    options = parser.parse_args()
    plan = Plan(options)
    crew = Crew(options.gpus, options.output / "logs")
    for parts in (("train", "grid", "score"), ("speed",)):
        jobs = [job for part in parts if part in options.parts for job in getattr(plan, part)()]
        crew.run(sorted(jobs, key=urgency))
    if "report" in options.parts:
        crew.run([plan.tables.report()])
    if crew.failed:
        sys.exit(f"failed: {', '.join(crew.failed)}; see {crew.logs}")


if __name__ == "__main__":
    main()
