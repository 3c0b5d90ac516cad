"""`d2f inspect` reads headers only and says what is there."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from d2f.cli.inspect import inspect_command, inspect_model
from d2f.diffusion.policy import DecodingPolicy
from d2f.errors import CheckpointError
from d2f.models import storage
from d2f.shipped import shipped_model
from d2f.testing import tiny_spec, write_adapter, write_checkpoint, write_tokenizer


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    monkeypatch.setattr(storage, "read_tensor", lambda *a, **k: pytest.fail("read a weight"))


def run(*arguments):
    app = typer.Typer()
    app.command()(inspect_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_report(tmp_path):
    folder = write_checkpoint(tmp_path / "m", "Dream", dtype=torch.bfloat16, max_shard_bytes=20_000)
    adapter = write_adapter(tmp_path / "a", "Dream", policy=DecodingPolicy(block_size=16))
    report = inspect_model(folder, adapter)
    spec = tiny_spec("Dream")
    assert report["architecture"] == "Dream"
    assert report["parameters"] == spec.num_parameters
    assert report["dtype"] == "bfloat16"
    assert report["sizes"]["num_kv_heads"] == 2
    assert report["token_ids"] == {"mask": 94, "eos": [95], "bos": None, "pad": 95}
    assert report["adapter"]["r"] == 4
    assert report["adapter"]["targets"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert report["recommended_policy"]["block_size"] == 16
    assert report["memory"]["weights_bf16_bytes"] == 2 * spec.num_parameters
    # 2 layers, keys and values, 2 heads of 8 numbers, 2 bytes each.
    assert report["memory"]["kv_bf16_bytes_per_token"] == 2 * 2 * 2 * 8 * 2
    assert sum(file["tensors"] for file in report["files"]) == 2 * 12 + 3
    assert len(report["files"]) > 1


def test_command(tmp_path):
    folder = write_checkpoint(tmp_path, "qwen2")
    result = run(folder, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == inspect_model(str(folder))
    text = run(folder).stdout
    for part in ("qwen2, decodes autoregressively", "float32", "model.safetensors", "KV cache"):
        assert part in text


def test_it_says_what_the_chat_template_leaves_out(tmp_path):
    report = inspect_model(shipped_model("teacher"))
    assert report["tokenizer"]["chat_template"] == {"leaves_out": ["system", "history"]}
    line = " ".join(run(shipped_model("teacher")).stdout.split())
    assert "leaves out system messages and all before the user's last message" in line
    folder = write_checkpoint(tmp_path, "llada", tokenizer=True)
    assert inspect_model(folder)["tokenizer"]["chat_template"] is None
    template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    write_tokenizer(folder, chat_template=template)
    assert inspect_model(folder)["tokenizer"]["chat_template"] == {"leaves_out": []}


def test_ends_are_told_with_their_sources(tmp_path):
    folder = write_checkpoint(tmp_path, "llada", tokenizer=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": [34, 96]}')
    ends = json.loads(run(folder, "--json").stdout)["ends"]
    assert [(end["id"], end["text"], end["sources"], end["has_row"]) for end in ends] == [
        (95, "<|endoftext|>", ["config.json", "tokenizer's EOS", "padding"], True),
        (34, "A", ["generation_config.json"], True),
        (96, None, ["generation_config.json"], False),
    ]
    text = " ".join(run(folder).stdout.split())
    assert "ends at 95 '<|endoftext|>' (config.json, tokenizer's EOS, padding)" in text
    assert "34 'A' (generation_config.json)" in text
    assert "96 (generation_config.json; left out: the model has no row for it)" in text


def test_a_tokenizer_is_told_of(tmp_path):
    folder = write_checkpoint(tmp_path, "qwen2")
    assert inspect_model(folder)["tokenizer"] is None
    write_tokenizer(folder, chat_template="{{ messages }}")
    size = tiny_spec("qwen2").vocab_size
    expected = {"num_tokens": size, "chat_template": {"leaves_out": []}, "error": None}
    assert inspect_model(folder)["tokenizer"] == expected
    assert f"{size} tokens, a chat template" in run(folder).stdout
    (folder / "special_tokens_map.json").write_text('{"sep_token": "<sep>"}')
    assert "does not know 1 of them" in " ".join(run(folder).stdout.split())


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tokenizer.json", "{", "tokenizer.json is no tokenizer that can be read"),
        ("tokenizer.json", None, "holds no tokenizer"),
        ("tokenizer_config.json", "[", "cannot be read as JSON"),
        ("added_tokens.json", '{"<x>": 900}', "should have id 900"),
        ("chat_template.jinja", "{% if %}", "the chat template is broken"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_broken_tokenizer_is_told_of(tmp_path, file, content, reason, as_json):
    folder = write_checkpoint(tmp_path, "qwen2", tokenizer=True)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    result = run(folder, *(["--json"] if as_json else []))
    assert result.exit_code == 1
    if as_json:
        assert reason in json.loads(result.stdout)["tokenizer"]["error"]
    else:
        text = " ".join(result.stdout.split())
        assert "tokenizer cannot be used" in text
        assert reason.replace(" ", "") in text.replace(" ", "")
        assert "file model.safetensors" in text


def test_wrong_folders(tmp_path):
    folder = write_checkpoint(tmp_path / "m", "llada")
    with pytest.raises(CheckpointError, match="an adapter for another model"):
        inspect_model(folder, write_adapter(tmp_path / "a", "llama"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated"):
        inspect_model(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="neither model"):
        inspect_model(folder)


def test_a_hub_id_fetches_no_weights(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, "llada", max_shard_bytes=20_000)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    report = inspect_model("owner/name")
    assert report["parameters"] == tiny_spec("llada").num_parameters
    assert report["dtype"] is None
    assert report["files"] is None
