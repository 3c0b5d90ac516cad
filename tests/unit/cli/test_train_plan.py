"""`d2f train --dry-run`: what it says, and that it neither loads weights nor trains."""

import json
from pathlib import Path

import pytest
import typer
from tests.unit.training.tiny_run import FAMILY
from typer.testing import CliRunner

from d2f.cli.train import train_command
from d2f.errors import CheckpointError, ConfigError
from d2f.models.families import config_from_spec
from d2f.models.presets import preset_spec
from d2f.testing import tiny_config, write_tokenizer
from d2f.training.config import load_recipe
from d2f.training.run import train

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def dry_run(*arguments):
    app = typer.Typer()
    app.command()(train_command)
    words = [str(word) for word in (*arguments, "--dry-run")]
    if "--gpu" not in words:
        words += ["--gpu", "H100"]
    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def recipe(tmp_path):
    """A recipe of pairs in a file, for a model of which there is no more than a config.json."""
    folder = tmp_path / FAMILY["d2f"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config("Dream")))
    write_tokenizer(folder)
    rows = [{"prompt": f"{i}+1=", "response": f"{i + 1}"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "recipe.toml"
    file.write_text(
        f"""
stage = "d2f"
output = "{tmp_path / "out"}"
steps = 10
batch_size = 8
micro_batch_size = 2
model = {{init = "{folder}"}}
data = {{kind = "jsonl", paths = ["{tmp_path / "pairs.jsonl"}"], sequence_length = 12}}
noise = {{kind = "original", low = 0.2, high = 0.7, block_size = 4}}
optimizer = {{lr = 1e-3}}
lora = {{r = 4, alpha = 8}}
"""
    )
    return file


def test_the_papers_recipes_need_no_network():
    facts = json.loads(
        dry_run(RECIPES / "distill_llada_8b_instruct.toml", "--json", "--processes", 8)
    )
    assert facts["num_parameters"] == preset_spec("llada-8b").num_parameters
    # r = 32 beside four projections of 4096 x 4096 in 32 layers.
    assert facts["num_trained_parameters"] == 32 * 4 * 32 * 8192
    assert (facts["micro_batches_per_process"], facts["tokens_per_update"]) == (1, 24 * 512)
    memory = facts["memory_per_gpu"]
    assert memory["weights"] == 2 * facts["num_parameters"] + 4 * facts["num_trained_parameters"]
    assert facts["memory_otherwise"]["activations"] < memory["activations"]
    assert facts["data"]["num_samples"] is None
    assert facts["seconds"] == pytest.approx(
        50_000 * facts["computed_flops_per_update"] / (8 * 0.5 * 989e12)
    )
    text = dry_run(RECIPES / "distill_dream_7b.toml", "--gpu", "A100-40GB", "--peak-share", 0.3)
    for expected in (
        "50,000 updates",
        "epochs not known",
        "30% of 312 TFLOP/s",
        "39.4 GiB of A100",
    ):
        assert expected in text


def test_a_config_is_enough_and_wins_over_what_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "GSAI-ML" / "LLaDA-8B-Instruct"
    folder.mkdir(parents=True)
    spec = preset_spec("llada-8b", num_layers=2)
    (folder / "config.json").write_text(json.dumps(config_from_spec(spec)))
    facts = json.loads(dry_run(RECIPES / "distill_llada_8b_instruct.toml", "--json"))
    assert facts["num_parameters"] == spec.num_parameters
    assert facts["model"]["source"] == "config.json"


def test_an_unknown_task_is_refused_with_the_known_ones(recipe, d2f):
    done = d2f("train", recipe, "--dry-run", "--set", "evaluate={every=5, task='word-problem'}")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "unknown evaluate.task 'word-problem'; did you mean 'word-problems'?" in done.err
    recipe.write_text(recipe.read_text() + "evaluate = {every = 5, task = 'gsm9k'}\n")
    done = d2f("train", recipe)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "did you mean 'gsm8k'? Known: " in done.err


def test_without_a_config_it_says_what_it_needs(recipe):
    with pytest.raises(CheckpointError, match=r"needs the model's config.json.*no/where"):
        dry_run(recipe, "--set", "model.init=no/where")
    with pytest.raises(ConfigError, match="did you mean 'H100'"):
        dry_run(recipe, "--gpu", "H10")
    with pytest.raises(ConfigError, match="8 cannot be divided evenly among 3"):
        dry_run(recipe, "--processes", 3)


def test_samples_are_counted_where_that_is_cheap(recipe, tmp_path):
    facts = json.loads(dry_run(recipe, "--json"))
    assert facts["data"]["num_samples"] is None
    assert "not been read" in facts["data"]["note"]
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        train(load_recipe(recipe), device="cpu")
    from d2f.text import Tokenizer
    from d2f.training.sources import encode_data

    folder = tmp_path / "Dream"
    encode_data(load_recipe(recipe).data, Tokenizer.load(folder), folder)
    facts = json.loads(dry_run(recipe, "--json"))
    assert (facts["data"]["num_samples"], facts["data"]["epochs"]) == (40, 2.0)
    assert "2.00 epochs of 40 samples" in dry_run(recipe)
    held_out = ("--set", "evaluate.every=5", "--set")
    assert "2.50 epochs of 32" in dry_run(recipe, *held_out, "evaluate.held_out=8")
    assert "leaves nothing of 40" in dry_run(recipe, *held_out, "evaluate.held_out=40")
    packed = ("--set", 'data.padding="packed"', "--set", "noise.train_on_eos_blocks=false")
    facts = json.loads(dry_run(recipe, *packed, "--set", "data.sequence_length=40", "--json"))
    rows = facts["data"]["num_rows"]
    assert 10 <= rows < 20
    assert facts["data"]["epochs"] == pytest.approx(80 / rows)
    text = dry_run(recipe, *packed, "--set", "data.sequence_length=40")
    assert f"epochs of 40 samples in {rows} rows (counted" in text


def test_new_weights_and_generated_data(tmp_path):
    facts = json.loads(
        dry_run(
            RECIPES / "tiny_cpu_autoregressive.toml", "--json", "--output", tmp_path / "out",
            "--set", "activation_checkpointing=true",
        )
    )  # fmt: skip
    assert "qwen2 ([model.config]), " in dry_run(RECIPES / "tiny_cpu_autoregressive.toml")
    config = load_recipe(RECIPES / "tiny_cpu_autoregressive.toml")
    assert facts["num_trained_parameters"] == facts["num_parameters"]
    assert facts["model"]["source"] == "[model.config]"
    assert facts["data"]["num_samples"] == config.data.num_problems
    assert facts["memory_otherwise"]["activations"] > facts["memory_per_gpu"]["activations"]
    assert not (tmp_path / "out").exists()


def test_the_clock_ends_a_run_that_it_limits():
    recipe = (RECIPES / "tiny_cpu_autoregressive.toml", "--set", "steps=100_000_000")
    assert json.loads(dry_run(*recipe, "--json"))["seconds"] > 1000
    limited = (*recipe, "--set", "max_seconds=90")
    assert json.loads(dry_run(*limited, "--json"))["seconds"] == 90
    assert "at most 100,000,000 updates within 90 s" in dry_run(*limited)


def test_products_of_bf16_weights_have_their_rate():
    recipe = RECIPES / "distill_llada_8b_instruct.toml"
    facts = json.loads(dry_run(recipe, "--json", "--set", "precision=float32"))
    assert facts["device"]["flops_per_second"] == 989e12
