"""Loading and saving models, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2f.diffusion.policy import DecodingPolicy
from d2f.errors import CheckpointError, ConfigError
from d2f.models import checkpoint
from d2f.models.checkpoint import as_diffusion, load_model, save_model
from d2f.models.families import FAMILIES, config_from_spec, spec_from_config
from d2f.models.presets import build_model
from d2f.testing import (
    tiny_adapter,
    tiny_config,
    tiny_model,
    tiny_spec,
    write_adapter,
    write_checkpoint,
)

TYPES = list(FAMILIES)
IDS = torch.arange(20)[None]


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "model", "Dream")


def edit_json(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(path, *parts, **options):
    """Loading fails with one CheckpointError that says all of `parts`."""
    with pytest.raises(CheckpointError) as caught:
        load_model(path, device="cpu", **options)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("max_shard_bytes", [None, 20_000])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, model_type, max_shard_bytes, tied):
    key = "weight_tying" if model_type == "llada" else "tie_word_embeddings"
    model = tiny_model(model_type, seed=3, **{key: tied})
    save_model(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    loaded = load_model(tmp_path / "m", device="cpu")
    assert loaded.spec == model.spec
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    sizes = [file.stat().st_size for file in (tmp_path / "m").glob("*.safetensors")]
    assert len(sizes) == 1 if max_shard_bytes is None else max(sizes) <= max_shard_bytes


@pytest.mark.parametrize("model_type", TYPES)
def test_config_round_trip(model_type):
    spec = tiny_spec(model_type)
    assert spec_from_config(config_from_spec(spec)) == spec


def test_parameters_are_counted_without_building(tmp_path):
    for model_type in TYPES:
        model = tiny_model(model_type)
        assert model.spec.num_parameters == sum(p.numel() for p in model.parameters())


def test_dtype_is_the_checkpoints_own_unless_asked(tmp_path):
    folder = write_checkpoint(tmp_path, "llada", dtype=torch.bfloat16)
    edit_tensors(folder, lambda t: t.update({k: v.float() for k, v in t.items() if "norm" in k}))
    assert {p.dtype for p in load_model(folder, device="cpu").parameters()} == {torch.bfloat16}
    for dtype in ("float32", torch.float32, "torch.float32"):
        assert load_model(folder, device="cpu", dtype=dtype).dtype == torch.float32
    half = write_checkpoint(tmp_path / "half", "llada", dtype=torch.float16)
    assert load_model(half, device="cpu").dtype == torch.float16


def test_unknown_dtype_and_device(folder):
    with pytest.raises(ConfigError, match="unknown dtype 'bfloat'; did you mean 'bfloat16'"):
        load_model(folder, dtype="bfloat")
    with pytest.raises(ConfigError, match="unknown dtype 'int8'"):
        load_model(folder, dtype=torch.int8)
    with pytest.raises(ConfigError, match="unknown device 'gpu'"):
        load_model(folder, device="gpu")
    with pytest.raises(ConfigError, match="device 'cuda:99' is not on this machine"):
        load_model(folder, device="cuda:99")


def test_weights_are_the_models_own(folder):
    model = load_model(folder, device="cpu")
    before = (folder / "model.safetensors").read_bytes()
    model.embed.weight.fill_(1)
    assert (folder / "model.safetensors").read_bytes() == before
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())


def test_policy_travels_with_the_model_and_the_adapters_wins(tmp_path):
    ours, adapters = DecodingPolicy(block_size=8), DecodingPolicy(block_size=16)
    folder = write_checkpoint(tmp_path / "m", "llada", policy=ours)
    assert load_model(folder, device="cpu").spec.recommended_policy == ours
    plain = write_adapter(tmp_path / "a", "llada")
    assert load_model(folder, plain, "cpu").spec.recommended_policy == ours
    with_policy = write_adapter(tmp_path / "b", "llada", policy=adapters)
    assert load_model(folder, with_policy, "cpu").spec.recommended_policy == adapters
    edit_json(folder / "decoding_policy.json", block_sise=4)
    refused(folder, "decoding_policy.json", "did you mean 'block_size'")


def test_tied_head_may_be_stored_once_more(tmp_path):
    folder = write_checkpoint(tmp_path, "qwen2", tie_word_embeddings=True)
    expected = load_model(folder, device="cpu").logits(IDS)
    edit_tensors(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    assert torch.equal(load_model(folder, device="cpu").logits(IDS), expected)
    edit_tensors(folder, lambda t: t["lm_head.weight"].add_(1))
    refused(folder, "ties the embeddings", "lm_head.weight differs")


def test_stored_rotary_frequencies_are_ignored(folder):
    expected = load_model(folder, device="cpu").logits(IDS)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda t: t.update({name: torch.ones(4)}))
    assert torch.equal(load_model(folder, device="cpu").logits(IDS), expected)


# ------------------------------------------------------------------------------ wrong folders


def test_missing_folder_file_or_config(tmp_path, folder):
    refused(tmp_path / "none", "there is no folder", "none")
    refused("no-such-model", "there is no folder 'no-such-model'", "owner/name")
    refused("", "there is no folder ''")
    refused(folder / "config.json", "is a file")
    (folder / "config.json").unlink()
    refused(folder, "holds no config.json")


def test_broken_config(folder):
    (folder / "config.json").write_text("{")
    refused(folder, "config.json", "JSON")
    (folder / "config.json").write_text("[1]")
    refused(folder, "config.json holds a list")
    (folder / "config.json").write_bytes(b"\xff\xfe")
    refused(folder, "config.json", "JSON")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"model_type": "llama4"}, ["unknown model_type 'llama4'", "did you mean 'llama'"]),
        ({"model_type": None}, ["unknown model_type 'None'"]),
        ({"model_type": ["Dream"]}, ["unknown model_type"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'"]),
        ({"hidden_size": "32"}, ["hidden_size is '32'"]),
        ({"rope_theta": "fast"}, ["wrong type"]),
        ({"num_hidden_layers": 0}, ["num_layers is 0"]),
        ({"num_key_value_heads": 3}, ["4 heads cannot share 3"]),
        ({"mask_token_id": 96}, ["mask_token_id is 96", "0 to 95"]),
        ({"eos_token_id": ["a"]}, ["eos_token_id: 'a' is no token id"]),
        ({"eos_token_id": "95"}, ["eos_token_id: '95' is no token id"]),
        ({"eos_token_id": 3.0}, ["eos_token_id: 3.0 is no token id"]),
        ({"pad_token_id": True}, ["pad_token_id: True is no token id"]),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["unknown rope type 'yarn'"]),
    ],
)
def test_unsupported_config(folder, change, parts):
    edit_json(folder / "config.json", **change)
    refused(folder, "config.json", *parts)


def test_missing_config_entry(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "the entry 'hidden_size' is missing")


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_truncated_safetensors(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(folder, "model.safetensors is truncated")


def test_all_wrong_keys_are_named_at_once_before_loading(folder, monkeypatch):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra"] = torch.ones(1)
        tensors["lm_head.weight"] = torch.ones(95, 32)

    edit_tensors(folder, change)
    monkeypatch.setattr(checkpoint.storage, "read_tensor", lambda *a: pytest.fail("read a weight"))
    refused(
        folder,
        "1 missing: model.norm.weight",
        "1 unexpected: model.extra",
        "1 wrongly shaped: lm_head.weight is [95, 32], not [96, 32]",
    )


def test_a_long_list_of_keys_is_cut(folder):
    edit_json(folder / "config.json", num_hidden_layers=4)
    refused(folder, "24 missing: model.layers.2.", "and 16 more")


def test_quantised_weights(folder):
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": torch.ones(96, 32).to(torch.int8)}))
    refused(folder, "lm_head.weight is I8", "converted")


def packed(tensors, suffixes, kinds):
    """A projection's weight replaced by what a scheme stores for it."""
    weight = tensors.pop("model.layers.0.mlp.up_proj.weight")
    for suffix, kind in zip(suffixes, kinds, strict=True):
        size = weight.shape if kind.itemsize == 1 else (4, 4)
        tensors[f"model.layers.0.mlp.up_proj.{suffix}"] = torch.zeros(size).to(kind)


