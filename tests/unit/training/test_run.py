"""Whole runs from files to files."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from tests.unit.training.tiny_run import FAMILY, make_config, stored_weights, write_files
from typer.testing import CliRunner

from d2f.cli.train import train_command
from d2f.errors import ConfigError, TrainingError
from d2f.models.checkpoint import load_model
from d2f.models.lora import LoraConfig
from d2f.testing import write_checkpoint, write_tokenizer
from d2f.text import Tokenizer
from d2f.training.checkpoint import list_checkpoints
from d2f.training.config import load_recipe
from d2f.training.run import train
from d2f.training.run_log import Reporter
from d2f.training.sections import DataConfig, ModelConfig

RECIPES = Path(__file__).parents[3] / "recipes"


class At(Reporter):
    """Does something when a step is logged."""

    def __init__(self, step, action):
        self.step = step
        self.action = action

    def record(self, record):
        if record["step"] == self.step:
            self.action()


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path)


def config_for(files, stage, name="run", **overrides):
    init = str(files / FAMILY[stage])
    config = make_config(
        files / name,
        stage,
        model=ModelConfig(init=init, output_dtype="float32"),
        data=DataConfig(kind="jsonl", paths=(str(files / "pairs.jsonl"),), sequence_length=12),
    )
    return replace(config, **overrides)


@pytest.mark.parametrize(
    ("stage", "lora", "padding"),
    [
        ("autoregressive", None, "packed"),
        ("masked-diffusion", None, "full"),
        ("d2f", None, "full"),
        ("d2f", LoraConfig(r=4, alpha=8, dropout=0.3), "full"),
    ],
)
def test_resuming_goes_on_bit_for_bit(files, stage, lora, padding):
    straight, stopped = (
        config_for(files, stage, name, lora=lora) for name in ("straight", "stopped")
    )
    straight, stopped = (
        replace(config, data=replace(config.data, padding=padding, sequence_length=30))
        for config in (straight, stopped)
    )
    assert train(straight, device="cpu").finished
    first = train(stopped, device="cpu", reporter=At(3, interrupt))
    assert (first.finished, first.steps) == (False, 3)
    assert Path(first.folder).name == "checkpoint-00000003"
    torch.manual_seed(12345)  # what happens in between must not leak in
    assert train(stopped, device="cpu", resume=True).steps == 6
    one, other = (stored_weights(Path(c.output) / "final") for c in (straight, stopped))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    logs = []
    for config in (straight, stopped):
        lines = (Path(config.output) / "log.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        logs.append([(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in records])
    assert logs[0] == logs[1]


@pytest.mark.parametrize("stage", FAMILY)
def test_embeddings_stay_as_they_are_and_all_else_is_trained(files, stage):
    config = config_for(files, stage)
    config = replace(config, model=replace(config.model, train_embeddings=False))
    assert not train(config, device="cpu", reporter=At(3, interrupt)).finished
    assert train(config, device="cpu", resume=True).finished
    start = load_model(config.model.init, device="cpu")
    final = load_model(Path(config.output) / "final", device="cpu")
    for (name, before), after in zip(start.named_parameters(), final.parameters(), strict=True):
        assert torch.equal(before, after) == name.startswith("embed."), name


def test_signals_save_a_checkpoint_and_are_put_back(files):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    config = config_for(files, "d2f")
    summary = train(config, device="cpu", reporter=At(2, terminate))
    assert (summary.finished, summary.steps) == (False, 2)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    (folder,) = list_checkpoints(Path(config.output))
    names = {path.name for path in folder.iterdir()}
    assert names >= {"training_state.pt", "recipe.json", "provenance.json", "config.json"}
    recorded = json.loads((folder / "recipe.json").read_text())
    assert recorded["optimizer"]["betas"] == [0.9, 0.95]
    assert not (Path(config.output) / "final").exists()


def test_periodic_checkpoints_keep_the_newest(files):
    config = config_for(files, "d2f", checkpoint_every=1, keep_checkpoints=2)
    train(config, device="cpu")
    names = [path.name for path in list_checkpoints(Path(config.output))]
    assert names == ["checkpoint-00000004", "checkpoint-00000005"]


def test_what_a_run_leaves_behind(files):
    config = config_for(files, "masked-diffusion")
    config = replace(config, model=replace(config.model, output_dtype="bfloat16"))
    summary = train(config, device="cpu")
    final = Path(summary.folder)
    model = load_model(final, device="cpu")
    assert model.dtype == torch.bfloat16
    assert Tokenizer.load(final).decode(Tokenizer.load(final).encode("12")) == "12"
    written = json.loads((Path(config.output) / "training_summary.json").read_text())
    assert written["steps"] == 6
    assert written["tokens"] == 6 * 8 * 12
    assert written["data"]["used"] == 40
    # The version of a package for CUDA lacks what torch itself says behind a plus.
    assert torch.__version__.startswith(written["provenance"]["torch"])


def test_shards(files):
    config = config_for(files, "autoregressive")
    large = {"vocab_size": 4096, "hidden_size": 64}
    write_checkpoint(files / "large", "qwen2", **large)
    write_tokenizer(files / "large")
    settings = replace(config.model, init=str(files / "large"), max_shard_mib=1)
    summary = train(replace(config, model=settings, steps=1), device="cpu")
    sizes = [path.stat().st_size for path in Path(summary.folder).glob("*.safetensors")]
    assert len(sizes) > 1
    assert load_model(summary.folder, device="cpu").spec.vocab_size == 4096


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, alpha=8)])
def test_another_model_can_teach(files, lora):
    write_checkpoint(files / "other", "llada", seed=7)
    losses = []
    for name, teacher in (("a", "init"), ("b", str(files / "other"))):
        config = config_for(files, "d2f", name, lora=lora, steps=1)
        config = replace(config, model=replace(config.model, teacher=teacher))
        losses.append(train(config, device="cpu").last["loss"])
    assert losses[1] > 1.5 * losses[0]
    write_checkpoint(files / "large", "llada", embedding_size=97, vocab_size=97)
    wrong = replace(config.model, teacher=str(files / "large"))
    with pytest.raises(ConfigError, match="cannot teach"):
        train(replace(config, model=wrong, output=str(files / "c")), device="cpu")


def test_autoregressive_weights_become_a_shifted_diffusion_model(files):
    config = config_for(files, "masked-diffusion")
    config = replace(config, model=replace(config.model, init=str(files / "qwen2")))
    model = load_model(train(config, device="cpu").folder, device="cpu")
    assert (model.spec.architecture.name, model.spec.mask_token_id) == ("Dream", 94)


def test_wrong_starts_are_refused(files):
    config = config_for(files, "d2f")
    with pytest.raises(TrainingError, match="no checkpoint"):
        train(config, device="cpu", resume=True)
    train(config, device="cpu", reporter=At(2, interrupt))
    with pytest.raises(TrainingError, match="already holds a run"):
        train(config, device="cpu")
    with pytest.raises(TrainingError, match="another 'seed'"):
        train(replace(config, seed=5), device="cpu", resume=True)
    (folder,) = list_checkpoints(Path(config.output))
    (folder / "training_state.pt").write_bytes(b"no")
    with pytest.raises(TrainingError, match="cannot resume"):
        train(config, device="cpu", resume=True)
    long = replace(config.data, sequence_length=1000)
    with pytest.raises(ConfigError, match="512 positions"):
        train(replace(config, data=long, output=str(files / "x")), device="cpu")
    causal = replace(config_for(files, "autoregressive", "y"), model=config.model)
    with pytest.raises(ConfigError, match="no autoregressive model"):
        train(causal, device="cpu")


def test_the_tiny_recipes_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["steps=2", "batch_size=4", "data.num_problems=60", "log_every=1"]
    for stage in ("autoregressive", "teacher", "student"):
        overrides = [*small, *(["tokenizer.num_samples=50"] if stage == "autoregressive" else [])]
        config = load_recipe(RECIPES / f"tiny_cpu_{stage}.toml", overrides)
        assert train(config, device="cpu").finished
    model = load_model(
        "runs/tiny_cpu_teacher/final", adapter="runs/tiny_cpu_student/final", device="cpu"
    )
    assert model.spec.recommended_policy == config.policy


@pytest.mark.parametrize("stage", ["autoregressive", "masked-diffusion", "d2f"])
def test_command_line(files, stage):
    recipe = files / "recipe.toml"
    recipe.write_text(
        f"""
stage = "{stage}"
output = "{files / "out"}"
steps = 4
batch_size = 2
log_every = 1
model = {{init = "{files / FAMILY[stage]}"}}
data = {{kind = "jsonl", paths = ["{files / "pairs.jsonl"}"], sequence_length = 12}}
optimizer = {{lr = 1e-3}}
sample = {{every = 2, num_prompts = 2, max_new_tokens = 4}}
"""
    )
    noise = config_for(files, stage).noise
    settings = [] if noise is None else [f"noise.{k}={v}" for k, v in vars(noise).items()]
    settings = [s.replace("True", "true").replace("False", "false") for s in settings]
    app = typer.Typer()
    app.command()(train_command)
    arguments = [str(recipe), "--device", "cpu", "--json"]
    arguments += [word for setting in settings for word in ("--set", setting)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 4
    samples = (files / "out" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [2, 2, 4, 4]
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, TrainingError)
