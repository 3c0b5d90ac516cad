"""`d2f eval` from end to end on tiny models."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
from tests.unit.evaluation.eval_stand_ins import RECIPE, SPEED, Letters

from d2f.evaluation import eval_progress
from d2f.testing import write_adapter, write_checkpoint

ASKED = []


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe with models on the disk and a task that notes what it is asked for."""

    def load_task(name, **settings):
        ASKED.append((name, settings))
        return Letters(settings["num_examples"])

    module = ModuleType("d2f.evaluation.tasks")
    module.load_task, module.CODE_TASKS = load_task, ()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, kind in (("student", "llada"), ("base", "qwen2")):
        write_checkpoint(tmp_path / name, kind, seed=3, tokenizer=True)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "letters.toml"
    file.write_text(RECIPE.format(output="out"), encoding="utf-8")
    return file


@pytest.fixture
def evaluate(d2f, recipe):
    def run(*arguments):
        return d2f("eval", recipe, "--device", "cpu", "--dtype", "float32", *arguments)

    return run


def test_a_table_goes_to_stdout_and_progress_to_stderr(evaluate, recipe):
    recipe.write_text(recipe.read_text() + SPEED, encoding="utf-8")
    done = evaluate()
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    for name in ("pipelined", "vanilla", "autoregressive"):
        [line] = [line for line in lines if line.startswith(name)]
        assert " ±" in line
        assert line.split()[1] == "7"
    assert all(len(line) <= 80 for line in lines)
    assert "letters, tiny" in done.out
    assert "medians of 2 rounds" in done.out
    assert "pipelined  7/7  score" in done.err
    assert "tokens/forward" in done.err
    assert "pipelined speed  2/2" in done.err
    again = evaluate()
    assert again.out == done.out


def test_json_has_the_summaries(evaluate, recipe):
    done = evaluate("--json", "--rows", "autoregressive,pipelined", "--num-problems", 2)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["output"] == "out"
    assert [row["row"] for row in report["rows"]] == ["pipelined", "autoregressive"]
    for row in report["rows"]:
        file = recipe.parent / "out" / row["row"] / "summary.json"
        assert json.loads(file.read_text()) == row
        assert row["score"]["num_problems"] == 2
        assert row["recipe_file"] == "letters.toml"
        assert len(row["model"]["sha256"]) == 64
        assert row["environment"]["dtype"] == "float32"
    assert {row["model"]["sha256"] for row in report["rows"]} != {
        report["rows"][0]["model"]["sha256"]
    }


def test_a_summary_says_what_to_type_and_what_programs_ran_in(d2f, recipe, monkeypatch):
    monkeypatch.setattr(sys.modules["d2f.evaluation.tasks"], "CODE_TASKS", ("letters",))
    (recipe.parent / "sub").mkdir()
    recipe.rename(recipe.parent / "sub" / recipe.name)
    done = d2f(
        "eval", "sub/letters.toml", "--device", "cpu", "--dtype", "float32", "--json",
        "--rows", "pipelined", "--num-problems", 1,
    )  # fmt: skip
    assert done.code == 0, done.err
    [row] = json.loads(done.out)["rows"]
    assert row["recipe_file"] == "sub/letters.toml"
    assert row["environment"]["sandbox"] in ("seccomp", "audit")


