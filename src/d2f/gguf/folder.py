"""Temporary folders with the small files (config, tokenizer) that the hub would hold for a GGUF."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

from d2f.errors import CheckpointError
from d2f.gguf import NO_TOKENIZER
from d2f.gguf.config import generation_config, model_config
from d2f.gguf.container import Container, read_container
from d2f.gguf.vocabulary import REMEDY, has_tokenizer, tokenizer_files

_LINK = "d2f-weights.gguf"
"""Name of the link to the GGUF in its folder; folders from elsewhere have no such file."""


def gguf_folder(file: Path) -> Path:
    """Return a folder with the small files that the hub would hold for a GGUF, and a link to it.

    A process makes the folder once per file and version of it, and removes it when the process
    ends.

    Raises:
        CheckpointError: The file is not a GGUF or is broken, or its model is not supported. A
            missing or unknown tokenizer is reported only when the tokenizer is loaded.
    """
    about = file.stat()
    # Links are not resolved: caches name files by hash, and messages name the user's path.
    return _made(file.absolute(), about.st_size, about.st_mtime_ns)


def linked_gguf(folder: Path) -> Path | None:
    """Return the GGUF with the weights of a folder; None if the folder holds its own weights."""
    link = folder / _LINK
    return link.readlink() if link.exists() else None


def hub_files(container: Container) -> dict[str, str]:
    """Return the texts of a model's small files by their names.

    Raises:
        CheckpointError: The model is not supported.
    """
    files = {"config.json": _written(model_config(container))}
    generation = generation_config(container)
    if generation is not None:
        files["generation_config.json"] = _written(generation)
    if not has_tokenizer(container):
        why = f"{container.file} holds no tokenizer; {REMEDY}"
        return files | {NO_TOKENIZER: why}
    try:
        return files | tokenizer_files(container)
    except CheckpointError as error:
        return files | {NO_TOKENIZER: str(error)}


def _written(content: object) -> str:
    return json.dumps(content, indent=2) + "\n"


@functools.lru_cache(maxsize=8)
def _made(file: Path, size: int, changed: int) -> Path:
    files = hub_files(read_container(file))
    # The last part of the path is the GGUF's name, so that messages about the folder name it.
    folder = Path(tempfile.mkdtemp(dir=_root())) / file.name
    folder.mkdir()
    for small, text in files.items():
        (folder / small).write_text(text, encoding="utf-8")
    (folder / _LINK).symlink_to(file)
    return folder


@functools.cache
def _root() -> Path:
    root, owner = Path(tempfile.mkdtemp(prefix="d2f-gguf-")), os.getpid()

    def remove() -> None:
        # A forked process ends with the same handler, and must not remove its parent's folder.
        if os.getpid() == owner:
            shutil.rmtree(root, ignore_errors=True)

    atexit.register(remove)
    return root
