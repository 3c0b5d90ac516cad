"""Adapters: the file format is PEFT's, the arithmetic is exact, a wrong one changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2f.engine.engine import Engine
from d2f.engine.request import Request
from d2f.errors import CheckpointError, ConfigError
from d2f.models.checkpoint import as_diffusion, load_model
from d2f.models.families import FAMILIES
from d2f.models.lora import (
    LoraConfig,
    adapter_disabled,
    adapter_parameters,
    attach_adapter,
    has_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from d2f.models.transformer import published_parameters
from d2f.testing import tiny_adapter, tiny_model, write_adapter, write_checkpoint

IDS = torch.arange(20)[None]
TYPES = list(FAMILIES)


def generator():
    return torch.Generator().manual_seed(0)


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def refused(model, folder, *parts):
    """Loading fails with one CheckpointError that says `parts`, and changes nothing."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_adapter(model, folder)
    for part in parts:
        assert part in str(caught.value)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("model_type", TYPES)
def test_a_fresh_adapter_changes_nothing(model_type):
    model = tiny_model(model_type)
    before = model.logits(IDS)
    attach_adapter(model, LoraConfig(r=4), generator())
    assert torch.equal(model.logits(IDS), before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == len(adapter_parameters(model)) == 2 * 4 * 2
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, alpha=8),
        LoraConfig(r=4, alpha=8, use_rslora=True),
        LoraConfig(r=2, target_modules=r".*\.(0|1)\..*[qv]_proj"),
        LoraConfig(
            r=4,
            target_modules=("q_proj", "up_proj"),
            rank_pattern={r"1\..*q_proj": 2},
            alpha_pattern={"up_proj": 3.5},
        ),
    ],
)
def test_kept_apart_equals_merged_equals_reloaded(tmp_path, model_type, config):
    base, model = tiny_model(model_type), tiny_model(model_type)
    tiny_adapter(model, config=config)
    with_adapter = model.logits(IDS)
    assert not torch.allclose(with_adapter, base.logits(IDS))
    with adapter_disabled(model):
        assert torch.equal(model.logits(IDS), base.logits(IDS))
    save_adapter(model, tmp_path, base_model="owner/base")
    apart, merged = tiny_model(model_type), tiny_model(model_type)
    load_adapter(apart, tmp_path, merge=False)
    load_adapter(merged, tmp_path)
    assert torch.equal(apart.logits(IDS), with_adapter)
    assert not any(p.requires_grad for p in apart.parameters())
    assert not has_adapter(merged)
    # Logits reach 15 here, so this is the last bits of fp32.
    torch.testing.assert_close(merged.logits(IDS), with_adapter, atol=5e-4, rtol=0)
    assert merged.state_dict().keys() == base.state_dict().keys()
    # What is loaded can be saved again as it was.
    save_adapter(apart, tmp_path / "again")
    first, again = (
        load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again")
    )
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("model_type", ["llada", "Dream", "qwen2"])
def test_steps_follow_an_adapter_that_comes_and_is_merged(model_type):
    def answer(engine, prompt):
        # Prompts differ, as an engine keeps those that it has read.
        request = Request(prompt_ids=prompt, max_new_tokens=12)
        return engine.generate([request])[0].token_ids

    model = tiny_model(model_type)
    engine = Engine(model)
    answer(engine, [7, 2, 3, 4, 5])
    tiny_adapter(model)
    assert answer(engine, [5, 8, 1]) == answer(Engine(model), [5, 8, 1])
    merge_adapter(model)
    assert answer(engine, [9, 8, 7, 3]) == answer(Engine(model), [9, 8, 7, 3])


def test_merging_in_bf16_rounds_once():
    model = tiny_model("llada").to(torch.bfloat16)
    tiny_adapter(model)
    layer = model.layers[0].qkv.q_proj
    exact = layer.base.weight.double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
    kept = layer.base.weight
    merge_adapter(model)
    assert model.layers[0].qkv.q_proj.weight.dtype == torch.bfloat16
    torch.testing.assert_close(
        model.layers[0].qkv.q_proj.weight.double(), exact.bfloat16().double(), atol=0, rtol=2**-8
    )
    assert model.layers[0].qkv.q_proj.weight is not kept


