"""Adapters that read an autoregressive base as a diffusion model, know it, and fit in 8 bits."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from d2f.cli.decoding_options import ModelChoice
from d2f.cli.eval import _loader
from d2f.cli.inspect import adapter_lines, inspect_adapter, inspect_model
from d2f.cli.usage import UsageError
from d2f.diffusion.policy import DecodingPolicy
from d2f.engine.policy import default_limit, default_strategy
from d2f.errors import CheckpointError, ConfigError, D2FWarning
from d2f.evaluation.eval_recipe import ModelEntry
from d2f.models.checkpoint import as_diffusion, load_model, save_model
from d2f.models.lora import (
    LoraConfig,
    adapter_parameters,
    has_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    use_config,
)
from d2f.models.lora_int8 import balanced, from_int8, to_int8
from d2f.testing import tiny_adapter, tiny_model, write_checkpoint

IDS = torch.arange(20)[None]
ALL = LoraConfig(r=4, alpha=8, target_modules="all-linear")
HUB = "owner/another-name"


def adapted(model_type, seed=0, **overrides):
    model = as_diffusion(tiny_model(model_type, seed, **overrides), mask_token_id=90)
    tiny_adapter(model, 1, config=ALL)
    policy = DecodingPolicy(block_size=8)
    model.spec = replace(model.spec, recommended_policy=policy, recommended_max_new_tokens=40)
    return model


@pytest.fixture
def folders(tmp_path):
    """A Llama whose ends include the later mask token, and an adapter that reads it as Dream."""
    base = write_checkpoint(tmp_path / "base", "llama", eos_token_id=[95, 90], tokenizer=True)
    save_adapter(adapted("llama"), tmp_path / "adapter", base_model=HUB)
    return base, tmp_path / "adapter"


def edit(file, **changes):
    values = json.loads(file.read_text())
    for name, value in changes.items():
        *path, last = name.split("__")
        at = values
        for part in path:
            at = at[part]
        at[last] = value
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("merge", "dtype"), [(True, "float32"), (False, "bfloat16"), (True, "int8"), (False, "int8")]
)
def test_the_base_alone_becomes_the_diffusion_model(tmp_path, model_type, merge, dtype):
    base = write_checkpoint(tmp_path / "m", model_type, eos_token_id=[95, 90])
    trained = adapted(model_type)
    save_adapter(trained, tmp_path / "a", base_model=HUB, dtype=dtype)
    with warnings.catch_warnings():
        # Another name is no matter where the base is known by its weights.
        warnings.simplefilter("error")
        model = load_model(base, tmp_path / "a", "cpu", merge_adapter=merge)
    spec = model.spec
    assert (spec.architecture.name, spec.mask_token_id, spec.eos_token_ids) == ("Dream", 90, (95,))
    assert has_adapter(model) != merge
    assert (default_strategy(spec), default_limit(spec)) == ("pipelined", 40)
    assert spec.recommended_policy == DecodingPolicy(block_size=8)
    expected = trained.logits(IDS)
    bound = {"float32": 1e-5, "bfloat16": 0.05, "int8": 0.1}[dtype]
    assert (model.logits(IDS) - expected).norm() < bound * expected.norm()
    again = load_model(base, tmp_path / "a", "cpu", merge_adapter=merge)
    assert torch.equal(again.logits(IDS), model.logits(IDS))
    assert load_model(base, device="cpu").spec.architecture.name == model_type
    kinds = {str(t.dtype) for t in load_file(next((tmp_path / "a").glob("*.safetensors"))).values()}
    assert f"torch.{dtype}" in kinds


def test_an_adapter_that_is_not_distilled_is_not_pipelined(folders):
    base, folder = folders
    model = adapted("llama")
    model.spec = replace(model.spec, recommended_policy=None)
    save_adapter(model, folder, distilled=False)
    assert default_strategy(load_model(base, folder, "cpu").spec) == "vanilla"
    assert inspect_model(base, folder)["strategy"] == "vanilla"
    save_adapter(model, folder)
    assert default_strategy(load_model(base, folder, "cpu").spec) == "pipelined"


# ------------------------------------------------------------------------------ another base


def rounded_to(model, bits):
    """Matrices as a GGUF file has them: 2**bits levels for each 32 weights of a row."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            groups = parameter.detach().unflatten(1, (-1, 32))
            step = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
            parameter.data = ((groups / step).round() * step).flatten(1)
    return model


