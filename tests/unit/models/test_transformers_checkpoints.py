"""Checkpoints as people publish them, read as transformers reads them: config and storage varied.

What transformers loads we load with the same logits, or refuse by name; never is one loaded wrong.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from d2f.errors import CheckpointError
from d2f.models.checkpoint import load_model
from d2f.models.families import FAMILIES, spec_from_config
from d2f.testing import tiny_config, write_checkpoint

IDS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = [(family, tied) for family in ("Llama", "Qwen2") for tied in (False, True)]


@pytest.fixture(scope="module")
def published():
    """(family, tied, sizes) -> config and tensors of a checkpoint, as transformers made them."""
    made = {}

    def make(family, tied, **sizes):
        key = (family, tied, *sorted(sizes.items()))
        if key not in made:
            torch.manual_seed(0)
            values = SIZES | {"tie_word_embeddings": tied} | sizes
            config = getattr(transformers, f"{family}Config")(**values)
            model = getattr(transformers, f"{family}ForCausalLM")(config)
            for name, parameter in model.named_parameters():
                if name.endswith(("bias", "norm.weight")):
                    parameter.data.add_(torch.randn_like(parameter) * 0.3)
            tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
            made[key] = (
                {"architectures": [type(model).__name__]} | config.to_dict() | sizes,
                tensors,
            )
        config, tensors = made[key]
        return dict(config), dict(tensors)

    return make


def write(folder, config, tensors, *, shards=1):
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*"):
        old.unlink()
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def their_logits(folder):
    """Logits of transformers; None where it fails, or makes up weights that it did not find."""
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True
        )
    except Exception:  # of many kinds, its own and Python's
        return None
    if info["missing_keys"] or info["mismatched_keys"]:
        return None
    with torch.no_grad():
        return model.eval()(IDS).logits


def our_logits(folder):
    try:
        return load_model(folder, device="cpu").logits(IDS)
    except CheckpointError as error:
        return str(error)


def assert_same(folder, *, may_refuse=False):
    """Whether both loaded it, with the same logits."""
    theirs, ours = their_logits(folder), our_logits(folder)
    if theirs is None:
        return False
    if isinstance(ours, str):
        assert may_refuse, ours
        return False
    torch.testing.assert_close(ours[:, 1:], theirs[:, :-1], atol=1e-4, rtol=0)
    return True


# -------------------------------------------------------------------------------------- config

ENTRIES = (
    "attention_bias", "attention_dropout", "head_dim", "hidden_act", "layer_types",
    "max_position_embeddings", "max_window_layers", "mlp_bias", "num_key_value_heads",
    "pad_token_id", "bos_token_id", "eos_token_id", "partial_rotary_factor",
    "quantization_config", "rms_norm_eps", "rope_parameters", "rope_scaling",
    "sliding_window", "tie_word_embeddings", "torch_dtype", "use_cache", "use_sliding_window",
)  # fmt: skip


@pytest.mark.parametrize("how", ["missing", "null"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_an_entry_that_is_missing_or_null(tmp_path, published, family, how):
    loaded = set()
    for name in ENTRIES:
        config, tensors = published(family, False)
        config.pop(name, None)
        if how == "null":
            config[name] = None
        if assert_same(write(tmp_path, config, tensors)):
            loaded.add(name)
    must = {"rope_parameters", "rope_scaling", "layer_types", "quantization_config"}
    assert must | ({"rms_norm_eps", "max_position_embeddings"} if how == "missing" else set()) <= (
        loaded
    )


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500.0},
        {"rope_parameters": {}, "rope_theta": 500.0},
        {"rope_parameters": {"rope_theta": 500.0}, "rope_theta": 700.0},
        {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
        {"rope_theta": 500.0, "rope_scaling": LLAMA3},
        {"rope_theta": 500.0, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}},
        {"rope_scaling": {"rope_theta": 700.0}, "rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
        {
            "rope_parameters": {**LLAMA3, "rope_theta": 5.0, "original_max_position_embeddings": 8},
            "original_max_position_embeddings": 16,
        },
        {"hidden_act": "swish"},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "max_window_layers": 2},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None},
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 2},
        {"pretraining_tp": 2},
    ],
)
def test_settings_as_transformers_heeds_them(tmp_path, published, family, changes):
    config, tensors = published(family, False)
    for name in ("rope_parameters", "layer_types"):
        config.pop(name, None)
    assert assert_same(write(tmp_path, config | changes, tensors))


def test_a_sliding_window_is_refused(tmp_path, published):
    config, tensors = published("Qwen2", False)
    del config["layer_types"]
    config |= {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4}
    folder = write(tmp_path, config, tensors)
    assert their_logits(folder) is not None
    assert "use_sliding_window is True, for the layers from 1 on" in our_logits(folder)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_defaults_are_those_of_transformers(model_type):
    """All sizes may be missing too: compared by the spec, as such a model would be large."""
    theirs = transformers.AutoConfig.for_model(model_type)
    ours = spec_from_config({"model_type": model_type})
    expected = {
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "intermediate_size": theirs.intermediate_size,
        "num_layers": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        "num_kv_heads": theirs.num_key_value_heads,
        "max_positions": theirs.max_position_embeddings,
        "norm_eps": theirs.rms_norm_eps,
        "rope_theta": theirs.rope_parameters["rope_theta"],
        "tie_embeddings": theirs.tie_word_embeddings,
    }
    assert {name: getattr(ours, name) for name in expected} == expected


@pytest.mark.parametrize("content", [{}, {"eos_token_id": None}])
def test_no_end_is_made_up(tmp_path, published, content):
    """LlamaConfig's own is 2, yet transformers does not end there where no file says so."""
    config, tensors = published("Llama", False)
    config.pop("eos_token_id")
    folder = write(tmp_path, config | content, tensors)
    assert load_model(folder, device="cpu").spec.eos_token_ids == ()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.generation_config.eos_token_id is None


