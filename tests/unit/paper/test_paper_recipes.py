"""The recipes of the 8B models against the settings of the paper and of its authors' scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.paper.published import load_paper

from d2f.evaluation.eval_recipe import load_eval_recipe

FOLDER = Path(__file__).parents[3] / "recipes/eval"
RECIPES = {path.stem: load_eval_recipe(path) for path in sorted(FOLDER.glob("*.toml"))}
PAPER = {name: r for name, r in RECIPES.items() if name.startswith(("dream_", "llada_"))}
METHODS = {name: recipe for name, recipe in PAPER.items() if recipe.experiment == "methods"}
FIXED = ("vanilla", "control", "dllm-cache", "fast-dllm-prefix", "fast-dllm-dual")
FEWSHOT = {
    "GSM8K-4-shot": 4, "GSM8K-CoT-8-shot": 8, "MBPP-3-shot": 3, "HumanEval-0-shot": 0,
    "Math-4-shot": 4,
}  # fmt: skip
TASKS = {
    "GSM8K-4-shot": "gsm8k", "GSM8K-CoT-8-shot": "gsm8k_cot", "MBPP-3-shot": "mbpp",
    "HumanEval-0-shot": "humaneval", "Math-4-shot": "minerva_math",
}  # fmt: skip
THRESHOLDS = ("add_threshold", "activate_threshold", "confidence_threshold")
every_paper_recipe = pytest.mark.parametrize("name", PAPER)
every_method_recipe = pytest.mark.parametrize("name", METHODS)


def published_rows(*tables):
    return [row for row in load_paper() if row.table in tables]


def published(recipe, method):
    """Table 8's settings of a method, which the file has beside its row of table 1 or 2."""
    key = (recipe.family, recipe.test_set, method)
    [row] = [
        row
        for row in published_rows("table1", "table2")
        if (row.model.removeprefix("D2F-"), row.test_set, row.method) == key
    ]
    return {key: float(value) for key, value in row.settings.items()}


def rows_of(recipe, *methods):
    found = [row for row in recipe.rows if row.method in methods]
    assert {row.method for row in found} == set(methods)
    return found


def length_of(recipe, row):
    return row.max_new_tokens or recipe.max_new_tokens


def whole_blocks(most, block_size):
    """The authors' loop opens whole blocks alone, and drops the remainder."""
    return most // block_size * block_size


def test_every_row_of_tables_1_and_2_has_a_recipe():
    tables = {
        (row.model.removeprefix("D2F-"), row.test_set) for row in published_rows("table1", "table2")
    }
    assert {(r.family, r.test_set) for r in METHODS.values()} == tables
    assert len(METHODS) == 8


@every_paper_recipe
def test_task_and_examples_are_those_of_the_test_set(name):
    recipe = PAPER[name]
    assert recipe.num_fewshot == FEWSHOT[recipe.test_set]
    assert recipe.task == TASKS[recipe.test_set]


@every_paper_recipe
def test_prompts_begin_as_in_the_authors_scripts(name):
    """They add a BOS everywhere; the templates of the other LLaDA tasks write it themselves."""
    dream = name.startswith("dream_")
    for model in PAPER[name].models.values():
        assert model.chat_template is not (dream or name == "llada_humaneval")
        assert model.add_bos is (True if not model.chat_template else None)


@every_paper_recipe
def test_baselines_are_of_fixed_length(name):
    recipe = PAPER[name]
    for row in recipe.rows:
        if row.method in FIXED:
            assert row.early_stop is False
        if row.strategy in ("vanilla", "dllm-cache") and recipe.experiment != "steps":
            assert row.options["num_steps"] == length_of(recipe, row)


@every_method_recipe
def test_the_baselines_of_table_8(name):
    recipe = METHODS[name]
    paper = published(recipe, "vanilla")
    for row in rows_of(recipe, *(method for method in FIXED if method != "control")):
        assert length_of(recipe, row) == paper["max_new_tokens"]
        if "block_size" in paper:
            assert row.options["block_length"] == paper["block_size"]
        else:
            assert row.options.get("block_length") in (None, 32, length_of(recipe, row))


@every_method_recipe
def test_d2f_of_table_8(name):
    recipe = METHODS[name]
    paper = published(recipe, "pipelined")
    size, most = int(paper["block_size"]), int(paper["max_new_tokens"])
    for row in rows_of(recipe, "undistilled", "serial", "pipelined"):
        assert row.policy["block_size"] == size
        assert length_of(recipe, row) == whole_blocks(most, size)
        for threshold in THRESHOLDS:
            fixed = row.strategy == "serial" and threshold != "confidence_threshold"
            assert row.policy.get(threshold) == (None if fixed else paper[threshold])
    plain, whole = rows_of(recipe, "pipelined")
    assert (plain.early_stop, whole.early_stop, whole.score) == (True, False, False)


def test_mbpp_of_dream_answers_in_240_tokens():
    key = ("Dream", "MBPP-3-shot", "pipelined")
    [paper] = [r for r in published_rows("table2") if (r.family, r.test_set, r.method) == key]
    for row in rows_of(RECIPES["dream_mbpp"], "serial", "pipelined"):
        assert row.max_new_tokens == paper.mean_tokens == 240


@pytest.mark.parametrize(
    ("name", "table"),
    [("dream_thresholds", "table3"), ("dream_noise_gsm8k", "table4"),
     ("dream_noise_mbpp", "table4")],
)  # fmt: skip
def test_the_ablations_have_the_papers_settings(name, table):
    recipe = PAPER[name]
    named = [r.settings for r in published_rows(table) if r.test_set == recipe.test_set]
    keys = [key for key in THRESHOLDS if key in named[0]]
    wanted = {tuple(float(settings[key]) for key in keys) for settings in named}
    here = {tuple(float(row.policy[key]) for key in keys) for row in recipe.rows}
    assert wanted <= here
    for row in recipe.rows:
        assert length_of(recipe, row) == 512
        assert row.policy["block_size"] == 32
        assert all(row.labels[key] == row.policy[key] for key in row.labels if key in row.policy)


@pytest.mark.parametrize("name", [name for name in PAPER if PAPER[name].experiment == "control"])
def test_the_control_is_as_long_as_the_paper_s(name):
    recipe = PAPER[name]
    for row in recipe.rows:
        assert length_of(recipe, row) == 256


@pytest.mark.parametrize("name", [name for name in PAPER if PAPER[name].experiment == "block-size"])
def test_block_sizes_fill_whole_blocks_of_512_tokens(name):
    recipe = PAPER[name]
    for row in recipe.rows:
        size = row.policy["block_size"]
        assert row.labels == {"block_size": size}
        assert length_of(recipe, row) == whole_blocks(512, size)
