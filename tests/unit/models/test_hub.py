"""Folders and hub ids, without a network."""

from __future__ import annotations

import huggingface_hub
import pytest

from d2f.errors import CheckpointError
from d2f.hub import resolve_folder


def test_hub_id_fetches_no_code_and_no_pickles(monkeypatch, tmp_path):
    asked = {}

    def fake(name, **options):
        asked.update(name=name, **options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert resolve_folder("owner/name") == tmp_path
    assert asked["name"] == "owner/name"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith(("py", "bin", "pt")) for pattern in asked["allow_patterns"])
    resolve_folder("owner/name", weights=False)
    assert "*.safetensors" not in asked["allow_patterns"]


def test_a_folder_wins_over_a_hub_id(monkeypatch, tmp_path):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("owner/name").is_dir()


def test_hub_failures_are_one_line(monkeypatch):
    def fail(*_, **__):
        raise OSError("401 Client Error.\nRepository Not Found for url: x")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        CheckpointError, match=r"no folder 'owner/name' here.*401 Client Error"
    ) as e:
        resolve_folder("owner/name")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name", ["model", "a/b/c", "./owner/name", "/owner/name", "owner/", "a b/c"]
)
def test_what_is_no_hub_id_is_not_asked_for(monkeypatch, name):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub")
    )
    with pytest.raises(CheckpointError, match="give a folder or a hub id"):
        resolve_folder(name)
