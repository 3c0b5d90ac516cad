"""Hashes of a model's files, by which results and unfinished runs recognise the model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

_MODEL_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")


def weights_sha256(source: str, adapter: str | None) -> str:
    """Return the SHA-256 of a model's weight files and its adapter's, in order of their names."""
    from d2f.gguf.folder import linked_gguf
    from d2f.hub import resolve_folder

    def files(name: str) -> Iterable[Path]:
        folder = resolve_folder(name)
        gguf = linked_gguf(folder)
        return sorted(folder.glob("*.safetensors")) if gguf is None else [gguf]

    return _sha256((source, adapter), files, named=False)


def model_sha256(source: str, adapter: str | None) -> str:
    """Return the SHA-256 of all files of a model and its adapter, and of their names."""
    from d2f.hub import expanded, resolve_folder

    def files(name: str) -> Iterable[Path]:
        path = expanded(name)
        if path.is_file():
            return [path]
        return sorted(one for one in resolve_folder(name).iterdir() if one.suffix in _MODEL_FILES)

    return _sha256((source, adapter), files, named=True)


def _sha256(
    names: Iterable[str | None], files: Callable[[str], Iterable[Path]], *, named: bool
) -> str:
    digest = hashlib.sha256()
    for name in filter(None, names):
        for path in files(name):
            if named:
                digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
