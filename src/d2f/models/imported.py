"""A GGUF file as a folder of the hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2f.errors import CheckpointError
from d2f.gguf import NO_TOKENIZER
from d2f.gguf.container import read_container
from d2f.gguf.folder import hub_files
from d2f.hub import expanded, resolve_folder
from d2f.models import checkpoint, storage

IMPORT_FILE = "import.json"
"""File in an imported folder that says from what, and by what types, it was imported."""
_SHARD_BYTES = 2 << 30
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def import_gguf(
    file: str | Path,
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the model of a GGUF as the hub holds models: JSON files, tokenizer, safetensors.

    The folder appears when it is complete. What this function wrote before is replaced; files that
    somebody added, such as the original tokenizer where the GGUF has none, stay. Memory holds 2 GiB
    of weights at a time.

    Args:
        file: A GGUF of the Llama or Qwen2 layout.
        folder: A new or empty folder, or one that was imported before.
        dtype: Of the weights; None: as `load_model` takes it.
        on_bytes: Told how many bytes of how many have been read.

    Returns:
        What import.json in the folder says: the file's name, layout and block types, the dtype.

    Raises:
        CheckpointError: The file is broken or of another kind, or the folder holds other things or
            cannot be written.
        ConfigError: `dtype` is unknown.
    """
    file, folder = expanded(file), expanded(folder)
    wanted = checkpoint.resolve_dtype(dtype)
    if file.is_dir():
        raise CheckpointError(f"'{file}' is a folder, which needs no import; give a GGUF file")
    source = resolve_folder(file)
    spec = checkpoint.read_spec(source)
    stored = checkpoint.match_headers(source, spec)
    kept = wanted or checkpoint.main_dtype(stored)
    _check_target(folder)
    small = hub_files(read_container(file))
    about = {
        "file": file.name,
        "layout": spec.architecture.name,
        "blocks": block_counts(stored),
        "dtype": str(kept).removeprefix("torch."),
    }
    tokenizer = [name for name in _TOKENIZER_FILES if NO_TOKENIZER not in small]
    total, done = sum(tensor.num_bytes for tensor in stored.values()), 0

    def read(name: str) -> Tensor:
        nonlocal done
        values = storage.read_tensor(stored[name], torch.device("cpu"), kept)
        done += stored[name].num_bytes
        if on_bytes is not None:
            on_bytes(done, total)
        return values

    owned = (*checkpoint.OWNED, storage.GENERATION_FILE, IMPORT_FILE, *tokenizer)
    with storage.replaced_folder(folder, owned) as new:
        for name, text in small.items():
            if name != NO_TOKENIZER:
                (new / name).write_text(text, encoding="utf-8")
        config = storage.read_json(new / "config.json") | {"torch_dtype": about["dtype"]}
        storage.write_json(new / "config.json", config)
        sizes = {n: t.num_bytes // t.dtype.itemsize * kept.itemsize for n, t in stored.items()}
        checkpoint.write_weights(new, sizes, read, _SHARD_BYTES)
        storage.write_json(new / IMPORT_FILE, about)
    return about | {"no_tokenizer": small.get(NO_TOKENIZER)}


def block_counts(stored: Mapping[str, storage.StoredTensor]) -> dict[str, dict[str, int]]:
    """Tensors, numbers and bytes by block type, that of most bytes first; empty without a GGUF."""
    counts: dict[str, Counter[str]] = {}
    for tensor in stored.values():
        if tensor.in_gguf is not None:
            source = tensor.in_gguf.source
            count = counts.setdefault(source.type.name, Counter())
            count.update(tensors=1, numbers=source.num_values, bytes=source.num_bytes)
    return {
        name: dict(count)
        for name, count in sorted(counts.items(), key=lambda item: -item[1]["bytes"])
    }


def _check_target(folder: Path) -> None:
    try:
        used = folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"'{folder}' cannot be read: {error.strerror or error}") from None
    if used and not (folder / IMPORT_FILE).exists():
        raise CheckpointError(
            f"'{folder}' is not empty and was not made by an import; give a new folder"
        )
