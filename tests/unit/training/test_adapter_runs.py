"""Runs that train an adapter on an autoregressive base, and what they leave."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.unit.training.test_run import At, interrupt
from tests.unit.training.tiny_run import make_config, stored_weights, write_files

from d2f.cli.inspect import inspect_adapter
from d2f.cli.train_answers import make_evaluator, make_sampler
from d2f.diffusion.policy import DecodingPolicy
from d2f.engine.generate import generate_ids
from d2f.engine.policy import default_limit, default_strategy
from d2f.errors import CheckpointError, ConfigError
from d2f.models.checkpoint import load_model
from d2f.models.lora import LoraConfig
from d2f.testing import write_checkpoint, write_tokenizer
from d2f.training.run import train
from d2f.training.sections import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    ObjectiveConfig,
    SampleConfig,
)

HUB = "owner/model"
LORA = LoraConfig(r=4, alpha=8, dropout=0.3, target_modules="all-linear")
HARD = ObjectiveConfig(objective="cross_entropy")


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path)


def config_for(files, stage, name, objective=None, **model):
    return make_config(
        files / name,
        stage,
        lora=LORA,
        objective=objective,
        model=ModelConfig(**{"init": str(files / "qwen2"), "mask_token_id": 90} | model),
        data=DataConfig(kind="jsonl", paths=(str(files / "pairs.jsonl"),), sequence_length=12),
    )


def run(files, stage, name, objective=None, **model):
    return Path(train(config_for(files, stage, name, objective, **model), device="cpu").folder)


@pytest.mark.parametrize("stage", ["masked-diffusion", "d2f"])
def test_a_run_with_all_that_belongs_to_it(files, stage):
    config = config_for(
        files, stage, "run", HARD if stage == "d2f" else None,
        output_dtype="int8", base_name=HUB, max_new_tokens=9,
    )  # fmt: skip
    config = replace(
        config,
        sample=SampleConfig(every=3, num_prompts=1, max_new_tokens=4),
        evaluate=EvaluateConfig(every=3, held_out=2, max_new_tokens=4),
    )
    made = {"make_sampler": make_sampler, "make_evaluator": make_evaluator}
    assert not train(config, device="cpu", reporter=At(2, interrupt), **made).finished
    # What the result is stored as does not change the training.
    config = replace(config, model=replace(config.model, max_new_tokens=8))
    final = Path(train(config, device="cpu", resume=True, **made).folder)
    for folder in (final, final.parent / "best"):
        model = load_model(files / "qwen2", folder, "cpu")
        assert (model.spec.architecture.name, model.spec.mask_token_id) == ("Dream", 90)
        strategy = "vanilla" if stage == "masked-diffusion" else "pipelined"
        assert (default_strategy(model.spec), default_limit(model.spec)) == (strategy, 8)
        report = inspect_adapter(folder)
        assert (report["dtype"], report["base_model"]) == ("int8", HUB)
        card = (folder / "README.md").read_text()
        for text in (
            f"base_model: {HUB}", f"d2f generate --model {HUB} --adapter THIS_FOLDER",
            f'load_model("{HUB}", adapter="THIS_FOLDER")', "for a qwen2", "mask token 90",
            "PEFT does not read", "library_name: d2f",
        ):  # fmt: skip
            assert text in card
        assert str(files) not in card
    assert len((final.parent / "samples.jsonl").read_text().splitlines()) == 2
    assert len((final.parent / "evaluations.jsonl").read_text().splitlines()) == 2


def test_resuming_goes_on_bit_for_bit(files):
    folders = []
    for name in ("straight", "stopped"):
        config = config_for(files, "d2f", name, HARD)
        if name == "stopped":
            summary = train(config, device="cpu", reporter=At(3, interrupt))
            assert inspect_adapter(summary.folder)["dtype"] == "float32"
        folders.append(Path(train(config, device="cpu", resume=name == "stopped").folder))
    one, other = map(stored_weights, folders)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_chain_of_adapters_on_one_base(files):
    base = str(files / "qwen2")
    autoregressive = run(files, "autoregressive", "ar", mask_token_id=None)
    assert load_model(base, autoregressive, "cpu").spec.architecture.name == "qwen2"
    teacher = run(files, "masked-diffusion", "teacher", init_adapter=str(autoregressive))
    named = run(
        files, "d2f", "named",
        init_adapter=str(teacher), teacher=base, teacher_adapter=str(teacher), mask_token_id=None,
    )  # fmt: skip
    start = run(files, "d2f", "start", init_adapter=str(teacher), mask_token_id=None)
    # The teacher is the model that the run starts from, by either name.
    one, other = stored_weights(named), stored_weights(start)
    assert all(torch.equal(one[name], other[name]) for name in one)
    before = stored_weights(teacher)
    assert one.keys() == before.keys()
    assert not any(torch.equal(one[name], before[name]) for name in one)
    student = load_model(base, named, "cpu")
    assert (student.spec.mask_token_id, default_strategy(student.spec)) == (90, "pipelined")


def test_all_weights_from_an_adapter(files):
    adapter = run(files, "masked-diffusion", "teacher")
    config = config_for(
        files, "d2f", "full", init_adapter=str(adapter), mask_token_id=None, output_dtype="float32"
    )
    model = load_model(train(replace(config, lora=None), device="cpu").folder, device="cpu")
    assert (model.spec.architecture.name, model.spec.mask_token_id) == ("Dream", 90)


def test_what_cannot_be_is_refused(files):
    for lora in (LORA, None):
        config = replace(config_for(files, "d2f", f"x{lora is None}"), lora=lora)
        with pytest.raises(ConfigError, match="nothing has taught it to fill masks"):
            train(config, device="cpu")
    adapter = run(files, "masked-diffusion", "teacher")
    teacher = {"teacher": str(files / "qwen2"), "teacher_adapter": str(adapter)}
    with pytest.raises(ConfigError, match="teacher's mask token is 90, the student's 91"):
        run(files, "d2f", "a", mask_token_id=91, **teacher)
    with pytest.raises(ConfigError, match="cannot teach"):
        run(files, "d2f", "b", teacher=str(files / "qwen2"))
    config = config_for(files, "d2f", "c", HARD, init_adapter=str(adapter))
    with pytest.raises(ConfigError, match=r"does not fit .lora.: at .* it has rank 4"):
        train(replace(config, lora=replace(LORA, r=2)), device="cpu")
    for base in ("Dream", "llada"):
        with pytest.raises(CheckpointError, match="is one already"):
            run(files, "d2f", "d", HARD, init=str(files / base), init_adapter=str(adapter))
    checkpoint = config_for(files, "d2f", "e", HARD)
    train(checkpoint, device="cpu", reporter=At(2, interrupt))
    for folder in (files / "e").glob("checkpoint-*"):
        declared = json.loads((folder / "d2f_adapter.json").read_text())
        declared["base"]["fingerprint"]["norms"] = ["0"]
        (folder / "d2f_adapter.json").write_text(json.dumps(declared))
    with pytest.raises(CheckpointError, match="the weights of its norms are others"):
        train(checkpoint, device="cpu", resume=True)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"base_name": "/home/me/model"}, "must be a hub id"),
        ({"teacher_adapter": "x"}, "must name its base"),
        ({"output_dtype": "int4"}, "output_dtype"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"init": None, "config": {}, "init_adapter": "x"}, "belong to model.init"),
    ],
)
def test_settings_that_make_no_sense(values, part):
    with pytest.raises(ConfigError, match=part):
        ModelConfig(**{"init": "x"} | values)


def test_all_weights_are_not_stored_in_8_bits(tmp_path):
    with pytest.raises(ConfigError, match=r"for the adapter of a .lora. table"):
        make_config(tmp_path, "d2f", model=ModelConfig(init="x", output_dtype="int8"))


def test_a_family_with_normalised_heads_becomes_a_d2f_model(files):
    """Qwen3: an adapter, then all weights; the result decodes in blocks as the oracle does."""
    write_checkpoint(files / "qwen3", "qwen3")
    write_tokenizer(files / "qwen3")
    start = {"init": str(files / "qwen3")}
    adapter = run(files, "masked-diffusion", "teacher", **start)
    config = config_for(
        files, "d2f", "full", init_adapter=str(adapter), output_dtype="float32",
        **start | {"mask_token_id": None},
    )  # fmt: skip
    config = replace(config, lora=None, precision="bfloat16")
    folder = Path(train(config, device="cpu").folder)
    assert json.loads((folder / "config.json").read_text())["qk_norm"] is True
    model = load_model(folder, device="cpu")
    assert (model.spec.architecture.name, model.spec.qk_norm) == ("Dream", True)
    merged, beside = (
        load_model(files / "qwen3", adapter, "cpu", merge_adapter=merge) for merge in (True, False)
    )
    assert not torch.equal(model.norm.weight, merged.norm.weight)
    policy = DecodingPolicy(block_size=4)
    for each in (model, merged, beside):
        for prompt in ([10, 10], [12, 12, 12]):
            answers = [
                generate_ids(each, prompt, policy, max_new_tokens=10, strategy=strategy)
                for strategy in ("pipelined", "reference")
            ]
            assert answers[0].token_ids == answers[1].token_ids
