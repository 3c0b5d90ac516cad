"""The warning of an adapter on another base model, and no false alarm."""

from __future__ import annotations

import json

import pytest

from d2f.errors import D2FWarning
from d2f.models.adapter_base import other_base
from d2f.models.checkpoint import load_model
from d2f.testing import write_adapter, write_checkpoint

HUB = "GSAI-ML/LLaDA-8B-Instruct"
CACHE = "hub/models--GSAI-ML--LLaDA-8B-Instruct/snapshots/0123abcd"


@pytest.mark.parametrize(
    ("base", "loaded"),
    [
        (None, "anything"),
        (HUB, HUB),
        (HUB, "gsai-ml/llada-8b-instruct"),
        (HUB, "mirror/LLaDA-8B-Instruct"),
        (HUB, "/data/models/LLaDA-8B-Instruct/"),
        (f"/home/somebody/{HUB}", HUB),
        (f"/home/somebody/{HUB}/", "./LLaDA-8B-Instruct"),
        (HUB, CACHE),
        (f"/root/.cache/huggingface/{CACHE}", HUB),
        ("C:\\models\\LLaDA-8B-Instruct", HUB),
        ("runs/teacher/final", "/mnt/runs/teacher/final"),
    ],
)
def test_the_same_model_by_another_name(tmp_path, base, loaded):
    assert other_base(base, loaded, tmp_path / "x") is None


@pytest.mark.parametrize(
    ("base", "loaded"),
    [
        (HUB, "GSAI-ML/LLaDA-8B-Base"),
        (HUB, "/data/models/LLaDA-8B-Base"),
        (HUB, "hub/models--GSAI-ML--LLaDA-8B-Base/snapshots/0123abcd"),
        ("runs/teacher/final", "runs/autoregressive/final"),
        ("~nobody-of-this-name/model", HUB),
        ("a\0b", HUB),
        ("runs/teacher/checkpoint-100", "runs/teacher/checkpoint-200"),
    ],
)
def test_another_model(tmp_path, base, loaded):
    line = other_base(base, loaded, tmp_path / "x")
    assert f"'{base}'" in line
    assert f"'{loaded}'" in line
    assert "\n" not in line


def name_base(folder, base):
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"base_model_name_or_path": base}))


def test_folders_are_known_by_what_they_are(tmp_path, monkeypatch):
    model = write_checkpoint(tmp_path / "some" / "model", "llada")
    (tmp_path / "link").symlink_to(model)
    assert other_base(str(model), tmp_path / "link", tmp_path / "link") is None
    assert other_base(str(tmp_path / "link"), model, model) is None
    monkeypatch.chdir(tmp_path)
    assert other_base("link", model, model) is None
    assert other_base(HUB, model, model) is not None
    # transformers 4 noted where a model came from.
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"_name_or_path": HUB}))
    assert other_base(HUB, model, model) is None


def test_loading_warns_once_and_loads(tmp_path):
    model, adapter = (
        write_checkpoint(tmp_path / "m", "llada"),
        write_adapter(tmp_path / "a", "llada"),
    )
    load_model(model, adapter, "cpu")  # names no base model, and warnings are errors here
    name_base(adapter, None)
    load_model(model, adapter, "cpu")
    name_base(adapter, "other/m")
    load_model(model, adapter, "cpu")
    name_base(adapter, HUB)
    with pytest.warns(D2FWarning, match="was trained on 'GSAI-ML/LLaDA-8B-Instruct'") as caught:
        load_model(model, adapter, "cpu")
    assert len(caught) == 1
