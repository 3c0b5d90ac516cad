"""Autoregressive models compute what transformers' own do, from files that those wrote."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests.unit.transformers_models import random_model

from d2f.models.checkpoint import load_model, save_model

IDS = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short, so that the 40 positions of the test reach all three ranges of wavelengths.
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", {"head_dim": 16}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen3": (
        "Qwen3",
        {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen3-tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen3-head-dim": ("Qwen3", {}),
}


def theirs(case):
    family, options = CASES[case]
    return random_model(family, SIZES | options)


def assert_same(ours, their_model):
    with torch.no_grad():
        raw_BLV = their_model(IDS).logits
    torch.testing.assert_close(ours.logits(IDS)[:, 1:], raw_BLV[:, :-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_shard_size", ["1GB", "30KB"])
def test_loads_what_transformers_saved(tmp_path, case, max_shard_size):
    model = theirs(case)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "30KB")
    ours = load_model(tmp_path, device="cpu")
    assert ours.spec.eos_token_ids == (2, 3)
    assert_same(ours, model)


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_we_save(tmp_path, case):
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", device="cpu")
    save_model(ours, tmp_path / "ours", max_shard_bytes=30_000)
    auto = transformers.AutoModelForCausalLM
    assert_same(ours, auto.from_pretrained(tmp_path / "ours").eval())


def test_older_configs_keep_rope_entries_apart(tmp_path):
    """transformers 4 wrote rope_theta and rope_scaling beside the other entries."""
    import json

    model = theirs("llama3")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 500.0, "rope_scaling": LLAMA3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(load_model(tmp_path, device="cpu"), model)
