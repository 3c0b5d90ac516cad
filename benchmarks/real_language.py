"""Take a real language model the whole way, from a published checkpoint to the report.

SmolLM2-135M-Instruct is fine-tuned on a task, answers the problems that it was trained on, and
becomes a masked diffusion model and D2F students; then all methods are scored and timed side by
side. The script calls commands that a user could type; their recipes stay in OUTPUT/recipes and
their logs in OUTPUT/logs. Finished jobs are skipped when the script runs again, and interrupted
ones are resumed. With several GPUs, jobs run in parallel, each on a GPU of its own.

    python benchmarks/real_language.py --data DATA --output results/real --gpus 2

DATA holds the folders gsm8k/ and text2sql/ with the public files. Tasks: `gsm8k`; `advising` and
`wikisql`, questions to SQL; `chat`, a student that holds a conversation. Parts: `import` (the
checkpoint and the data), `train` (with the model's own answers), `grid` (settings of each method,
on problems kept aside), `score`, `speed` (one problem at a time), `cpu` (the same on two cores) and
`report`. `--time-share 0.5` halves the seconds of training; `--models` selects the models.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crew import ROOT, Crew, Job
from tables import Row, Tables, best, without_speed

from d2f.training.checkpoint import list_checkpoints

PARTS = ("import", "train", "grid", "score", "speed", "cpu", "report")
RECIPES = ROOT / "recipes" / "smollm2"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
FAST = ("fast-dllm-parallel", "fast-dllm-prefix", "fast-dllm-dual")
SLOW = ("vanilla", "vanilla-eos-stop", "dllm-cache", *FAST)
"""Methods that answer one problem at a time, most of them with one forward per token."""
MODELS = ("autoregressive", "teacher", "distilled", "student")
STUDENTS = ("serial", "pipelined", "distilled")
"""Methods for which the fastest setting with autoregression's score is chosen."""
QUICK = ("autoregressive", "serial", "pipelined")
GRID_PROBLEMS, CPU_PROBLEMS = 24, 12
"""Number of problems for the timings of a grid, and for those on two cores."""
ASKING = (60, ("steps=60", "batch_size=8"))
"""Most seconds and settings for training a model that writes questions. It makes about ten passes
over the data: a model that has memorised the questions writes no others."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task, with the settings in which its recipes differ from those of other tasks."""

    name: str
    """Name in `d2f eval`."""
    title: str
    prompts: str
    """Command of real_language_data.py that writes the task's rows."""
    answer: int
    """Most tokens of an answer."""
    seconds: tuple[int, int, int, int]
    """Seconds of training: autoregressive, teacher, distilled, student."""
    problems: int
    """Number of problems of the test split, all of which a score counts."""
    kept_aside: int
    """Number of problems on which settings are chosen."""
    longest: int
    """Tokens of the teacher's sequences, which any prompt with its answer must fit."""
    validation: str | None = None
    """Task with the problems kept aside; None: this one."""
    further: str | None = None
    """A further test set, which is scored and not timed."""
    train_embeddings: bool = True
    """Whether its diffusion models train the token embeddings: not where answers repeat names."""
    asks: bool = False
    """Whether a model writes further questions, since there are few; the twin answers them."""


TASKS = (
    Task(
        name="gsm8k",
        title="GSM8K, SmolLM2-135M",
        prompts="gsm8k",
        answer=256,
        seconds=(100, 240, 240, 420),
        problems=1319,
        kept_aside=500,
        longest=448,
        validation="gsm8k-variants",
        further="gsm8k-variants",
    ),
    Task(
        name="advising",
        title="Advising, SmolLM2-135M",
        prompts="sql",
        answer=448,
        seconds=(90, 180, 180, 420),
        problems=573,
        kept_aside=229,
        longest=512,
        train_embeddings=False,
        asks=True,
    ),
    Task(
        name="wikisql",
        title="WikiSQL, SmolLM2-135M",
        prompts="sql",
        answer=96,
        seconds=(90, 180, 180, 300),
        problems=15236,
        kept_aside=1000,
        longest=192,
        train_embeddings=False,
    ),
)
CHAT = {"adapter": ("chat", 480), "full": ("chat_full", 300)}
"""Student for chat -> its recipe and its seconds of training."""


