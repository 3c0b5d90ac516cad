"""Commands choose a strategy and a length by themselves, and say a word about an adapter."""

from __future__ import annotations

import json

import pytest

from d2f.diffusion.policy import DecodingPolicy
from d2f.testing import write_adapter, write_checkpoint


@pytest.fixture
def plain(tmp_path):
    """A diffusion model that was not distilled and names the length of its answers."""
    folder = write_checkpoint(tmp_path / "plain", "llada", tokenizer=True)
    (folder / "generation_config.json").write_text('{"max_new_tokens": 20}')
    return folder


def answer(d2f, *options):
    done = d2f("generate", "1+1=", "--json", *options)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    return report["token_ids"], report["num_forwards"]


def test_generate(d2f, plain, tmp_path):
    model = ("--model", plain)
    own = answer(d2f, *model)
    limit = ("--max-new-tokens", 20)
    assert own == answer(d2f, *model, *limit, "--strategy", "vanilla")
    assert own != answer(d2f, *model, *limit, "--strategy", "pipelined")
    assert answer(d2f, *model, "--block-size", 8) == answer(
        d2f, *model, *limit, "--strategy", "pipelined", "--block-size", 8
    )
    adapter = ("--adapter", write_adapter(tmp_path / "a", "llada"))
    assert answer(d2f, *model, *adapter) == answer(
        d2f, *model, *adapter, *limit, "--strategy", "pipelined"
    )


def test_chat(d2f, plain):
    done = d2f("chat", "--model", plain, stdin="/strategy\n1+1=\n")
    assert "strategy vanilla" in done.err
    assert done.code == 0
    distilled = write_checkpoint(
        plain.parent / "d", "llada", tokenizer=True, policy=DecodingPolicy(block_size=8)
    )
    assert "strategy pipelined" in d2f("chat", "--model", distilled, stdin="/strategy\n").err


def test_inspect(d2f, plain, tmp_path):
    adapter = write_adapter(tmp_path / "a", "llada")
    for options, strategy in (((), "vanilla"), (("--adapter", adapter), "pipelined")):
        report = json.loads(d2f("inspect", plain, "--json", *options).out)
        assert (report["strategy"], report["max_new_tokens"]) == (strategy, 20)
        assert f"{strategy}, at most 20 new tokens" in d2f("inspect", plain, *options).out


def test_an_adapter_of_another_model_is_one_line_of_warning(d2f, plain, tmp_path):
    adapter = write_adapter(tmp_path / "a", "llada")
    options = ("generate", "1+1=", "--model", plain, "--adapter", adapter)
    assert "warning" not in d2f(*options).err
    file = adapter / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"base_model_name_or_path": "owner/another"}))
    done = d2f(*options)
    assert done.code == 0
    [line] = [line for line in done.err.splitlines() if "warning" in line]
    assert line.startswith("warning: the adapter was trained on 'owner/another'")
    file.write_text(json.dumps(values | {"base_model_name_or_path": "owner/Plain"}))
    assert "warning" not in d2f(*options).err