@pytest.mark.parametrize(
    ("bits", "dtype", "tied"),
    [
        (None, torch.bfloat16, False),
        (None, torch.float16, True),
        (8, torch.float32, False),
        (6, torch.bfloat16, True),
        (5, torch.float16, False),
        (4, torch.float32, True),
        (4, torch.bfloat16, False),
        (3, torch.float16, True),
    ],
)
def test_the_base_in_any_precision_is_accepted(tmp_path, bits, dtype, tied):
    save_adapter(adapted("llama", tie_word_embeddings=tied), tmp_path / "a")
    base = tiny_model("llama", tie_word_embeddings=tied)
    save_model((base if bits is None else rounded_to(base, bits)).to(dtype), tmp_path / "m")
    assert load_model(tmp_path / "m", tmp_path / "a", "cpu").spec.mask_token_id == 90
    # And the other way round: trained on what was quantised, used with the original.
    quantised = load_model(tmp_path / "m", device="cpu", dtype="float32")
    model = as_diffusion(quantised, mask_token_id=90)
    tiny_adapter(model, config=ALL)
    save_adapter(model, tmp_path / "a")
    original = as_diffusion(tiny_model("llama", tie_word_embeddings=tied), mask_token_id=90)
    load_adapter(original, tmp_path / "a")


def other_seed(model):
    return tiny_model("llama", 1)


def tuned(model):
    """A step of Adam at a rate of 1e-3 moves each weight by about that."""
    for parameter in model.parameters():
        parameter.data += 1e-3 * torch.sign(torch.sin(torch.arange(parameter.numel()) * 7.0)).view(
            parameter.shape
        )
    return model.bfloat16()


def merged(model):
    """A fine-tune by an adapter, which leaves norms alone."""
    tiny_adapter(model, 3)
    for parameter in adapter_parameters(model):
        parameter *= 0.4
    merge_adapter(model)
    return model


@pytest.mark.parametrize(
    ("change", "part"),
    [(other_seed, "its norms are others"), (tuned, "its norms are others"), (merged, "differ by")],
)
def test_another_model_of_the_same_shape_is_refused(folders, tmp_path, change, part):
    _, folder = folders
    save_model(change(tiny_model("llama")), tmp_path / "other")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "other", folder, "cpu")
    for text in (part, f"load '{HUB}'", "another model of this shape"):
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("other", "part"),
    [
        ({"model_type": "qwen2"}, "trained on a llama of 96 tokens, and this is a qwen2 of 96"),
        ({"model_type": "llama", "vocab_size": 97}, "and this is a llama of 97"),
        ({"model_type": "llama", "num_hidden_layers": 3}, "an adapter for another model than this"),
        ({"model_type": "llama", "intermediate_size": 96}, "for another model than this"),
        ({"model_type": "Dream"}, "and this Dream is one already"),
        ({"model_type": "llada"}, "and this llada is one already"),
    ],
)
def test_other_shapes_and_kinds_are_refused_before_weights_are_read(
    folders, tmp_path, monkeypatch, other, part
):
    other = write_checkpoint(tmp_path / "other", **other)
    monkeypatch.setattr("d2f.models.storage.read_tensor", lambda *_: pytest.fail("read"))
    for see in (inspect_model, load_model):
        with pytest.raises(CheckpointError) as caught:
            see(other, folders[1])
        assert part in str(caught.value)