def test_what_the_authors_classes_take_for_missing_entries():
    dream = tiny_config("Dream") | {"num_attention_heads": 32, "head_dim": 2}
    llada = tiny_config("llada")
    for name in ("num_key_value_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps"):
        dream.pop(name)
    for name in ("max_sequence_length", "rope_theta", "rms_norm_eps", "mlp_hidden_size"):
        llada.pop(name)
    read = spec_from_config(dream)
    assert (read.num_kv_heads, read.max_positions) == (32, 32768)
    assert (read.rope_theta, read.norm_eps) == (10000.0, 1e-6)
    assert not read.tie_embeddings
    llada.pop("weight_tying")
    read = spec_from_config(llada)
    assert (read.max_positions, read.rope_theta, read.norm_eps) == (1024, 10000.0, 1e-5)
    assert read.intermediate_size == 4 * 32
    assert read.tie_embeddings


@pytest.mark.parametrize("model_type", FAMILIES)
def test_null_is_false(tmp_path, model_type):
    """What the published code asks for by `if` may be null, as older tools write it."""
    folder = write_checkpoint(tmp_path, model_type)
    expected = load_model(folder, device="cpu").logits(IDS)
    config = json.loads((folder / "config.json").read_text())
    off = [name for name, value in config.items() if value is False]
    off += ["use_sliding_window", "mlp_bias", "attention_bias", "alibi", "scale_logits"]
    for name in off:
        (folder / "config.json").write_text(json.dumps(config | {name: None}))
        assert torch.equal(load_model(folder, device="cpu").logits(IDS), expected), name
    if model_type == "llada":
        (folder / "config.json").write_text(json.dumps(config | {"rope": None}))
        assert "rope is None; only True is supported" in our_logits(folder)


# ------------------------------------------------------------------------------------- storage

BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "model.layers.1.self_attn.rotary_emb.inv_freq": torch.arange(4),
    "model.rotary_emb.inv_freq": torch.ones(4, dtype=torch.bfloat16),
    "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
    "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
    "model.layers.1.self_attn.bias": torch.ones(1, 1, 8, 8),
    "model.position_ids": torch.arange(8)[None],
    "model.embeddings.position_ids": torch.arange(8, dtype=torch.int32),
    "model.causal_mask": torch.ones(8, 8, dtype=torch.uint8),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_left_out(tmp_path, published, name):
    config, tensors = published("Llama", False)
    assert assert_same(write(tmp_path, config, tensors | {name: BUFFERS[name]}))


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("stored", [[EMBED], [HEAD], [EMBED, HEAD]])
@pytest.mark.parametrize(("shards", "trunk"), [(1, False), (3, False), (3, True)])
def test_a_tied_table_under_any_of_its_names(tmp_path, published, stored, shards, trunk):
    config, tensors = published("Qwen2", True)
    table = tensors.pop(EMBED)
    tensors |= {name: table.clone() for name in stored}
    if trunk:  # as LlamaModel.save_pretrained writes it
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert assert_same(write(tmp_path, config, tensors, shards=shards))


def test_an_untied_head_cannot_be_made_up(tmp_path, published):
    config, tensors = published("Llama", False)
    del tensors[HEAD]
    folder = write(tmp_path, config, tensors)
    assert their_logits(folder) is None
    assert "1 missing: lm_head.weight" in our_logits(folder)


def test_llada_and_dream_trunks_by_themselves(tmp_path):
    for model_type, key in (("llada", "weight_tying"), ("Dream", "tie_word_embeddings")):
        folder = write_checkpoint(tmp_path / model_type, model_type, **{key: True})
        model = load_model(folder, device="cpu")
        from safetensors.torch import load_file

        tensors = load_file(folder / "model.safetensors")
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors")
        assert torch.equal(load_model(folder, device="cpu").logits(IDS), model.logits(IDS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types_of_numbers(tmp_path, published, dtype):
    config, tensors = published("Qwen2", False)
    # The numbers are those of the narrow type, so both sides hold the same ones in fp32.
    config |= {"dtype": "float32", "torch_dtype": "float32"}
    folder = write(tmp_path, config, {name: t.to(dtype) for name, t in tensors.items()})
    ours = load_model(folder, device="cpu", dtype="float32").logits(IDS)
    torch.testing.assert_close(ours[:, 1:], their_logits(folder)[:, :-1], atol=1e-4, rtol=0)
    wide = torch.float32 if dtype == torch.float64 else dtype
    assert load_model(folder, device="cpu").dtype == wide


# ------------------------------------------------------------------------------- all at once


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_mixture(tmp_path, published, data):
    family, tied = data.draw(st.sampled_from(KINDS))
    heads = data.draw(st.sampled_from([2, 4]))
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": data.draw(st.sampled_from([1, 2, heads])),
    }
    if data.draw(st.booleans()):
        sizes["head_dim"] = data.draw(st.sampled_from([8, 16, 20]))
    config, tensors = published(family, tied, **sizes)
    config.pop("rope_parameters")
    for name in data.draw(st.sets(st.sampled_from(ENTRIES), max_size=4)):
        config.pop(name, None)
    for name in data.draw(st.sets(st.sampled_from(ENTRIES), max_size=3)):
        config[name] = None
    config |= data.draw(
        st.sampled_from(
            [
                {},
                {"rope_theta": 500.0},
                {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
                {"rope_theta": 500.0, "rope_scaling": LLAMA3},
            ]
        )
    )
    tensors |= {
        name: BUFFERS[name] for name in data.draw(st.sets(st.sampled_from(sorted(BUFFERS))))
    }
    if tied:
        stored = data.draw(st.sampled_from([[EMBED], [HEAD], [EMBED, HEAD]]))
        table = tensors.pop(EMBED)
        tensors |= {name: table.clone() for name in stored}
    shards = data.draw(st.sampled_from([1, 2]))
    assert_same(write(tmp_path, config, tensors, shards=shards))
