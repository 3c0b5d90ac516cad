"""Training on functions to write: the data kind, its settings and its recipes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from d2f.errors import ConfigError
from d2f.models.checkpoint import load_model
from d2f.problems import ProblemConfig
from d2f.problems.functions import FunctionConfig, generate_function_problems
from d2f.text import Tokenizer
from d2f.training import sources
from d2f.training.config import load_recipe
from d2f.training.run import train
from d2f.training.sections import DataConfig
from d2f.training.sources import encode_data, encode_pairs, read_held_out, read_pairs
from d2f.training.tokenizer import train_tokenizer

RECIPES = Path(__file__).parents[3] / "recipes"
FUNCTIONS = DataConfig(
    kind="functions",
    num_problems=30,
    sequence_length=400,
    seed=3,
    functions=FunctionConfig(max_steps=2),
)


@pytest.fixture
def folder(tmp_path):
    texts = [text for pair in read_pairs(FUNCTIONS) for text in pair]
    return train_tokenizer(texts, tmp_path / "tokenizer", vocab_size=400)


def test_pairs_are_the_generator_s():
    made = generate_function_problems(30, seed=3, config=FunctionConfig(max_steps=2))
    pairs = [(problem.prompt, problem.response) for problem in made]
    assert list(read_pairs(FUNCTIONS)) == pairs
    assert list(read_pairs(FUNCTIONS, 4)) == pairs[:4]


def test_data_do_not_depend_on_the_number_of_workers(folder, monkeypatch):
    tokenizer = Tokenizer.load(folder)
    expected = encode_pairs(tokenizer, read_pairs(FUNCTIONS))
    monkeypatch.setattr(sources, "CHUNK", 8)
    for workers in (1, 2):
        assert encode_data(replace(FUNCTIONS, num_workers=workers), tokenizer, folder) == expected


def test_line_breaks_and_indentation_survive(folder):
    tokenizer = Tokenizer.load(folder)
    for prompt, response in read_pairs(FUNCTIONS):
        assert tokenizer.decode(tokenizer.encode(response)) == response
        assert tokenizer.decode(tokenizer.encode_prompt(prompt)) == prompt


def test_held_out_pairs_are_of_the_test_split(tmp_path):
    made = generate_function_problems(3, seed=3, split="test", config=FunctionConfig(max_steps=2))
    assert read_held_out(FUNCTIONS, 3) == [(p.prompt, p.response) for p in made]
    words = DataConfig(kind="problems", num_problems=9, sequence_length=9)
    assert not set(read_held_out(words, 3)) & set(read_pairs(words))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n' * 3)
    files = DataConfig(kind="jsonl", paths=(str(rows),), sequence_length=9)
    assert read_held_out(files, 2) == [("a", "b")] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_problems": None}, '"problems" and "functions".*the kind is "functions"'),
        ({"paths": ("a.jsonl",)}, "data.paths belongs to the kinds"),
        ({"problems": ProblemConfig(max_steps=3)}, r"\[data.problems\] belongs to kind"),
        ({"kind": "problems"}, r"\[data.functions\] belongs to kind"),
        ({"kind": "function"}, "did you mean 'functions'"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        replace(FUNCTIONS, **settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.functions.max_stepz=2", "did you mean 'max_steps'"),
        ("data.functions.max_steps=9", r"\[data\].*\[functions\].*max_steps <= 4, got 1 and 9"),
        ("data.functions.num_tests='8'", "must be of type int"),
    ],
)
def test_wrong_recipes_are_refused_by_name(override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(RECIPES / "functions_teacher.toml", [override])


def test_the_recipes_run_one_after_the_other(tmp_path, monkeypatch):
    """At a size for a test: everything but width and amount is the recipes'."""
    monkeypatch.chdir(tmp_path)
    small = ["steps=2", "batch_size=4", "data.num_problems=60", "log_every=1"]
    first = ["tokenizer.num_samples=60", "tokenizer.vocab_size=512"]
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    first += [f"model.config.{name}={size}" for name, size in sizes.items()]
    for stage in ("autoregressive", "teacher", "student"):
        overrides = [*small, *(first if stage == "autoregressive" else [])]
        config = load_recipe(RECIPES / f"functions_{stage}.toml", overrides)
        assert train(config, device="cpu").finished
    model = load_model("runs/functions_student/final", device="cpu")
    assert model.spec.recommended_policy == config.policy
    log = Path("runs/functions_teacher/log.jsonl").read_text(encoding="utf-8").splitlines()
    assert len([line for line in log if "loss" in json.loads(line)]) == 2
