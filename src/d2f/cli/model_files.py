"""Hashes of a model's files, by which results and unfinished runs recognise the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_MODEL_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")


def weights_sha256(source: str, adapter: str | None) -> str:
    """Return the SHA-256 of a model's weight files and its adapter's, in order of their names."""
    from d2f.gguf.folder import linked_gguf
    from d2f.hub import resolve_folder

    paths: list[Path] = []
    for folder in map(resolve_folder, filter(None, (source, adapter))):
        gguf = linked_gguf(folder)
        paths += sorted(folder.glob("*.safetensors")) if gguf is None else [gguf]
    return _sha256(paths, named=False)


def model_sha256(source: str, adapter: str | None) -> str:
    """Return the SHA-256 of all files of a model and its adapter, and of their names."""
    from d2f.hub import expanded, resolve_folder

    paths: list[Path] = []
    for name in filter(None, (source, adapter)):
        path = expanded(name)
        if path.is_file():
            paths.append(path)
        else:
            files = resolve_folder(name).iterdir()
            paths += sorted(file for file in files if file.suffix in _MODEL_FILES)
    return _sha256(paths, named=True)


def _sha256(paths: Iterable[Path], *, named: bool) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if named:
            digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
