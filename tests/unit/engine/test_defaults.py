"""One rule, from the contents of a checkpoint, decodes a model when nobody names a strategy."""

from __future__ import annotations

import json

import pytest

import d2f
from d2f.decoding.strategies import ALGORITHMS
from d2f.diffusion.policy import DecodingPolicy
from d2f.engine.engine import Engine
from d2f.engine.policy import default_limit, default_strategy
from d2f.engine.request import Request, resolve
from d2f.errors import CheckpointError, ConfigError
from d2f.models.checkpoint import load_model, read_spec, save_model
from d2f.testing import tiny_model, tiny_spec, write_adapter, write_checkpoint

DIFFUSION, CAUSAL = ["llada", "Dream"], ["llama", "qwen2"]
PROMPT = [5, 6, 7]


def same(model, result, **options):
    expected = d2f.generate_ids(model, PROMPT, max_new_tokens=24, **options)
    return (result.token_ids, result.num_forwards) == (expected.token_ids, expected.num_forwards)


@pytest.mark.parametrize("model_type", DIFFUSION)
@pytest.mark.parametrize("adapter", [None, "plain", "with policy"])
@pytest.mark.parametrize("policy", [None, DecodingPolicy(block_size=8)])
@pytest.mark.parametrize("merge", [True, False])
def test_only_a_distilled_model_is_pipelined(tmp_path, model_type, adapter, policy, merge):
    folder = write_checkpoint(tmp_path / "m", model_type, policy=policy)
    own = DecodingPolicy(block_size=4) if adapter == "with policy" else None
    if adapter is not None:
        write_adapter(tmp_path / "a", model_type, policy=own)
        adapter = tmp_path / "a"
    model = load_model(folder, adapter, "cpu", merge_adapter=merge)
    expected = "pipelined" if adapter or policy else "vanilla"
    assert default_strategy(model.spec) == expected
    result = d2f.generate_ids(model, PROMPT, max_new_tokens=24)
    assert same(model, result, strategy=expected)
    [other] = Engine(model).generate([Request(prompt_ids=PROMPT, max_new_tokens=24)])
    assert other.token_ids == result.token_ids
    # What is asked for is done, silently.
    assert not same(model, result, strategy="serial" if expected == "vanilla" else "vanilla")
    if adapter and merge:
        save_model(model, tmp_path / "merged")
        assert default_strategy(read_spec(tmp_path / "merged")) == "pipelined"


@pytest.mark.parametrize("model_type", DIFFUSION)
def test_who_gives_a_policy_means_the_pipeline(tmp_path, model_type):
    model = load_model(write_checkpoint(tmp_path, model_type), device="cpu")
    policy = DecodingPolicy(block_size=8)
    result = d2f.generate_ids(model, PROMPT, policy, max_new_tokens=24)
    assert same(model, result, policy=policy, strategy="pipelined")
    assert default_strategy(model.spec, policy=True) == "pipelined"


@pytest.mark.parametrize("model_type", CAUSAL)
def test_autoregressive_models_are_decoded_so(tmp_path, model_type):
    model = load_model(write_checkpoint(tmp_path, model_type), device="cpu")
    assert default_strategy(model.spec, policy=True) == "autoregressive"
    assert same(
        model, d2f.generate_ids(model, PROMPT, max_new_tokens=24), strategy="autoregressive"
    )


# ------------------------------------------------------------------------------------- vanilla


@pytest.mark.parametrize(("model_type", "own"), [("llada", "low_confidence"), ("Dream", "entropy")])
@pytest.mark.parametrize("num_steps", [None, 6])
def test_vanilla_is_the_authors_own_sampler(model_type, own, num_steps):
    model = tiny_model(model_type)
    steps = {} if num_steps is None else {"num_steps": num_steps}
    result = d2f.generate_ids(model, PROMPT, max_new_tokens=24, strategy="vanilla", **steps)
    agrees = {
        name: same(model, result, strategy="vanilla", algorithm=name, **steps)
        for name in ALGORITHMS
    }
    assert agrees[own]
    assert not agrees["low_confidence" if own == "entropy" else "entropy"]


def test_an_option_of_one_sampler_only(tmp_path):
    dream, llada = tiny_model("Dream"), tiny_model("llada")
    blocks = {"strategy": "vanilla", "block_length": 8}
    result = d2f.generate_ids(dream, PROMPT, max_new_tokens=24, **blocks)
    assert same(dream, result, algorithm="low_confidence", **blocks)
    result = d2f.generate_ids(dream, PROMPT, max_new_tokens=24, strategy="vanilla", eps=0.1)
    assert same(dream, result, strategy="vanilla", algorithm="entropy", eps=0.1)
    with pytest.raises(ConfigError, match="without effect on algorithm low_conf"):
        d2f.generate_ids(llada, PROMPT, strategy="vanilla", eps=0.1)
    with pytest.raises(ConfigError, match="without effect on algorithm entropy"):
        d2f.generate_ids(dream, PROMPT, algorithm="entropy", **blocks)


# ---------------------------------------------------------------------------- length of answers


@pytest.mark.parametrize("model_type", [*DIFFUSION, *CAUSAL])
def test_the_checkpoint_names_the_length(tmp_path, model_type):
    folder = write_checkpoint(tmp_path / "m", model_type)
    assert default_limit(read_spec(folder)) == 256
    file = folder / "generation_config.json"
    for content in ({}, {"max_new_tokens": None}, {"max_length": 20}):
        file.write_text(json.dumps(content))
        assert default_limit(read_spec(folder)) == 256
    file.write_text(json.dumps({"max_new_tokens": 40}))
    model = load_model(folder, device="cpu")
    assert default_limit(model.spec) == 40
    assert default_limit(model.spec, 500) == 12
    assert default_limit(model.spec, 600) == 1
    save_model(model, tmp_path / "again")
    assert read_spec(tmp_path / "again").recommended_max_new_tokens == 40
    for bad in (0, -1, "40", True, 2.5):
        file.write_text(json.dumps({"max_new_tokens": bad}))
        with pytest.raises(CheckpointError, match="max_new_tokens is"):
            read_spec(folder)


def test_a_request_is_resolved_whole():
    for model_type, strategy in (("llada", "pipelined"), ("qwen2", "autoregressive")):
        assert resolve(Request(prompt_ids=PROMPT), tiny_spec(model_type)).strategy == strategy