@pytest.mark.parametrize(
    ("suffixes", "kinds", "config", "scheme"),
    [
        (
            ["qweight", "qzeros", "scales", "g_idx"],
            [torch.int32, torch.int32, torch.float16, torch.int32],
            {"quant_method": "gptq", "bits": 4},
            "GPTQ, 4 bits",
        ),
        (["qweight", "g_idx"], [torch.int32, torch.int32], None, "GPTQ"),
        (["qweight", "qzeros", "scales"], [torch.int32] * 2 + [torch.half], None, "GPTQ or AWQ"),
        (["qweight", "scales"], [torch.int32, torch.half], {"quant_method": "awq"}, "AWQ"),
        (["weight", "weight.absmax"], [torch.uint8] * 2, None, "bitsandbytes, 4 bits"),
        (
            ["weight", "weight.absmax"],
            [torch.uint8, torch.float32],
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "bitsandbytes, 4 bits",
        ),
        (["weight", "SCB"], [torch.int8, torch.float32], None, "bitsandbytes, 8 bits"),
        (["weight", "weight_scale_inv"], [torch.float8_e4m3fn, torch.float32], None, "fp8"),
        (["weight"], [torch.float8_e5m2], {"quant_method": "fbgemm_fp8"}, "fp8"),
        (["weight"], [torch.int8], {}, "int8"),
        (["weight"], [torch.int8], {"quant_method": "quanto"}, "quanto"),
        (["weight_packed", "weight_scale"], [torch.int32, torch.half], None, "compressed-tensors"),
    ],
)
def test_quantised_weights_are_refused_by_their_scheme(folder, suffixes, kinds, config, scheme):
    edit_tensors(folder, lambda t: packed(t, suffixes, kinds))
    edit_json(folder / "config.json", quantization_config=config)
    refused(folder, f"the weights are quantised ({scheme}): model.layers.0.mlp.up_proj.")


