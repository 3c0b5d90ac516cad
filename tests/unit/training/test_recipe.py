import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from d2f.diffusion.policy import DecodingPolicy
from d2f.errors import ConfigError
from d2f.models.lora import LoraConfig
from d2f.recipe import from_table
from d2f.training import sections
from d2f.training.config import TrainConfig, load_recipe, to_table

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.toml"))
TRAINING = [path for path in RECIPES if "stage = " in path.read_text(encoding="utf-8")]

GOOD = """
stage = "d2f"
output = "runs/x"
steps = 5
batch_size = 4
model = {init = "folder"}
data = {kind = "jsonl", paths = ["a.jsonl"], sequence_length = 64}
optimizer = {lr = 1e-4}
noise = {kind = "monotone", low = 0.3, high = 0.7, block_size = 16}
"""


@pytest.fixture
def write(tmp_path):
    def _write(text):
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_shipped_recipes_parse_and_survive_json(path):
    config = load_recipe(path)
    table = json.loads(json.dumps(to_table(config)))
    assert from_table(TrainConfig, table, "recipe.json") == config


def test_there_are_recipes_for_every_stage():
    assert {load_recipe(path).stage for path in TRAINING} == {
        "autoregressive",
        "masked-diffusion",
        "d2f",
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps", "stepz", "unknown key 'stepz'; did you mean 'steps'"),
        ("optimizer =", "optimiser =", "did you mean 'optimizer'"),
        ("lr = 1e-4", "lr = 1e-4, beta = [0, 1]", r"\[optimizer\].*did you mean 'betas'"),
        ("steps = 5", "", "'steps' is missing"),
        ("steps = 5", "steps = 0", "steps is 0"),
        ("steps = 5", "steps = '5'", "must be of type int"),
        ("steps = 5", "steps = true", "must be of type int"),
        ("lr = 1e-4", "lr = -1", "optimizer.lr"),
        ("lr = 1e-4", "lr = 1, betas = [0.9]", "betas"),
        ("lr = 1e-4", "lr = 1, schedule = 'cosin'", "did you mean 'cosine'"),
        ('"d2f"', '"distil"', "unknown stage"),
        ("monotone", "monoton", "did you mean 'monotone'"),
        ("monotone", "uniform", "does not fit stage d2f"),
        ("low = 0.3", "low = 0.8", "0.8"),
        ('"d2f"', '"autoregressive"', r"no use for \[noise\]"),
        ("batch_size = 4", "batch_size = 4\nmicro_batch_size = 3", "no multiple"),
        ('init = "folder"', "", "either init"),
        (
            'model = {init = "folder"}',
            'lora = false\nmodel = {init = "folder", dtype = "bfloat16"}',
            "precision",
        ),
        ('init = "folder"', 'init = "folder", train_embeddings = false', "leaves the embeddings"),
        ('init = "folder"', "config = {}, train_embeddings = false", "worth keeping"),
        ('kind = "jsonl"', 'kind = "problems"', "num_problems"),
        ("steps = 5", "steps = 5\nlora = 3", "must be a table"),
        ("steps = 5", "steps = 5\nlora = {r = 0}", r"\[lora\].*r is 0"),
        ("steps = 5", "steps = 5\npolicy = {blok_size = 3}", "did you mean 'block_size'"),
        ("steps = 5", "steps = ", "not valid TOML"),
    ],
)
def test_wrong_recipes_are_refused_by_name(write, old, new, message):
    assert old in GOOD
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(GOOD.replace(old, new, 1)))


def test_missing_file():
    with pytest.raises(ConfigError, match=r"no\.toml"):
        load_recipe("no.toml")


def test_overrides(write):
    path = write(GOOD)
    config = load_recipe(
        path, ["steps=7", "optimizer.lr=2e-3", "output=runs/y", "lora.r=4", "noise.kind='random'"]
    )
    assert (config.steps, config.optimizer.lr, config.output) == (7, 2e-3, "runs/y")
    assert config.lora is not None
    assert config.lora.r == 4
    for wrong, message in [
        ("steps", "key=value"),
        ("steps.x=1", "no table"),
        ("optimizer.lrr=1", "did you mean 'lr'"),
        ("noise.low=x", "must be of type float"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_recipe(path, [wrong])


def test_distillation_trains_an_adapter_unless_told_otherwise(write):
    assert load_recipe(write(GOOD)).lora == LoraConfig()
    assert LoraConfig().r == 32
    assert LoraConfig().target_modules is None, "the four attention projections"
    assert load_recipe(write(GOOD), ["lora=false"]).lora is None
    other = GOOD.replace('"d2f"', '"masked-diffusion"').replace("monotone", "uniform")
    assert load_recipe(write(other)).lora is None


def test_the_docs_name_every_setting():
    text = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    code = " ".join(re.findall(r"`+[^`]+`+", text))
    named = set(re.findall(r"\w+", code))
    tables = [
        t for t in vars(sections).values() if getattr(t, "__module__", "") == sections.__name__
    ]
    assert sections.EvaluateConfig in tables
    for table in (TrainConfig, LoraConfig, DecodingPolicy, *tables):
        for field in fields(table):
            assert field.name in named, f"{table.__name__}.{field.name}"
