"""Evaluation recipes: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.unit.evaluation.eval_stand_ins import RECIPE, make_recipe

from d2f.errors import ConfigError
from d2f.evaluation.eval_recipe import EvalRecipe, load_eval_recipe, to_table
from d2f.evaluation.results import EXPERIMENTS
from d2f.recipe import from_table

RECIPES = sorted((Path(__file__).parents[3] / "recipes/eval").glob("**/*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse_and_survive_json(path):
    recipe = load_eval_recipe(path)
    table = json.loads(json.dumps(to_table(recipe)))
    assert from_table(EvalRecipe, table, "recipe.json") == recipe
    # Two recipes that write to one folder would take each other's rows for their own.
    assert recipe.output == f"runs/eval/{path.stem}"


def test_there_are_recipes_for_every_experiment():
    assert {load_eval_recipe(path).experiment for path in RECIPES} == set(EXPERIMENTS)


def test_defaults_and_overrides(tmp_path):
    recipe = make_recipe(tmp_path, "score.num_problems=3", "rows.vanilla.options.num_steps=9")
    assert (recipe.test_set, recipe.experiment, recipe.split) == ("letters", "methods", "test")
    row = recipe.rows[1]
    assert (row.name, row.method, row.label) == ("vanilla", "vanilla", "vanilla")
    assert row.options == {"num_steps": 9}
    assert recipe.num_examples == 3
    assert [r.name for r in recipe.selected(["vanilla"]).rows] == ["vanilla"]
    assert recipe.selected([]) == recipe


def test_the_number_of_problems_is_what_the_rows_need(tmp_path):
    recipe = make_recipe(tmp_path, "rows.vanilla.num_problems=20", "speed={num_problems=9}")
    assert recipe.num_examples == 20
    few = recipe.limited(5)
    assert few.num_examples == 5
    assert few.score_problems(few.rows[1]) == few.speed_problems(few.rows[0]) == 5
    assert few.limited(100).num_examples == 5
    everything = make_recipe(tmp_path, "score={}", "rows.vanilla.num_problems=2")
    assert everything.num_examples is None
    assert everything.limited(3).num_examples == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("family =", "famly =", "unknown key 'famly'; did you mean 'family'"),
        ('family = "tiny"', "", "'family' is missing"),
        ("batch_size = 3", "batch_size = 0", "score.batch_size is 0"),
        ("batch_size = 3", "batchsize = 3", r"\[score\].*did you mean 'batch_size'"),
        ("max_new_tokens = 12", "max_new_tokens = 'all'", 'a number or "gold"'),
        ("max_new_tokens = 12", "max_new_tokens = 2.5", "must be of type int or str"),
        ("max_new_tokens = 12", "max_new_tokens = true", "must be of type int or str"),
        ("[score]\nnum_problems = 7\nbatch_size = 3", "", "it measures nothing|measures nothing"),
        ("[models.base]\npath = ", "[models.base]\nfile = ", r"\[models.base\].*'file'"),
        ('model = "base"', 'model = "bass"', "row autoregressive: unknown model 'bass'.*'base'"),
        ('name = "vanilla"', 'name = "pipelined"', "two rows have the name 'pipelined'"),
        ('name = "vanilla"', 'name = "../vanilla"', r"\[rows 2\]: name is '../vanilla'"),
        ('name = "vanilla"', 'name = "mine"', "unknown method 'mine'"),
        ('strategy = "vanilla"', 'strategy = "vanila"', "did you mean 'vanilla'"),
        ("num_steps = 6", "steps = 6", "strategy vanilla: unknown option 'steps'"),
        ("block_size = 8", "block_size = 0", "block_size is 0"),
        ("block_size = 8", "blocksize = 8", "did you mean 'block_size'"),
        ("early_stop = false", "policy = {{block_size = 8}}", "block_size: without effect"),
        ("task =", 'experiment = "method"\ntask =', "did you mean 'methods'"),
        ("task =", "num_fewshot = -1\ntask =", "num_fewshot is -1"),
        ("early_stop = false", "temperature = -1.0", "temperature is -1"),
        ("early_stop = false", "temperature = nan", r"\[rows 2\]: temperature is nan"),
        ("early_stop = false", "speed_batch_size = 9999", "speed_batch_size is 9999.*at most 4096"),
        ("early_stop = false", "labels = {{a = [{{b = 2026-01-01}}]}}", "'labels.a.b' is the date"),
        ("batch_size = 3", "batch_size = 1000000000000", "score.batch_size is 1000000000000"),
        ('"{output}"', '" "', "output is empty"),
        ('name = "vanilla"', f"name = '{'v' * 101}'", "at most 100 letters"),
    ],
)
def test_wrong_recipes_are_refused_by_name(tmp_path, old, new, message):
    assert old in RECIPE
    with pytest.raises(ConfigError, match=message):
        make_recipe(tmp_path, text=RECIPE.replace(old, new))


def test_recipes_without_rows_and_unknown_rows(tmp_path):
    with pytest.raises(ConfigError, match="no \\[\\[rows\\]\\]"):
        make_recipe(tmp_path, "rows=[]")
    with pytest.raises(ConfigError, match="unknown row 'serial'"):
        make_recipe(tmp_path).selected(["serial"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rows.serial.seed=1", "'serial' is no table"),
        ("rows.seed=1", "'rows' is a list"),
        ("rows", "write it as key=value"),
        ("task.name=1", "'task' is no table"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        make_recipe(tmp_path, override)