def test_a_model_with_the_adapter_merged_is_refused(folders, tmp_path):
    base, folder = folders
    save_model(load_model(base, folder, "cpu"), tmp_path / "merged")
    assert load_model(tmp_path / "merged", device="cpu").spec.architecture.name == "Dream"
    with pytest.raises(CheckpointError, match="merged into this model, leave the adapter out"):
        load_model(tmp_path / "merged", folder, "cpu")


def test_an_adapter_on_the_merged_model_is_that_models(folders, tmp_path):
    base, folder = folders
    model = load_model(base, folder, "cpu")
    save_model(model, tmp_path / "merged")
    tiny_adapter(model, 5)
    save_adapter(model, tmp_path / "second")
    again = load_model(tmp_path / "merged", tmp_path / "second", "cpu", merge_adapter=False)
    assert torch.equal(again.logits(IDS), model.logits(IDS))
    with pytest.raises(CheckpointError, match="trained on a Dream of 96 tokens, and this is a lla"):
        load_model(base, tmp_path / "second", "cpu")


def test_a_model_in_memory_must_be_read_with_the_same_mask(folders):
    base, folder = folders
    with pytest.raises(CheckpointError, match=r"as_diffusion\(model, mask_token_id=90\) first"):
        load_adapter(load_model(base, device="cpu"), folder)
    with pytest.raises(CheckpointError, match="trained with the mask token 90"):
        load_adapter(as_diffusion(load_model(base, device="cpu"), mask_token_id=94), folder)
    model = as_diffusion(load_model(base, device="cpu"), mask_token_id=90)
    load_adapter(model, folder)
    assert torch.equal(model.logits(IDS), load_model(base, folder, "cpu").logits(IDS))


def test_an_adapter_without_a_declaration_warns_by_name(folders):
    base, folder = folders
    (folder / "d2f_adapter.json").unlink()
    with pytest.warns(D2FWarning, match=HUB):
        assert load_model(base, folder, "cpu").spec.architecture.name == "llama"


def test_a_base_that_is_no_autoregressive_one_is_known_too(tmp_path):
    model = tiny_model("Dream")
    tiny_adapter(model)
    save_adapter(model, tmp_path)
    load_adapter(tiny_model("Dream").bfloat16(), tmp_path)
    with pytest.raises(CheckpointError, match="its norms are others"):
        load_adapter(tiny_model("Dream", 1), tmp_path)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"format": 2}, "this version of d2f reads 1"),
        ({"base": None}, "'base' is None"),
        ({"base__vocab_size": True}, "'vocab_size' is True"),
        ({"base__fingerprint": "x"}, "'fingerprint' is 'x'; it must be a table"),
        ({"base__fingerprint__norms": None}, "'norms' is None"),
        ({"base__fingerprint__matrices": [1.0]}, "'matrices' is [1.0]; it must be of type table"),
        ({"base__fingerprint__matrices": {"x": "y"}}, "matrices that are no numbers"),
        ({"mask_token_id": "16"}, "'mask_token_id' is '16'"),
        ({"mask_token_id": 96}, "vocabulary holds 0 to 95"),
        ({"distilled": None}, "'distilled' is None"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
        ({"dtype": "int8"}, "int8 needs the table lora"),
    ],
)
def test_broken_declarations(folders, change, part):
    base, folder = folders
    edit(folder / "d2f_adapter.json", **change)
    for see in (lambda: load_model(base, folder, "cpu"), lambda: inspect_adapter(folder)):
        with pytest.raises(CheckpointError) as caught:
            see()
        assert part in str(caught.value)
        assert "d2f_adapter.json" in str(caught.value)