def test_switching_off_nests_and_is_undone_by_errors():
    model = tiny_model("llada")
    tiny_adapter(model)
    on = model.logits(IDS)
    with adapter_disabled(model):
        off = model.logits(IDS)
        with adapter_disabled(model):
            assert torch.equal(model.logits(IDS), off)
        assert torch.equal(model.logits(IDS), off)
    assert torch.equal(model.logits(IDS), on)
    with pytest.raises(KeyError), adapter_disabled(model):
        raise KeyError
    assert torch.equal(model.logits(IDS), on)


def test_switching_off_works_in_a_compiled_model():
    model = tiny_model("llada")
    tiny_adapter(model)
    on = model.logits(IDS)
    with adapter_disabled(model):
        off = model.logits(IDS)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(model.head(compiled(IDS)), on)
        with adapter_disabled(model):
            assert torch.equal(model.head(compiled(IDS)), off)


def test_gradients_reach_the_adapter_only():
    model = tiny_model("Dream").train()
    attach_adapter(model, LoraConfig(r=4, dropout=0.5), generator())
    model.logits(IDS).square().mean().backward()
    assert all(p.grad is not None for p in adapter_parameters(model))
    assert sum(p.grad is not None for p in model.parameters()) == 16
    with adapter_disabled(model):
        assert not model.logits(IDS).requires_grad


def test_dropout_is_of_training_only():
    model = tiny_model("llada")
    tiny_adapter(model, config=LoraConfig(r=4, dropout=0.5))
    assert torch.equal(model.logits(IDS), model.logits(IDS))
    model.train()
    assert not torch.equal(model.logits(IDS), model.logits(IDS))


def test_calls_that_make_no_sense():
    model = tiny_model("llada")
    for call in (
        merge_adapter,
        lambda m: save_adapter(m, "x"),
        lambda m: adapter_disabled(m).__enter__(),
    ):
        with pytest.raises(ConfigError, match="carries no adapter"):
            call(model)
    tiny_adapter(model)
    with pytest.raises(ConfigError, match="carries an adapter already"):
        tiny_adapter(model)
    for target, message in [
        (("o_proj",), r"names no module of llada; .* q_proj, k_proj, v_proj, attn_out"),
        (("ff_out",), "model.transformer.ff_out of llada; only the projections"),
        (("wte",), "model.transformer.wte of llada"),
    ]:
        with pytest.raises(ConfigError, match=message):
            attach_adapter(tiny_model("llada"), LoraConfig(target_modules=target), generator())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"rank_pattern": {"q_proj": 1.5}}, "r is 1.5"),
        ({"alpha": "8"}, "alpha is '8'"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"target_modules": "("}, "is no regular expression"),
    ],
)
def test_config_out_of_range(values, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**values)


# ------------------------------------------------------------------------------ wrong adapters


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"r": -1}, "r is -1"),
        ({"lora_alpha": None}, "alpha is None"),
        ({"target_modules": ["c_attn"]}, "names no module of llada"),
        ({"target_modules": ["q_proj", "wte"]}, "for a finished one, merge the adapter"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"rank_pattern": [1]}, "rank_pattern"),
    ],
)
def test_unsupported_adapter_config(tmp_path, change, part):
    folder = write_adapter(tmp_path, "llada")
    edit_config(folder, **change)
    refused(tiny_model("llada"), folder, "adapter_config.json", part)


def test_unknown_entries_are_ignored(tmp_path):
    folder = write_adapter(tmp_path, "llada")
    expected, model = tiny_model("llada"), tiny_model("llada")
    load_adapter(expected, folder)
    edit_config(folder, arrow_config=None, some_future_entry={"a": 1}, modules_to_save=[])
    load_adapter(model, folder)
    assert torch.equal(model.logits(IDS), expected.logits(IDS))