class Plan:
    """The jobs of a run, which follow from its options."""

    def __init__(self, options: argparse.Namespace) -> None:
        # All commands run in the checkout.
        options.data = options.data.resolve()
        if Path(options.model).exists():
            options.model = str(Path(options.model).resolve())
        self.options = options
        self.output: Path = options.output.resolve()
        self.data = self.output / "data"
        self.tables = Tables(
            output=self.output,
            score_batch=options.score_batch,
            speed_problems=options.speed_problems,
            eval_args=("--dtype", "bfloat16", "--data", str(options.data), *options.eval_args),
        )
        self.tasks = [task for task in TASKS if task.name in options.tasks]
        self.models = [model for model in MODELS if model in options.models]

    # ----------------------------------------------------------------------------------- import

    @property
    def base(self) -> str:
        """The checkpoint that all models start from."""
        model: str = self.options.model
        return str(self.output / "base") if model.endswith(".gguf") else model

    def imports(self) -> Iterator[Job]:
        """Return the jobs that write the checkpoint as a folder and the rows to train on."""
        if self.base != self.options.model:
            yield Job(
                name="import",
                command=("d2f", "import", self.options.model, self.base, "--dtype", "bfloat16"),
                makes=self.tables.done("import"),
            )
        for prompts in dict.fromkeys(task.prompts for task in self.tasks):
            yield self._rows(prompts, "--data", str(self.options.data))

    @property
    def _imported(self) -> tuple[Path, ...]:
        return (self.tables.done("import"),) if self.base != self.options.model else ()

    # ------------------------------------------------------------------------------------ train

    def train(self) -> Iterator[Job]:
        """Return the trainings of each task, and the generation of answers for most of them."""
        for task in self.tasks:
            rows = self.data / f"{task.name}.train.jsonl"
            needs = (*self._imported, self._made(task.prompts))
            yield self._training(task, "autoregressive", self.base, rows, needs)
            twin = self._weights(task, "autoregressive")
            prompts, needs = rows, (twin,)
            if task.asks:
                prompts = self.data / f"{task.name}.prompts.jsonl"
                needs = (twin, prompts)
                yield from self._questions(task, prompts)
            limit = ("--max-new-tokens", str(task.answer))
            answer = self._answers(task.name, twin.parent, prompts, needs, *limit)
            name = f"own-{task.name}"
            own = self.data / f"{task.name}.own.jsonl"
            yield answer
            yield self._rows(
                "own", "--answers", str(self._file(task.name)), "--name", task.name,
                name=name, needs=(answer.makes,), makes=own,
            )  # fmt: skip
            teacher = self._weights(task, "teacher")
            for model, init in (("student", twin), ("teacher", twin), ("distilled", teacher)):
                if model in self.models:
                    yield self._training(task, model, str(init.parent), own, (own, init))
        if "chat" in self.options.tasks:
            yield from self._chat()

    def _questions(self, task: Task, prompts: Path) -> Iterator[Job]:
        """Return the jobs that train a model to ask, sample its questions and collect prompts."""
        rows = self.data / f"{task.name}.questions.jsonl"
        needs = (*self._imported, self._made(task.prompts))
        writer = self._training(task, "autoregressive", self.base, rows, needs, to="asking")
        sampling = ("--n", str(self.options.questions), "--temperature", "1")
        asked = self._answers(
            f"{task.name}.asked", writer.makes.parent, self.data / f"{task.name}.ask.jsonl",
            (writer.makes,), *sampling, "--max-new-tokens", "96",
        )  # fmt: skip
        yield writer
        yield asked
        yield self._rows(
            "sql-questions", "--asked", str(self._file(f"{task.name}.asked")),
            "--data", str(self.options.data), needs=(asked.makes,), makes=prompts,
        )  # fmt: skip

    def _chat(self) -> Iterator[Job]:
        """Return the jobs for chat: the model's own turns and answers, and students of them."""
        free = ("--no-chat", "--temperature", "1", "--top-p", "0.95", "--max-new-tokens", "128")
        limit = ("--max-new-tokens", "640")
        base, data, done = Path(self.base), self.data, self.tables.done
        opening = self._rows("chat-prompts", "--model", self.base, needs=self._imported)
        turns = self._answers(
            "turns", base, data / "turn_prompts.jsonl", (opening.makes,),
            *free, "--n", str(self.options.turns),
        )  # fmt: skip
        fit = self._rows("chat-filter", "--turns", str(self._file("turns")), needs=(turns.makes,))
        first = self._answers("chat", base, data / "chat.train.jsonl", (fit.makes,), *limit)
        after = self._rows(
            "chat-next", "--model", self.base, "--answers", str(self._file("chat")),
            "--most", str(self.options.turns // 5), needs=(first.makes,),
        )  # fmt: skip
        asked = self._answers("next", base, data / "next_prompts.jsonl", (after.makes,), *free)
        fit_next = self._rows(
            "chat-next-filter", "--turns", str(self._file("next")), needs=(asked.makes,)
        )
        second = self._answers(
            "chat.next", base, data / "chat.next.jsonl", (fit_next.makes,), *limit
        )
        own = self._rows(
            "own", "--answers", str(self._file("chat")), str(self._file("chat.next")),
            *("--name", "chat", "--no-circles"), name="own-chat",
            needs=(second.makes,), makes=data / "chat.own.jsonl",
        )  # fmt: skip
        held_out = data / "chat.held_out.jsonl"
        told = self._answers("held_out.base", base, held_out, (fit.makes,), *limit)
        yield from (opening, turns, fit, first, after, asked, fit_next, second, own, told)
        answered = [told.makes]
        for student, (recipe, seconds) in CHAT.items():
            folder = self.output / "models" / "chat" / student
            final = folder / "final"
            adapter = student == "adapter"
            made = self._run(
                recipe, folder, self.base, data / "chat.own.jsonl", seconds, (own.makes,),
                makes=final / ("d2f_adapter.json" if adapter else "model.safetensors"),
                name=f"train-chat-{student}",
            )  # fmt: skip
            model = (base, "--adapter", str(final)) if adapter else (final,)
            tell = self._answers(
                f"held_out.{student}", model[0], held_out, (made.makes,), *model[1:], *limit
            )
            answered.append(tell.makes)
            yield made
            yield tell
        yield Job(
            name="perplexity-chat",
            command=(
                *("benchmarks/perplexity.py", "--model", self.base, "--json"),
                *(str(self.output / "chat_perplexity.json"), "--answers"),
                *(str(self._file(f"held_out.{name}")) for name in ("base", *CHAT)),
            ),
            makes=done("perplexity-chat"),
            needs=tuple(answered),
        )

    def _file(self, name: str) -> Path:
        return self.output / "answers" / f"{name}.jsonl"

    def _answers(
        self, name: str, model: Path, prompts: Path, needs: tuple[Path, ...], *more: str
    ) -> Job:
        file = self._file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        return Job(
            name=f"answer-{name}",
            command=(
                *("d2f", "generate", "--model", str(model), "--dtype", "bfloat16"),
                *("--input", str(prompts), "--output", str(file), *more),
                *self.options.generate_args,
            ),
            makes=self.tables.done(f"answer-{name}"),
            needs=needs,
        )

    def _rows(
        self,
        command: str,
        *more: str,
        name: str | None = None,
        needs: tuple[Path, ...] = (),
        makes: Path | None = None,
    ) -> Job:
        return Job(
            name=name or f"rows-{command}",
            command=(
                *("benchmarks/real_language_data.py", command, *more),
                *("--output", str(self.data)),
            ),
            makes=makes or self._made(command),
            needs=needs,
        )

    def _made(self, command: str) -> Path:
        """Return the file that exists once a command of real_language_data.py is done."""
        return self.tables.done(f"rows-{command}")

    def _weights(self, task: Task, model: str) -> Path:
        folder = self.output / "models" / task.name / model
        return folder / "final" / "model.safetensors"

    def _training(
        self,
        task: Task,
        model: str,
        init: str,
        rows: Path,
        needs: tuple[Path, ...],
        to: str | None = None,
    ) -> Job:
        weights = self._weights(task, to or model)
        seconds, more = task.seconds[MODELS.index(model)], ()
        if to == "asking":
            seconds, more = ASKING
        elif model == "teacher":
            more = (f"data.sequence_length={task.longest}",)
        if model != "autoregressive" and not task.train_embeddings:
            more += ("model.train_embeddings=false",)
        return self._run(
            model, weights.parents[1], init, rows, seconds, needs, makes=weights,
            name=f"train-{task.name}-{to or model}",
            more=more,
        )  # fmt: skip

    def _run(
        self,
        recipe: str,
        folder: Path,
        init: str,
        rows: Path,
        seconds: float,
        needs: tuple[Path, ...],
        *,
        makes: Path,
        name: str,
        more: tuple[str, ...] = (),
    ) -> Job:
        settings = (
            f"model.init={init}",
            f'data.paths=["{rows}"]',
            f"max_seconds={max(seconds * self.options.time_share, 1):g}",
            *more,
        )
        sets = [part for setting in settings for part in ("--set", setting)]
        return Job(
            name=name,
            command=(
                *("d2f", "train", str(RECIPES / f"{recipe}.toml"), "--output", str(folder)),
                *(*sets, *self.options.train_args),
            ),
            makes=makes,
            needs=needs,
            prepare=lambda: ("--resume",) if list_checkpoints(folder) else (),
        )

    # ------------------------------------------------------------------------------------- grid

    def _grids(self) -> dict[str, list[Row]]:
        """Return the grids of the methods whose models are selected."""
        wanted = {method: self._row(method, method, {})["model"] for method in grids()}
        return {m: settings for m, settings in grids().items() if wanted[m] in self.models}

    def grid(self) -> Iterator[Job]:
        """Return one evaluation per task and method, on problems kept aside."""
        for task in self.tasks:
            for method, settings in self._grids().items():
                rows = [
                    self._row(method, f"{method}-{index}", setting)
                    for index, setting in enumerate(settings)
                ]
                timed = {"num_problems": self._few(GRID_PROBLEMS), "num_runs": 1, "batch_size": 1}
                build = functools.partial(
                    self._recipe, task, rows, task.validation,
                    score=self._count(task.kept_aside, method), split="validation",
                    **({"speed": timed} if method in STUDENTS else {}),
                )  # fmt: skip
                needs = tuple({self._weights(task, row["model"]) for row in rows})
                yield self.tables.evaluation(f"grid-{task.name}-{method}", "grid", build, needs)

    def _count(self, count: int, method: str) -> int:
        most = self.options.slow_problems if method in SLOW else self.options.problems
        return min(count, most or count)

    def chosen(self, task: Task) -> dict[str, Row]:
        """Return each method's setting; of students the fastest that scores as the twin does."""
        floor = None
        if "autoregressive" in self.models:
            twin = self.tables.grid_summary(task.name, "autoregressive", 0)
            floor = json.loads(twin.read_text())["score"]["score"]
        return {
            method: best(
                [
                    (self.tables.grid_summary(task.name, method, i), s)
                    for i, s in enumerate(settings)
                ],
                "problems kept aside",
                floor=floor if method in STUDENTS else None,
            )
            for method, settings in self._grids().items()
        }

    def _gridded(self, task: Task) -> tuple[Path, ...]:
        """Return the files that exist once the settings of a task's methods can be chosen."""
        return tuple(self.tables.done(f"grid-{task.name}-{m}") for m in self._grids())

    # ---------------------------------------------------------------------------------- measure

    def score(self) -> Iterator[Job]:
        """Return the evaluations on the test split, and of quick methods on a further test set."""
        for task in self.tasks:
            needs = self._gridded(task)
            scores = functools.partial(without_speed, functools.partial(self._methods, task))
            yield self.tables.evaluation(task.name, "score", scores, needs)
            if task.further is not None:
                further = functools.partial(self._further, task, task.further)
                yield self.tables.evaluation(task.further, "score", further, needs)

    def speed(self) -> Iterator[Job]:
        """Return the evaluations that measure speed, after all scores."""
        for task in self.tasks:
            needs = (self.tables.done(f"score-{task.name}"), *self._gridded(task))
            build = functools.partial(self._methods, task)
            yield self.tables.evaluation(task.name, "speed", build, needs)

    def cpu(self) -> Iterator[Job]:
        """Return the measurements of quick methods on two CPU cores, as of a laptop."""
        for task in self.tasks:
            needs = (self.tables.done(f"score-{task.name}"), *self._gridded(task))
            build = functools.partial(self._on_cores, task)
            yield self.tables.evaluation(f"{task.name}-cpu", "speed", build, needs, cores=2)

    def _on_cores(self, task: Task) -> Row:
        rows = [row for row in self._methods(task)["rows"] if row["method"] in QUICK]
        title = f"{task.title}, two CPU cores"
        speed = {"num_problems": self._few(CPU_PROBLEMS), "num_runs": 2, "batch_size": 1}
        return self._recipe(task, rows, score=None, family=title, speed=speed)

    def _methods(self, task: Task) -> Row:
        chosen = self.chosen(task)
        if "vanilla" in chosen:
            chosen["vanilla-eos-stop"] = chosen["vanilla"]
        rows = []
        for method, setting in chosen.items():
            row = self._row(method, method, setting)
            row["num_problems"] = self._count(task.problems, method)
            if method in SLOW:
                row["speed_problems"] = self._few(max(self.options.slow_problems // 8, 2))
            rows.append(row)
        speed = {"num_problems": self._few(), "num_runs": 3, "batch_size": 1}
        return self._recipe(task, rows, score=task.problems, speed=speed)

    def _few(self, count: int | None = None) -> int:
        most: int = self.options.speed_problems
        return most if count is None else min(count, most)

    def _further(self, task: Task, name: str) -> Row:
        rows = [row for row in self._methods(task)["rows"] if row["method"] not in SLOW]
        return self._recipe(task, rows, name, score=1000)

    # ---------------------------------------------------------------------------------- recipes

    def _row(self, method: str, name: str, setting: Row) -> Row:
        if method == "distilled":
            row = self.tables.row("pipelined", name, setting)
            return row | {"model": "distilled", "label": "pipelined, distilled from the teacher"}
        return self.tables.row(method, name, setting)

    def _recipe(
        self,
        task: Task,
        rows: list[Row],
        name: str | None = None,
        *,
        score: int | None,
        **more: object,
    ) -> Row:
        models = {model: {"path": str(self._weights(task, model).parent)} for model in MODELS}
        name = name or task.name
        top = {"task": name, "family": task.title, "test_set": name, "experiment": "methods"}
        if name == "gsm8k":
            top["num_fewshot"] = 0
        if name == "gsm8k-variants":
            top["seed"] = 0  # that of the rows that were trained on
        return self.tables.recipe({**top, **more}, models, rows, score=score)


def grids() -> dict[str, list[Row]]:
    """Return the settings of each method's grid."""
    levels = (0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
    pipelined = [
        {
            "policy": {
                "block_size": size,
                "add_threshold": add,
                "activate_threshold": 0.95,
                "confidence_threshold": level,
            }
        }
        for size, add, level in itertools.product((8, 16), (0.1, 0.5), levels)
    ]
    serial = [{"policy": {"block_size": 16, "confidence_threshold": level}} for level in levels]
    accelerated = [
        {"options": {"block_length": 32, "threshold": threshold}} for threshold in (0.8, 0.9, 0.95)
    ]
    # As Dream's and LLaDA's users run them: neither has a setting that trades score for speed.
    dllm_cache = {"prompt_interval": 50, "response_interval": 4, "refresh_share": 0.25}
    return {
        "autoregressive": [{}],
        "vanilla": [{"options": {"block_length": 32}}],
        "dllm-cache": [{"options": {"block_length": 32, **dllm_cache}}],
        **dict.fromkeys(FAST, accelerated),
        "undistilled": [row for row in pipelined if row["policy"]["block_size"] == 16],
        "distilled": [row for row in pipelined if row["policy"]["block_size"] == 16],
        "serial": serial,
        "pipelined": pipelined,
    }


URGENCY = (
    *("import", "rows-", "train-gsm8k-autoregressive", "train-advising-asking"),
    *("answer-", "own-", "train-gsm8k-student", "train-advising", "train-", "grid-", ""),
)
"""Beginnings of jobs' names, those that other jobs wait for first."""


def urgency(job: Job) -> int:
    """Return the rank of a job among those that could start."""
    return next(place for place, start in enumerate(URGENCY) if job.name.startswith(start))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*(task.name for task in TASKS), "chat"]
    parser.add_argument("--output", type=Path, default=Path("results/real"))
    parser.add_argument("--data", type=Path, required=True, help="folder of the public files")
    parser.add_argument("--model", default=HUB, help="hub id, folder or .gguf file")
    parser.add_argument("--gpus", type=int, default=1, help="0: the CPU")
    parser.add_argument("--tasks", nargs="*", default=names, choices=names)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--questions", type=int, default=20000, help="that a model asks (advising)")
    parser.add_argument("--turns", type=int, default=48000, help="of users, that it writes (chat)")
    parser.add_argument("--time-share", type=float, default=1.0, help="of the seconds of training")
    parser.add_argument("--problems", type=int, help="that a score counts; default: all")
    parser.add_argument("--slow-problems", type=int, default=128, help="… of slow methods")
    parser.add_argument("--speed-problems", type=int, default=100, help="that a speed counts")
    parser.add_argument("--score-batch", type=int, default=128)
    parser.add_argument("--generate-args", type=shlex.split, default=[])
    parser.add_argument("--train-args", type=shlex.split, default=[], help="more for d2f train")
    parser.add_argument("--eval-args", type=shlex.split, default=[], help="more for d2f eval")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    plan = Plan(options)
    crew = Crew(options.gpus, plan.output / "logs")
    parts = {"import": plan.imports, "train": plan.train, "grid": plan.grid, "score": plan.score}
    jobs = [job for part, make in parts.items() if part in options.parts for job in make()]
    crew.run(sorted(jobs, key=urgency))
    if "speed" in options.parts:
        crew.run(list(plan.speed()))
    if "cpu" in options.parts:
        one_by_one = Crew(0, plan.output / "logs")
        one_by_one.run(list(plan.cpu()))
        crew.failed += one_by_one.failed
    if "report" in options.parts:
        crew.run([plan.tables.report()])
    if crew.failed:
        sys.exit(f"failed: {', '.join(crew.failed)}; see {crew.logs}")


if __name__ == "__main__":
    main()
