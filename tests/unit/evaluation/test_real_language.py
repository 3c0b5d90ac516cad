"""`benchmarks/real_language.py`: its jobs fit together, and its recipes are read."""

from __future__ import annotations

import json
import signal
import sys
import tomllib
from pathlib import Path

import pytest

from d2f.evaluation.eval_recipe import load_eval_recipe

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SCRIPTS = ("real_language", "tables", "crew")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import real_language

    yield real_language
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.fixture
def plan(script, tmp_path):
    def make(*arguments):
        options = script.parse(["--data", "data", "--output", str(tmp_path), *arguments])
        return script.Plan(options)

    return make


PARTS = ("imports", "train", "grid", "score", "speed", "cpu")


def jobs_of(plan):
    return [job for part in PARTS for job in getattr(plan, part)()]


@pytest.mark.parametrize("model", ["model.gguf", "owner/name"])
@pytest.mark.parametrize("models", [[], ["--models", "autoregressive", "student"]])
def test_what_a_job_needs_is_made_by_one_before_it(plan, model, models):
    made = set()
    jobs = jobs_of(plan("--model", model, *models))
    for job in jobs:
        assert set(job.needs) <= made, job.name
        made.add(job.makes)
    assert len({job.name for job in jobs}) == len(made) == len(jobs)


def test_a_crew_that_is_stopped_leaves_nothing_running(script, tmp_path, monkeypatch):
    crew = script.Crew(0, tmp_path)
    started = []

    def stop(_):
        started.extend(crew.running)
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", stop)
    command = ("-c", "import time; time.sleep(60)")
    with pytest.raises(SystemExit, match="go on with the same command"):
        crew.run([script.Job(name="long", command=command, makes=tmp_path / "made")])
    [(_, _, process, _)] = started
    assert process.returncode == -signal.SIGTERM
    assert not (tmp_path / "made").exists()


def test_commands_name_files_that_are_there(plan):
    for job in jobs_of(plan("--model", "model.gguf")):
        program = job.command[0]
        assert program == "d2f" or (BENCHMARKS.parent / program).exists()
        if job.command[:2] == ("d2f", "train"):
            assert Path(job.command[2]).exists()


def test_students_of_sql_keep_their_embeddings(plan):
    kept = {
        job.name
        for job in plan("--model", "owner/name").train()
        if "model.train_embeddings=false" in job.command
    }
    students = ("teacher", "distilled", "student")
    assert kept == {f"train-{task}-{name}" for task in ("advising", "wikisql") for name in students}


def pretend_grids(plan, scores, speeds=()):
    """Summaries as `d2f eval` would have written them: a score, a speed for each confidence."""
    for job in plan.grid():
        job.prepare()
        recipe = tomllib.loads(Path(job.command[2]).read_text())
        for row in recipe["rows"]:
            level = row.get("policy", {}).get("confidence_threshold", 1.0)
            score = {
                "score": scores.get(level, 0.1),
                "tokens_per_forward": 3 - 2 * level,
                "query_tokens_per_forward": 1.0,
                "num_problems": 500,
            }
            folder = Path(recipe["output"]) / row["name"]
            folder.mkdir(parents=True, exist_ok=True)
            speed = {"tokens_per_second": {"median": dict(speeds).get(level)}} if speeds else None
            (folder / "summary.json").write_text(json.dumps({"score": score, "speed": speed}))


def test_a_student_is_as_fast_as_its_twins_score_allows(plan):
    ours = plan("--tasks", "gsm8k")
    pretend_grids(ours, {1.0: 0.09, 0.7: 0.05, 0.8: 0.086, 0.9: 0.09, 0.95: 0.12})
    chosen = ours.chosen(ours.tasks[0])
    assert chosen["pipelined"]["policy"]["confidence_threshold"] == 0.8
    assert chosen["undistilled"]["policy"]["confidence_threshold"] == 0.95
    speeds = {0.7: 900, 0.8: 800, 0.85: 500, 0.9: 850, 0.95: 700, 0.99: 100, 1.0: 100}
    pretend_grids(ours, {1.0: 0.09, 0.7: 0.05, 0.8: 0.086, 0.9: 0.09, 0.95: 0.12}, speeds)
    chosen = ours.chosen(ours.tasks[0])
    assert chosen["pipelined"]["policy"]["confidence_threshold"] == 0.9


def test_recipes_are_read_as_recipes(plan, script):
    ours = plan("--tasks", "gsm8k", "advising", "wikisql")
    pretend_grids(ours, {})
    for job in (*ours.grid(), *ours.score(), *ours.speed(), *ours.cpu()):
        job.prepare()
        recipe = load_eval_recipe(Path(job.command[2]))
        assert len({row.name for row in recipe.rows}) == len(recipe.rows)
    recipe = load_eval_recipe(ours.output / "recipes" / "gsm8k.toml")
    assert recipe.num_fewshot == 0
    assert {row.name for row in recipe.rows} == {*script.grids(), "vanilla-eos-stop"}