def test_adapter_for_another_model(tmp_path):
    folder = write_adapter(tmp_path / "a", "Dream")
    edit_config(folder, target_modules=["q_proj", "k_proj", "v_proj"])
    key = "base_model.model.model.transformer.blocks.0.q_proj.lora_A.weight"
    refused(
        tiny_model("llada"),
        folder,
        "an adapter for another model than this llada of 2 layers and width 32",
        f"12 missing: {key}",
        "16 unexpected: base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight",
    )


def test_every_key_must_fit(tmp_path):
    folder = write_adapter(tmp_path, "llada")

    def change(tensors):
        names = list(tensors)
        tensors.pop(names[0])
        tensors["base_model.model.other.lora_A.weight"] = torch.ones(4, 32)
        tensors[names[3]] = torch.ones(5, 5)

    edit_tensors(folder, change)
    refused(tiny_model("llada"), folder, "1 missing", "1 unexpected", "is [5, 5], not")


def test_target_modules_must_all_be_there(tmp_path):
    folder = write_adapter(tmp_path, "llada")
    edit_config(folder, target_modules=["q_proj", "k_proj", "v_proj", "attn_out", "up_proj"])
    refused(
        tiny_model("llada"), folder, "4 missing: base_model.model.model.transformer.blocks.0.up"
    )


def test_broken_adapter_files(tmp_path):
    folder = write_adapter(tmp_path, "llada")
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    refused(tiny_model("llada"), folder, "adapter_model.safetensors is truncated")
    file.unlink()
    (folder / "adapter_model.bin").write_bytes(b"x")
    refused(tiny_model("llada"), folder, "pickled weights only (adapter_model.bin)")
    (folder / "adapter_config.json").unlink()
    refused(tiny_model("llada"), folder, "holds no adapter_config.json")


def test_layers_and_exclusions_narrow_the_targets(tmp_path):
    model = tiny_model("llada")
    only = r"model\.transformer\.blocks\.1\.(q|v)_proj"
    tiny_adapter(model, config=LoraConfig(r=4, alpha=8, target_modules=only))
    save_adapter(model, tmp_path)
    edit_config(
        tmp_path,
        target_modules=["q_proj", "k_proj", "v_proj"],
        layers_to_transform=[1],
        exclude_modules=["k_proj"],
    )
    loaded = tiny_model("llada")
    load_adapter(loaded, tmp_path, merge=False)
    assert torch.equal(loaded.logits(IDS), model.logits(IDS))
    save_adapter(loaded, tmp_path / "again")
    again = tiny_model("llada")
    load_adapter(again, tmp_path / "again", merge=False)
    assert torch.equal(again.logits(IDS), model.logits(IDS))


# ------------------------------------------------------------------------------ names of tensors

SPELLINGS = {
    "adapter's name": lambda n: n.replace(".weight", ".default.weight"),
    "other adapter's name": lambda n: n.replace(".weight", ".my-adapter_2.weight"),
    "compiled": lambda n: f"_orig_mod.{n}",
    "compiled inside": lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled layers": lambda n: n.replace(".0.", ".0._orig_mod.").replace(".1.", ".1._orig_mod."),
    "data parallel": lambda n: f"module.{n}",
    "FSDP": lambda n: n.replace("base_model.", "_fsdp_wrapped_module.base_model."),
    "checkpointed": lambda n: n.replace(".1.", ".1._checkpoint_wrapped_module."),
    "all of them": lambda n: f"module._orig_mod.{n}".replace(".weight", ".default.weight"),
    "no prefix": lambda n: n.removeprefix("base_model.model."),
    "trunk": lambda n: n.replace("base_model.model.model.", "base_model.model."),
}


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_any_spelling_of_the_names(tmp_path, model_type, spelling):
    folder = write_adapter(tmp_path, model_type)
    expected, model = tiny_model(model_type), tiny_model(model_type)
    load_adapter(expected, folder)

    def rename(tensors):
        renamed = {SPELLINGS[spelling](name): value for name, value in tensors.items()}
        assert renamed.keys() != tensors.keys()
        tensors.clear()
        tensors.update(renamed)

    edit_tensors(folder, rename)
    load_adapter(model, folder)
    assert torch.equal(model.logits(IDS), expected.logits(IDS))