# ----------------------------------------------------------------------------------- 8 bits


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rank=st.integers(1, 40),
    inputs=st.integers(1, 100),
    outputs=st.integers(1, 100),
    spread=st.floats(1e-6, 1e4),
    kind=st.sampled_from(["plain", "decaying", "cancelling", "outliers"]),
)
def test_8_bits_lose_about_a_hundredth_at_most(seed, rank, inputs, outputs, spread, kind):
    generator = torch.Generator().manual_seed(seed)
    a_RI = torch.randn(rank, inputs, generator=generator) * spread
    b_OR = torch.randn(outputs, rank, generator=generator)
    if kind == "decaying":
        b_OR *= torch.logspace(0, -3, rank)
    elif kind == "cancelling":
        a_RI = torch.cat([a_RI, a_RI * 1.01])
        b_OR = torch.cat([b_OR, -b_OR], 1)
    elif kind == "outliers":
        a_RI *= 1 + 20 * (torch.rand(a_RI.shape, generator=generator) > 0.99)
    update = b_OR.double() @ a_RI.double()
    a, b = balanced(a_RI, b_OR)
    assert (a.shape, b.shape) == (a_RI.shape, b_OR.shape)
    assert (b.double() @ a.double() - update).norm() < 1e-4 * update.norm()
    stored = to_int8(a_RI, b_OR)
    assert all(one.abs().max() <= 127 for one in stored[::2])
    a, b = from_int8(*stored)
    # 32 numbers of which one is far larger than the others lose most: 1.3% of each half.
    assert (b.double() @ a.double() - update).norm() < 0.019 * update.norm()


@pytest.mark.parametrize("gain", [1e-6, 1.0, 1e5])
def test_8_bits_lose_less_than_a_hundredth_of_an_adapter_of_real_size(gain):
    generator = torch.Generator().manual_seed(0)
    a_RI = torch.randn(32, 576, generator=generator)
    b_OR = torch.randn(1536, 32, generator=generator) * torch.logspace(0, -2, 32) * gain
    update = b_OR.double() @ a_RI.double()
    a, b = from_int8(*to_int8(a_RI, b_OR))
    assert (b.double() @ a.double() - update).norm() < 0.008 * update.norm()


def test_8_bits_of_nothing_and_of_what_is_not_finite():
    zero = from_int8(*to_int8(torch.zeros(4, 8), torch.zeros(6, 4)))
    assert not any(half.any() for half in zero)
    with pytest.raises(ConfigError, match="not finite"):
        to_int8(torch.full((4, 8), torch.nan), torch.zeros(6, 4))
    with pytest.raises(ConfigError, match="did you mean 'int8'"):
        save_adapter(adapted("llama"), "unused", dtype="int4")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda name, t: {} if "scale" in name else {name: t}, "scales do not fit"),
        (lambda name, t: {name: t[:1] if "A.scale" in name else t}, "scales do not fit"),
        (lambda name, t: {name: t.char() if "scale" in name else t}, "they are I8"),
        (lambda name, t: {name: t if "scale" in name else t.float()}, "only I8"),
        (lambda name, t: {} if "0.mlp.up" in name else {name: t}, "target_modules does not fit"),
    ],
)
def test_broken_files_of_8_bits(folders, change, part):
    base, folder = folders
    save_adapter(adapted("llama"), folder, dtype="int8")
    file = folder / "adapter_int8.safetensors"
    tensors = load_file(file)
    new = {k: v.contiguous() for n, t in tensors.items() for k, v in change(n, t).items()}
    save_file(new, file)
    with pytest.raises(CheckpointError, match=part):
        load_model(base, folder, "cpu")


# ---------------------------------------------------------------------------------- the rest


def test_going_on_needs_the_same_rank_scale_and_targets():
    for change, part in (
        ({"r": 8, "alpha": 16}, "it has rank 4, scale 2, and .lora. asks for rank 8, scale 2"),
        ({"alpha": 4}, "asks for rank 4, scale 1"),
        ({"target_modules": ("q_proj",)}, "asks for none"),
    ):
        with pytest.raises(ConfigError, match=part):
            use_config(adapted("llama"), replace(ALL, **change))
    model = adapted("llama")
    use_config(model, replace(ALL, dropout=0.5))
    assert model.layers[0].qkv.q_proj.config.dropout == 0.5