@pytest.mark.parametrize("config", [None, {}, {"quant_method": "gptq", "bits": 4}])
def test_weights_that_were_converted_back_are_loaded(folder, config):
    expected = load_model(folder, device="cpu").logits(IDS)
    edit_json(folder / "config.json", quantization_config=config)
    assert torch.equal(load_model(folder, device="cpu").logits(IDS), expected)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.pt"])
def test_pickled_weights_are_refused_by_name(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, f"pickled weights only ({name})", "convert them to safetensors")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "neither model.safetensors nor model.safetensors.index.json")


def test_broken_shards(tmp_path):
    folder = write_checkpoint(tmp_path, "llama", max_shard_bytes=20_000)
    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("model-*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].unlink()
    refused(folder, shards[1].name, "is missing")
    shards[1].write_bytes(content[:-1])
    refused(folder, shards[1].name, "truncated")
    shards[1].write_bytes(content)
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.other": shards[0].name})
    refused(folder, "lists tensors that no shard holds: model.other")
    edit_json(index, weight_map=weight_map | {"model.other": "../x.safetensors"})
    refused(folder, "weight_map must map tensor names to file names")


def test_an_adapter_is_not_a_model_nor_the_other_way(tmp_path, folder):
    adapter = write_adapter(tmp_path / "a", "Dream")
    refused(adapter, "holds an adapter, not a model")
    refused(folder, "holds a whole model, not an adapter", adapter=folder)


def test_code_in_a_checkpoint_is_never_run(folder):
    edit_json(folder / "config.json", auto_map={"AutoModel": "modeling_x.DreamModel"})
    (folder / "modeling_x.py").write_text("raise SystemExit('ran')")
    load_model(folder, device="cpu")


# ------------------------------------------------------------------------------------- saving


def test_saving_replaces_the_model_and_keeps_the_rest(tmp_path):
    folder = write_checkpoint(tmp_path / "m", "llada", max_shard_bytes=20_000, tokenizer=True)
    (folder / "state").mkdir()
    (folder / "state" / "x").write_text("kept")
    save_model(tiny_model("Dream"), folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "state",
    }
    assert (folder / "state" / "x").read_text() == "kept"
    assert load_model(folder, device="cpu").spec.architecture.name == "Dream"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_save_leaves_no_half_checkpoint(tmp_path, monkeypatch, exists):
    folder = tmp_path / "m"
    if exists:
        write_checkpoint(folder, "llada")
    real = checkpoint.save_file

    def interrupted(*arguments, **options):
        real(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_model("Dream"), folder, max_shard_bytes=20_000)
    assert [path.name for path in tmp_path.iterdir()] == (["m"] if exists else [])
    if exists:
        assert load_model(folder, device="cpu").spec.architecture.name == "llada"


def test_save_refusals(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="it is a file"):
        save_model(tiny_model("llada"), tmp_path / "file")
    with pytest.raises(ConfigError, match="max_shard_bytes is 0"):
        save_model(tiny_model("llada"), tmp_path / "m", max_shard_bytes=0)
    model = tiny_model("llada")
    tiny_adapter(model)
    with pytest.raises(ConfigError, match="merge it first"):
        save_model(model, tmp_path / "m")


# ------------------------------------------------------------------------------ fresh weights


def test_fresh_weights_follow_the_seed():
    one, same, other = (build_model(tiny_spec("llada"), seed=s) for s in (1, 1, 2))
    assert torch.equal(one.embed.weight, same.embed.weight)
    assert not torch.equal(one.embed.weight, other.embed.weight)
    assert one.layers[0].o_proj.weight.std() < 0.75 * one.layers[0].qkv.q_proj.weight.std()
    assert torch.equal(one.norm.weight, torch.ones(32))
    assert build_model(tiny_spec("Dream"), dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "qwen3"])