EMBED, HEAD = "model.embed_tokens", "lm_head"


@pytest.mark.parametrize(
    "name", ["{}.weight", "{}.base_layer.weight", "{}.modules_to_save.x.weight"]
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_embeddings_that_equal_the_bases(tmp_path, name, tied, dtype):
    folder = write_adapter(tmp_path, "Dream")
    bases = [tiny_model("Dream", tie_word_embeddings=tied).to(dtype) for _ in range(2)]
    load_adapter(bases[0], folder)

    def add(tensors, change=0.0):
        for module, table in ((EMBED, bases[1].embed.weight), (HEAD, bases[1].head_weight_VD)):
            # As saved from a base in the other type.
            saved = table.to(torch.bfloat16 if dtype == torch.float32 else torch.float32)
            tensors[f"base_model.model.{name.format(module)}"] = saved.detach() + change

    edit_tensors(folder, add)
    edit_config(folder, modules_to_save=["embed_tokens", "lm_head"])
    load_adapter(bases[1], folder)
    assert torch.equal(bases[1].logits(IDS), bases[0].logits(IDS))
    edit_tensors(folder, lambda tensors: add(tensors, 0.5))
    model = tiny_model("Dream", tie_word_embeddings=tied).to(dtype)
    refused(model, folder, "embed_tokens.weight", "otherwise than the model", "merge the adapter")


def grown(tensors):
    tensors[f"base_model.model.{EMBED}.weight"] = torch.ones(98, 32)


def a_second(tensors):
    first = dict(tensors)
    tensors.update({n.replace(".weight", ".other.weight"): v.clone() for n, v in first.items()})


def added(name, value):
    return lambda tensors: tensors.update({f"base_model.model.{name}": value})


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "config", "parts"),
    [
        (grown, {}, ["embed_tokens.weight as F32 of [98, 32], where the model has [96, 32]"]),
        (a_second, {}, ["holds several adapters (None, other)"]),
        (added(f"{Q_PROJ}.lora_magnitude_vector", torch.ones(32)), {}, ["belongs to DoRA"]),
        (added(f"{EMBED}.lora_embedding_A", torch.ones(4, 96)), {}, ["LoRA of an embedding"]),
        (added(f"{Q_PROJ}.lora_B.bias", torch.ones(32)), {}, ["LoRA with a bias"]),
        (added("score.weight", torch.ones(2, 32)), {}, ["score.weight, which is no tensor of an"]),
        (
            added(f"{Q_PROJ}.lora_A.weight", torch.ones(4, 32).to(torch.int8)),
            {},
            [f"{Q_PROJ}.lora_A.weight is I8; only F64, F32, BF16, F16 are supported"],
        ),
        (None, {"r": 8}, ["r and rank_pattern do not fit the tensors, of rank 4"]),
        (None, {"rank_pattern": {"q_proj": 2}}, ["r and rank_pattern do not fit the tensors"]),
        (
            None,
            {"target_modules": ["q_proj"]},
            ["target_modules does not fit the tensors: 12 unexpected"],
        ),
        (
            None,
            {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]},
            ["target_modules does not fit the tensors: 4 missing"],
        ),
    ],
)
def test_the_true_reason_is_named(tmp_path, change, config, parts):
    folder = write_adapter(tmp_path, "Dream")
    if change is not None:
        edit_tensors(folder, change)
    edit_config(folder, **config)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(tiny_model("Dream"), folder)
    for part in parts:
        assert part in str(caught.value)
    assert "another model" not in str(caught.value)


@pytest.mark.parametrize(
    "other", [{"hidden_size": 48}, {"num_key_value_heads": 4}, {"num_hidden_layers": 1}]
)
def test_another_model_is_named_as_such(tmp_path, other):
    refused(
        tiny_model("Dream", **other),
        write_adapter(tmp_path, "Dream"),
        "is an adapter for another model than this Dream",
    )