def test_further_entries_and_whole_numbers_in_a_declaration_do_no_harm(folders):
    base, folder = folders
    values = json.loads((folder / "d2f_adapter.json").read_text())
    values |= {"later": 1, "base": {**values["base"], "later": 2}}
    values["base"]["fingerprint"]["matrices"]["model.layers.9.mlp.up_proj.weight"] = 0
    (folder / "d2f_adapter.json").write_text(json.dumps(values))
    load_model(base, folder, "cpu")


@pytest.mark.parametrize("name", ["mask_token_id", "distilled"])
def test_a_declaration_without_an_entry_is_not_read_in_another_way(folders, name):
    base, folder = folders
    values = json.loads((folder / "d2f_adapter.json").read_text())
    del values[name]
    (folder / "d2f_adapter.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"'{name}' is missing; fetch the adapter again"):
        load_model(base, folder, "cpu")


def test_targets_that_are_no_names_are_told_all_the_same(folders):
    _, folder = folders
    save_adapter(adapted("llama"), folder)
    edit(folder / "adapter_config.json", target_modules=["q_proj", 7])
    lines = dict(adapter_lines(inspect_adapter(folder)))
    assert "on q_proj, 7 (" in lines["adapter"]


def test_inspecting_an_adapter_by_itself_and_on_its_base(folders):
    base, folder = folders
    save_adapter(adapted("llama"), folder, base_model=HUB, dtype="int8")
    alone = inspect_adapter(folder)
    assert alone["targets"] == ["all-linear"]
    assert (alone["r"], alone["modules"], alone["dtype"]) == (4, 14, "int8")
    assert (alone["base_model"], alone["base_type"], alone["checks_base"]) == (HUB, "llama", True)
    assert (alone["mask_token_id"], alone["max_new_tokens"]) == (90, 40)
    assert alone["recommended_policy"]["block_size"] == 8
    assert alone["parameters"] == sum(p.numel() for p in adapter_parameters(adapted("llama")))
    assert alone["bytes"] == (folder / "adapter_int8.safetensors").stat().st_size
    report = inspect_model(base, folder)
    assert report["architecture"] == "Dream"
    assert (report["token_ids"]["mask"], report["token_ids"]["eos"]) == (90, [95])
    assert [end["id"] for end in report["ends"]] == [95]
    assert (report["strategy"], report["max_new_tokens"]) == ("pipelined", 40)
    assert report["adapter"]["targets"][0] == "down_proj"
    assert report["adapter"]["dtype"] == "int8"


def test_every_command_gets_the_same_model(folders):
    base, folder = (str(path) for path in folders)
    expected = load_model(base, folder, "cpu")
    recipe = SimpleNamespace(models={"x": ModelEntry(path=base, adapter=folder)})
    choice = ModelChoice(model=base, adapter=folder, device="cpu", dtype="float32")
    found = [choice.load()[0]]  # generate, chat, serve
    found.append(_loader(recipe, "cpu", "float32")("x").model)
    for model in found:
        assert model.spec == expected.spec
        assert default_strategy(model.spec) == "pipelined"
        assert torch.equal(model.logits(IDS), expected.logits(IDS))
    with pytest.raises(UsageError, match="eos 90 is the mask token"):
        replace(choice, eos=["90"]).load()
    for see in (inspect_model, load_model):
        with pytest.raises(CheckpointError, match=f"give the base model, '{HUB}', and pass this"):
            see(folder)


def test_a_tied_head_that_is_stored_is_no_other_model(tmp_path):
    save_adapter(adapted("llama", tie_word_embeddings=True), tmp_path / "a")
    base = tiny_model("llama", tie_word_embeddings=True)
    save_model(base, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    assert load_model(tmp_path / "m", tmp_path / "a", "cpu").spec.mask_token_id == 90