def test_autoregressive_weights_as_a_diffusion_model(tmp_path, model_type):
    source = tiny_model(model_type)
    model = as_diffusion(source, mask_token_id=94)
    assert model.spec.architecture.name == "Dream"
    assert model.spec.mask_token_id == 94
    assert model.embed.weight is source.embed.weight
    # Under a causal view the two are one model.
    causal_BL = torch.arange(20, dtype=torch.int32)[None]
    torch.testing.assert_close(
        model.head(model.align(model(IDS, blocks_BL=causal_BL))), source.logits(IDS)
    )
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path, device="cpu").logits(IDS), model.logits(IDS))


def test_as_diffusion_refusals():
    with pytest.raises(ConfigError, match="llada is a diffusion model already"):
        as_diffusion(tiny_model("llada"), mask_token_id=94)
    with pytest.raises(ConfigError, match="mask_token_id is 96"):
        as_diffusion(tiny_model("qwen2"), mask_token_id=96)


def test_published_sizes_are_those_of_the_hub():
    llada = tiny_config("llada") | {
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "mlp_hidden_size": 12288,
        "embedding_size": 126464,
    }
    assert spec_from_config(llada).num_parameters == 8_015_581_184
    dream = tiny_config("Dream") | {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    assert spec_from_config(dream).num_parameters == 7_615_616_512


def test_a_copied_folder_is_enough(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "copy")
    load_model(str(tmp_path / "copy"), device="cpu")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rope_theta": -1.0}, "rope_theta -1.0"),
        ({"rms_norm_eps": -1.0}, "epsilon"),
        ({"eos_token_id": 500}, "eos_token_id is 500"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor of the rope scaling is None"),
    ],
)
def test_settings_that_would_give_nonsense_are_refused(overrides, message):
    with pytest.raises(CheckpointError, match=message):
        spec_from_config(tiny_config("llama") | overrides)