def test_buffers_in_an_adapter_are_left_out(tmp_path):
    folder = write_adapter(tmp_path, "Dream")
    expected, model = tiny_model("Dream"), tiny_model("Dream")
    load_adapter(expected, folder)
    edit_tensors(folder, added("model.position_ids", torch.arange(8)))
    edit_tensors(folder, added("model.rotary_emb.inv_freq", torch.ones(4)))
    load_adapter(model, folder)
    assert torch.equal(model.logits(IDS), expected.logits(IDS))


# --------------------------------------------------------------------------------- with peft


@pytest.fixture(scope="module")
def peft():
    # Here: it takes seconds.
    import peft

    return peft


def their_logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, alpha=8),
        LoraConfig(
            r=4,
            alpha=8,
            use_rslora=True,
            target_modules=r".*\.(q_proj|up_proj)",
            rank_pattern={"up_proj": 3},
            alpha_pattern={r"0\.self_attn\.q_proj": 5},
        ),
    ],
)
def test_peft_reads_ours(tmp_path, peft, model_type, config):
    from transformers import AutoModelForCausalLM

    write_checkpoint(tmp_path / "m", model_type)
    write_adapter(tmp_path / "a", model_type, config=config)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a")
    ours = load_model(tmp_path / "m", tmp_path / "a", "cpu", merge_adapter=False)
    torch.testing.assert_close(
        ours.logits(IDS)[:, 1:], their_logits(theirs)[:, :-1], atol=1e-4, rtol=0
    )


def read_as_diffusion(folder, dtype):
    """Write an adapter of all projections, trained on a Llama that is read as a diffusion model."""
    model = as_diffusion(tiny_model("llama"), mask_token_id=90)
    tiny_adapter(model, config=LoraConfig(r=4, alpha=8, target_modules="all-linear"))
    save_adapter(model, folder, dtype=dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peft_reads_the_same_update_on_an_autoregressive_base(tmp_path, peft, dtype):
    from transformers import AutoModelForCausalLM

    write_checkpoint(tmp_path / "m", "llama")
    read_as_diffusion(tmp_path / "a", dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").merge_and_unload()
    theirs = dict(theirs.named_parameters())
    ours = load_model(tmp_path / "m", tmp_path / "a", "cpu")
    assert ours.spec.architecture.name == "Dream"
    bare = tiny_model("llama").layers[1].down_proj.weight
    assert not torch.allclose(ours.layers[1].down_proj.weight, bare, atol=0.1)
    for name, (module, attribute) in published_parameters(ours).items():
        if attribute == "weight":
            torch.testing.assert_close(theirs[name], getattr(module, attribute))


def test_peft_says_that_it_cannot_read_8_bits(tmp_path, peft):
    read_as_diffusion(tmp_path, "int8")
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
        peft.PeftConfig.from_pretrained(str(tmp_path))
    # Another type takes the place of this one.
    read_as_diffusion(tmp_path, "bfloat16")
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).r == 4
    assert not (tmp_path / "adapter_int8.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "target_modules": "all-linear"},
        {"r": 4, "target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
        {
            "r": 4,
            "use_rslora": True,
            "target_modules": r".*\.(q_proj|down_proj)",
            "rank_pattern": {r"layers\.1\.mlp\.down_proj": 2},
            "alpha_pattern": {"q_proj": 12},
        },
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"r": 4, "target_modules": ["q_proj"], "save_embeddings": True},
    ],
)
def test_we_read_pefts(tmp_path, peft, options):
    from transformers import AutoModelForCausalLM

    write_checkpoint(tmp_path / "m", "qwen2")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.manual_seed(0)
    embeddings = options.pop("save_embeddings", False)
    config = peft.LoraConfig(init_lora_weights=False, **options)
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=embeddings)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    whole = embeddings or "modules_to_save" in options
    assert any("embed_tokens" in name for name in stored) == whole
    for merge in (False, True):
        edit_config(tmp_path / "a", init_lora_weights=True)
        ours = load_model(tmp_path / "m", tmp_path / "a", "cpu", merge_adapter=merge)
        torch.testing.assert_close(
            ours.logits(IDS)[:, 1:], their_logits(theirs)[:, :-1], atol=1e-4, rtol=0
        )
