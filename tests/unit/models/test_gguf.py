"""Models from GGUF files: their numbers, and what is refused."""

from __future__ import annotations

import os
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.unit.gguf_files import SIZES, tiny, write_gguf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from d2f.errors import CheckpointError
from d2f.gguf import block_types
from d2f.gguf.config import llama3_factors, rope_scaling
from d2f.gguf.container import Container, GGUFTensor, read_container
from d2f.hub import resolve_folder
from d2f.models.adapter_base import other_base
from d2f.models.checkpoint import load_model, match_headers, read_spec
from d2f.models.storage import read_tensor
from d2f.testing import write_checkpoint
from d2f.text import Tokenizer

IDS = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))
KINDS = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
    "Q4_K", "Q6_K", "Q5_K", "Q2_K", "Q3_K",
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

ROPE_CONFIG = transformers.LlamaConfig()


def assert_same(ours, their_model):
    with torch.no_grad():
        raw_BLV = their_model(IDS).logits
    torch.testing.assert_close(ours.logits(IDS)[:, 1:], raw_BLV[:, :-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_logits_are_those_of_transformers_own_reading(tmp_path, family, tied):
    # Each matrix is of another block type.
    kinds = KINDS if family == "Llama" else KINDS[::-1]
    model = tiny(family, tie_word_embeddings=tied)
    file = write_gguf(tmp_path / "m.gguf", model, kinds=kinds)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    ours = load_model(file, device="cpu")
    assert ours.spec.tie_embeddings == tied
    assert ours.spec.eos_token_ids == (2,)
    assert ours.dtype == torch.float32
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_numbers_are_the_original_in_their_own_type(tmp_path, kind, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf", tiny("Llama"), kinds=(kind,))
    monkeypatch.setitem(sys.modules, "gguf", None)  # which is not needed for these
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    ours = load_model(file, device="cpu")
    assert {p.dtype for p in ours.parameters()} == {dtype}
    if kind == "F32":
        assert_same(ours, tiny("Llama"))
    assert load_model(file, device="cpu", dtype="float16").dtype == torch.float16


@pytest.mark.parametrize("rope", [LLAMA3, LLAMA3 | {"factor": 32.0}])
def test_llama3_scaling_is_read_from_its_tensor(tmp_path, rope):
    model = tiny("Llama", rope_parameters=rope, head_dim=64)
    frequencies = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    factors = {"rope_freqs.weight": llama3_factors(rope, frequencies)}
    file = write_gguf(tmp_path / "m.gguf", model, tensors=factors)
    assert read_spec(resolve_folder(file)).rope_scaling == {
        name: value for name, value in rope.items() if name != "rope_theta"
    }
    assert_same(load_model(file, device="cpu"), model)


@settings(max_examples=40, deadline=None)
@given(
    factor=st.floats(1.5, 64),
    low=st.floats(0.5, 4),
    ratio=st.floats(1.5, 8),
    length=st.sampled_from([1024, 8192, 32768]),
    told=st.booleans(),
    head_dim=st.sampled_from([64, 128]),
    theta=st.sampled_from([10000.0, 500000.0]),
)
# The largest factors, of the lowest frequencies, differ in their last digits.
@example(factor=63.0, low=1.0, ratio=2.0, length=1024, told=False, head_dim=128, theta=10000.0)
def test_any_scaling_of_this_kind_gives_its_frequencies_back(
    tmp_path_factory, factor, low, ratio, length, told, head_dim, theta
):
    rope = {"factor": factor, "low_freq_factor": low, "high_freq_factor": low * ratio}
    rope |= {"rope_theta": theta, "original_max_position_embeddings": length}
    ROPE_CONFIG.head_dim = head_dim
    ROPE_CONFIG.rope_parameters = rope | {"rope_type": "llama3"}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](ROPE_CONFIG, torch.device("cpu"))
    plain = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    file = tmp_path_factory.getbasetemp() / "factors"
    (plain / scaled).numpy().astype("<f4").tofile(file)
    kind = block_types.block_type(0, "")
    tensor = GGUFTensor(
        file=file, name="rope_freqs.weight", shape=(head_dim // 2,), type=kind, offset=0
    )
    metadata = {"general.architecture": "llama"}
    metadata |= {"llama.rope.scaling.original_context_length": length} if told else {}
    container = Container(file=file, metadata=metadata, tensors={tensor.name: tensor})
    try:
        found = rope_scaling(container, theta, head_dim)
    except CheckpointError:
        # Fewer than two frequencies lie in the part that tells where it begins and ends.
        inside = (plain / scaled > 1.001) & (plain / scaled < factor * 0.999)
        assert inside.sum() < 3
        return
    ours = plain.numpy() / llama3_factors(found, plain.double().numpy())
    np.testing.assert_allclose(ours, scaled.numpy(), rtol=2e-3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file of quantised blocks that is sound."""
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(folder / "m.gguf", tiny("Llama"), kinds=("Q8_0", "Q4_1"))


def refused(file, *parts):
    with pytest.raises(CheckpointError) as error:
        load_model(file, device="cpu")
    assert all(part in str(error.value) for part in (str(file), *parts)), str(error.value)
    assert "\n" not in str(error.value)


def test_wherever_a_file_is_cut_short_one_line_says_so(tmp_path, whole):
    content = whole.read_bytes()
    end = read_container(whole).tensors["token_embd.weight"].offset
    cuts = [*range(4, end, 97), *range(end, len(content) - 40, len(content) // 7)]
    for cut in cuts:
        file = tmp_path / "cut.gguf"
        file.write_bytes(content[:cut])
        refused(file, "cut short", "download it again")


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), bytes_=st.binary(min_size=1, max_size=4))
def test_a_damaged_header_is_read_or_refused(tmp_path_factory, whole, share, bytes_):
    content = bytearray(whole.read_bytes())
    end = read_container(whole).tensors["token_embd.weight"].offset
    at = 4 + int(share * (end - 8))
    content[at : at + len(bytes_)] = bytes_
    file = tmp_path_factory.getbasetemp() / "damaged.gguf"
    file.write_bytes(content)
    with suppress(CheckpointError):
        folder = resolve_folder(file)
        match_headers(folder, read_spec(folder))


ENTRIES = [
    *(f"llama.{name}" for name in (
        "block_count", "context_length", "embedding_length", "attention.head_count",
        "attention.key_length", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
        "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "expert_count",
    )),
    *(f"tokenizer.ggml.{name}" for name in (
        "model", "pre", "tokens", "token_type", "merges", "scores", "unknown_token_id",
        "eos_token_id",
    )),
    "general.type", "general.alignment", "split.count", "tokenizer.chat_template",
]  # fmt: skip
VALUES = [
    True, 0, 3, 2**32 - 1, 0.0, 1.5, float("nan"), float("inf"), "", "x", [0, 1], ["a", "b"],
    [1.5], [[1], [2]],
]  # fmt: skip


@pytest.fixture(scope="module")
def small_model():
    return tiny("Llama", num_hidden_layers=1, hidden_size=64, intermediate_size=64)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["gpt2", "llama"]),
    name=st.sampled_from(ENTRIES),
    value=st.sampled_from(VALUES),
)
def test_metadata_of_any_type_are_read_or_refused(tmp_path_factory, small_model, kind, name, value):
    entries = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*"abc", "ab", *(f"<{i}>" for i in range(92))],
        "tokenizer.ggml.token_type": [1] * 96,
        "tokenizer.ggml.scores": [-1.0] * 96,
        "tokenizer.ggml.merges": ["a b"],
    }
    file = tmp_path_factory.getbasetemp() / "typed.gguf"
    write_gguf(file, small_model, metadata=entries | {name: value})
    for load in (lambda: load_model(file, device="cpu"), lambda: Tokenizer.load(file)):
        with suppress(CheckpointError):
            load()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("llama.rope.freq_base", "x" * 999, "not a number"),
        ("llama.rope.freq_base", float("nan"), "is nan, not a number"),
        ("tokenizer.ggml.tokens", [1, 2], r"is \[1, 2\], not a list of texts"),
        ("tokenizer.chat_template", ["a"], "not a text"),
    ],
)
def test_an_entry_of_another_type_is_named_with_its_value(tmp_path, small_model, name, value, told):
    file = write_gguf(tmp_path / "m.gguf", small_model, metadata={name: value})
    with pytest.raises(CheckpointError, match=f"{name} .*{told}; download it again") as error:
        load_model(file, device="cpu")
    assert len(str(error.value)) < len(str(file)) + 200


def test_lists_in_lists_without_end_are_refused(tmp_path):
    header = b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 9)
    (tmp_path / "m.gguf").write_bytes(header + struct.pack("<IQ", 9, 1) * 5000 + bytes(40))
    refused(tmp_path / "m.gguf", "nest too deeply")


BROKEN = {
    "text": (b"hello, I am a text of some length", "is no GGUF", "b'hell'"),
    "empty": (b"", "is no GGUF", "it is empty"),
    "ggml": (b"tjgg" + bytes(40), "before GGUF (ggjt)", "convert the original model"),
    "version 1": (b"GGUF\x01\0\0\0" + bytes(40), "version 1", "convert the original model again"),
    "version 9": (b"GGUF\x09\0\0\0" + bytes(40), "version 9", "update d2f"),
    "big endian": (b"GGUF\0\0\0\x03" + bytes(40), "big-endian", "gguf-convert-endian"),
    "huge count": (b"GGUF\x03\0\0\0" + b"\xff" * 40, "cut short"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_such_file_is_refused_by_what_it_is(tmp_path, case):
    content, *parts = BROKEN[case]
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf", *parts)


REFUSED = {
    "gemma": ({"layout": "gemma"}, "unknown GGUF layout 'gemma'", "Known: llama, qwen2"),
    "qwen3": ({"layout": "qwen3"}, "unknown GGUF layout 'qwen3'"),
    "experts": ({"metadata": {"llama.expert_count": 8}}, "8 experts"),
    "adapter": ({"metadata": {"general.type": "adapter"}}, "LoRA adapter", "PEFT"),
    "split": ({"metadata": {"split.count": 2, "split.no": 0}}, "part 1 of 2", "--merge"),
    "no layers": ({"metadata": {"llama.block_count": None}}, "lack llama.block_count"),
    "by layer": (
        {"metadata": {"llama.attention.head_count_kv": [2, 1]}},
        "head_count_kv is [2, 1]",
    ),
    "yarn": ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "scaled by 'yarn'"),
    "longrope": ({"tensors": {"rope_factors_long.weight": [1.0]}}, "rope_factors_long.weight"),
    "factors": ({"tensors": {"rope_freqs.weight": range(1, 33)}}, "not those of Llama 3"),
    "partial": ({"metadata": {"llama.rope.dimension_count": 16}}, "dimension_count is 16"),
    "window": ({"metadata": {"llama.attention.sliding_window": 64}}, "sliding_window is 64"),
    "scale": ({"metadata": {"llama.logit_scale": 0.5}}, "llama.logit_scale is 0.5"),
    "norms": ({"tensors": {"blk.0.attn_q_norm.weight": [1.0]}}, "blk.0.attn_q_norm.weight"),
    "bias": ({"tensors": {"blk.1.attn_q.bias": [1.0] * 256}}, "blk.1.attn_q.bias"),
    "layers": ({"metadata": {"llama.block_count": 1 << 31}}, "tensors of 2 layers", "2147483648"),
    "eos": ({"metadata": {"tokenizer.ggml.eos_token_id": 500}}, "eos_token_id is 500"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_by_name(tmp_path, case):
    options, *parts = REFUSED[case]
    model = None if "layout" in options else tiny("Llama")
    file = write_gguf(tmp_path / "m.gguf", model, **options)
    with pytest.raises(CheckpointError) as error:
        load_model(file, device="cpu")
    assert all(part in str(error.value) for part in ("m.gguf", *parts)), str(error.value)


@pytest.mark.parametrize(("number", "told"), [(99, "block type 99"), (9, "block type Q8_1")])
def test_unknown_block_types_are_refused_by_name(tmp_path, whole, number, told):
    content = bytearray(whole.read_bytes())
    name = b"blk.0.attn_v.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    content[at : at + 4] = number.to_bytes(4, "little")
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf", "tensor blk.0.attn_v.weight", told, "pip install -U gguf")


def test_without_the_package_blocks_are_refused_and_the_remedy_is_named(whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    block_types._quantised.cache_clear()
    fresh = shutil.copy(whole, whole.with_name("other.gguf"))
    with pytest.raises(CheckpointError, match=r"need the package gguf: pip install 'd2f\[gguf\]'"):
        load_model(fresh, device="cpu")


def test_a_file_is_found_by_its_name_or_its_begin(tmp_path, whole):
    blob = shutil.copy(whole, tmp_path / "sha256-0123")  # as ollama calls them
    assert load_model(blob, device="cpu").spec == load_model(whole, device="cpu").spec
    refused(tmp_path / "none.gguf", "there is no file", "none.gguf")
    with pytest.raises(CheckpointError, match=r"there is no file 'owner/name\.gguf'"):
        load_model("owner/name.gguf")


@pytest.mark.parametrize("suffix", ["", ".Q4_1", "-Q4_K_M", ".IQ2_XXS", "-f16", ".BF16"])
def test_an_adapter_knows_its_base_by_the_name_of_the_file(tmp_path, whole, suffix):
    file = shutil.copy(whole, tmp_path / f"SmolLM2-135M-Instruct{suffix}.gguf")
    base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert other_base(base, file, resolve_folder(file)) is None
    assert other_base("HuggingFaceTB/SmolLM2-360M", file, resolve_folder(file)) is not None


def test_a_file_without_tokenizer_is_a_model_all_the_same(whole):
    assert load_model(whole, device="cpu").spec.vocab_size == SIZES["vocab_size"]
    with pytest.raises(CheckpointError, match=r"m\.gguf holds no tokenizer; import the file"):
        Tokenizer.load(whole)


def test_a_folder_of_files_is_answered_with_one_of_them(tmp_path, whole):
    shutil.copy(whole, tmp_path / "b.gguf")
    refused(tmp_path, "holds GGUF files", str(tmp_path / "b.gguf"))


def test_errors_name_the_file_and_not_the_folder_that_stands_for_it(tmp_path, small_model):
    file = tmp_path / "m.gguf"
    entries = {
        "llama.feed_forward_length": "the weights do not fit the metadata: 3 wrongly shaped",
        "llama.attention.head_count": "heads cannot share",
        "tokenizer.ggml.eos_token_id": "the vocabulary holds 0 to 95",
    }
    for name, told in entries.items():
        write_gguf(file, small_model, metadata={name: 97 if "eos" in name else 3})
        with pytest.raises(CheckpointError) as error:
            load_model(file, device="cpu")
        assert str(error.value).startswith(f"{file}: ")
        assert told in str(error.value)
    write_gguf(file, small_model)
    with pytest.raises(CheckpointError) as error:
        load_model(file, adapter=file, device="cpu")
    assert str(error.value).startswith(f"{file} holds a whole model")


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(tmp_path / "pipe.gguf", "neither a folder nor a usual file")


def test_a_link_is_called_as_the_user_calls_it(tmp_path, whole):
    (tmp_path / "blobs").mkdir()
    shutil.copy(whole, tmp_path / "blobs" / "0123")
    (tmp_path / "Some-Model.Q4_0.GGUF").symlink_to("blobs/0123")
    folder = resolve_folder(tmp_path / "Some-Model.Q4_0.GGUF")
    assert other_base("owner/Some-Model", folder, folder) is None
    (name,) = {tensor.file.name for tensor in match_headers(folder, read_spec(folder)).values()}
    assert name == "Some-Model.Q4_0.GGUF"


def test_threads_may_ask_for_the_same_file_at_once(tmp_path, whole):
    (tmp_path / "again").mkdir()
    files = [shutil.copy(whole, tmp_path / x / "m.gguf") for x in (".", "again")] * 3
    with ThreadPoolExecutor(6) as threads:
        specs = list(threads.map(lambda file: read_spec(resolve_folder(file)), files))
    assert all(spec == specs[0] for spec in specs)


def test_a_gguf_beside_a_models_own_weights_is_not_taken_for_them(tmp_path, whole):
    folder = write_checkpoint(tmp_path / "own", "llama")
    shutil.copy(whole, folder / "model.gguf")
    assert load_model(folder, device="cpu").spec.hidden_size != SIZES["hidden_size"]


def test_a_file_that_changes_is_read_anew(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", tiny("Llama"))
    assert load_model(file, device="cpu").spec.num_layers == 2
    write_gguf(file, tiny("Llama", num_hidden_layers=1))
    assert load_model(file, device="cpu").spec.num_layers == 1


def test_a_tensor_comes_in_parts_of_few_numbers(whole, monkeypatch):
    folder = resolve_folder(whole)
    stored = match_headers(folder, read_spec(folder))["model.layers.0.self_attn.k_proj.weight"]
    cpu = torch.device("cpu")
    expected = read_tensor(stored, cpu)
    rows = []
    real = gguf.dequantize
    monkeypatch.setattr(
        gguf, "dequantize", lambda data, kind: (rows.append(len(data)), real(data, kind))[1]
    )
    monkeypatch.setattr("d2f.gguf.tensors._PART", 256 * 3)
    assert torch.equal(read_tensor(stored, cpu), expected)
    assert sum(rows) == 128
    assert max(rows) == 3
