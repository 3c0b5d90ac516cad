"""The small files of a GGUF as the hub would hold them, in a folder that lives with the process."""

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
"""In such a folder, what leads to the weights; nobody else's folder has a file of this name."""


def gguf_folder(file: Path) -> Path:
    """A folder with the small files that the hub would hold for a GGUF, and a link to it.

    It is made once in a process while the file does not change, and removed when the process ends.

    Raises:
        CheckpointError: The file is no GGUF, is broken, or its model is not supported. A tokenizer
            that is missing or unknown is no error before somebody wants it.
    """
    about = file.stat()
    # Links stay: caches keep files by their hashes, and messages name what the user gave.
    return _made(file.absolute(), about.st_size, about.st_mtime_ns)


def linked_gguf(folder: Path) -> Path | None:
    """The GGUF that holds the weights of a folder; None: it has files of its own."""
    link = folder / _LINK
    return link.readlink() if link.exists() else None


def hub_files(container: Container) -> dict[str, str]:
    """The small files of a model by their names.

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
    # Its last part is the file's name, so that messages about the folder tell which file it is.
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
        # A process that was forked from this one must not take the folder from it.
        if os.getpid() == owner:
            shutil.rmtree(root, ignore_errors=True)

    atexit.register(remove)
    return root