def test_the_task_is_asked_for_what_the_options_say(evaluate):
    done = evaluate(
        "--data", "files", "--offline", "--num-problems", 3, "--output", "elsewhere",
        "--set", "num_fewshot=2", "--set", "seed=9", "--set", "rows.pipelined.max_new_tokens=8",
        "--rows", "pipelined", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert ASKED[-1] == (
        "letters",
        {
            "num_examples": 3, "seed": 9, "split": "test", "data": "files", "offline": True,
            "num_fewshot": 2, "clean_up": "ours",
        },
    )  # fmt: skip
    report = json.loads(done.out)
    assert report["output"] == "elsewhere"
    assert report["rows"][0]["max_new_tokens"] == 8


def test_an_adapter_is_loaded_and_hashed(evaluate, recipe):
    folder = write_adapter(recipe.parent / "adapter", "llada")
    plain = json.loads(evaluate("--json", "--rows", "pipelined").out)["rows"][0]
    done = evaluate(
        "--json", "--rows", "pipelined", "--set", f"models.student.adapter={folder}",
        "--output", "adapted",
    )  # fmt: skip
    assert done.code == 0, done.err
    adapted = json.loads(done.out)["rows"][0]
    assert adapted["model"]["adapter"] == str(folder)
    assert adapted["model"]["sha256"] != plain["model"]["sha256"]
    # Other weights do not go on with the results of these.
    done = evaluate("--rows", "pipelined", "--set", f"models.student.adapter={folder}")
    assert done.code == 1
    assert "model was" in done.err
    assert "--fresh" in done.err
    assert (
        evaluate("--rows", "pipelined", "--set", f"models.student.adapter={folder}", "--fresh").code
        == 0
    )


def test_an_interrupt_ends_with_a_line_and_the_next_run_goes_on(evaluate, recipe, monkeypatch):
    real = eval_progress.Terminal.progress

    def progress(self, row, done, total, text):
        real(self, row, done, total, text)
        if row == "vanilla" and done >= 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(eval_progress.Terminal, "progress", progress)
    done = evaluate()
    assert done.code == 130
    assert done.err.splitlines()[-1] == (
        "stopped; all answers so far are in out; go on with the same command"
    )
    monkeypatch.undo()
    kept = (recipe.parent / "out/vanilla/problems.jsonl").read_text().splitlines()
    assert len(kept) >= 3


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--rows", "pipelind"), 2, "unknown row 'pipelind'; did you mean 'pipelined'"),
        (("--num-problems", 0), 2, "--num-problems"),
        (("--set", "rows.vanilla.options.steps=3"), 2, "unknown option 'steps'"),
        (("--set", "score.num_problem=3"), 2, "did you mean 'num_problems'"),
        (("--set", "models.student.path=no/such/folder"), 1, "no folder 'no/such/folder'"),
        (("--set", "models.student.path=shipped:studnet"), 1, "did you mean 'student'"),
        (("--set", "models.student.chat_template=true"), 1, "has no chat template"),
        (("--device", "no-such"), 2, "device 'no-such' cannot be used"),
        (("--backend", "no-such"), 2, "unknown backend 'no-such'"),
    ],
)
def test_bad_input_is_one_clear_line(evaluate, arguments, code, words):
    done = evaluate(*arguments)
    assert done.code == code
    assert words in done.err
    if "Usage:" not in done.err:  # typer's own words
        assert len([line for line in done.err.splitlines() if "error" in line]) == 1
        assert "Traceback" not in done.err


def test_a_recipe_that_is_not_there_or_none(d2f, tmp_path):
    assert "cannot read recipe" in d2f("eval", tmp_path / "none.toml").err
    (tmp_path / "bad.toml").write_text("task = ")
    done = d2f("eval", tmp_path / "bad.toml")
    assert (done.code, "not valid TOML" in done.err) == (1, True)


def test_failed_problems_are_told(evaluate, monkeypatch):
    done = evaluate("--rows", "pipelined", "--set", "max_new_tokens=500")
    assert done.code == 0, done.err
    assert "7 problems failed and count as wrong" in done.out
    assert "0.0% ±0.0" in done.out


def test_the_shipped_student_solves_word_problems(d2f, tmp_path):
    done = d2f(
        "eval", "recipes/eval/word_problems.toml", "--rows", "pipelined", "--num-problems", 6,
        "--output", tmp_path, "--set", "speed.num_runs=1", "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    [row] = json.loads(done.out)["rows"]
    assert row["score"]["num_correct"] >= 5
    assert row["score"]["tokens_per_forward"] > 5
    assert row["speed"]["num_problems"] == 6
    assert row["model"]["name"] == "shipped student"
