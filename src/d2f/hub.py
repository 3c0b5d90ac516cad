"""Find the folder of a model, an adapter or a tokenizer, whatever the name stands for.

The name may be a local path, a hub id, a shipped model (`shipped:student`) or a GGUF file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from d2f.errors import CheckpointError
from d2f.shipped import named_folder

_GGUF = ".gguf"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def is_hub_id(name: str) -> bool:
    """Return whether a text has the form of a hub id, `owner/name`."""
    return _HUB_ID.fullmatch(name) is not None


def expanded(path: str | Path) -> Path:
    """Return the path with `~` replaced by the home folder; unchanged if the user is unknown.

    Example:
        >>> str(expanded("~no.such.user/model"))
        '~no.such.user/model'
    """
    return Path(os.path.expanduser(path))  # Path's own raises there


def resolve_folder(path_or_hub_id: str | Path, *, weights: bool = True) -> Path:
    """Return the local folder that a path, a hub id or a name such as `shipped:student` means.

    For a GGUF file the result is a folder with the small files that the hub would hold for its
    model. A folder that exists wins over a hub id of the same name, and over a shipped model. Of a
    hub repository only configuration, tokenizer and safetensors files are fetched, never code or
    pickles; with `weights=False` the safetensors files are left out.

    Raises:
        CheckpointError: The folder does not exist; the hub does not give it (offline, unknown or
            private); or a GGUF file is broken or not supported.

    Example:
        >>> resolve_folder("/no/such/folder")
        Traceback (most recent call last):
        ...
        d2f.errors.CheckpointError: there is no folder '/no/such/folder'; give a folder or a hub \
id like owner/name
    """
    path, name = expanded(path_or_hub_id), str(path_or_hub_id)
    if path.is_dir() and name:
        return path
    if path.exists() and name:
        return _folder_of_file(path)
    if path.suffix.lower() == _GGUF:
        raise CheckpointError(f"there is no file '{name}'; check the path")
    shipped = named_folder(name)
    if shipped is not None:
        return shipped
    if isinstance(path_or_hub_id, Path) or not is_hub_id(name):
        raise CheckpointError(
            f"there is no folder '{name}'; give a folder or a hub id like owner/name"
        )
    # Imported here: the import takes a fifth of a second, and local folders do not need it.
    from huggingface_hub import snapshot_download

    patterns = [*_TEXT_FILES, "*.safetensors"] if weights else _TEXT_FILES
    try:
        # Patterns match across slashes, so subfolders are excluded: they hold other formats.
        folder = snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"])
    except Exception as error:  # the client's errors share no base across versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"there is no folder '{name}' here, and the hub does not give it: "
            f"{reason.rstrip('.')}. Check the name, the network and, for private or gated models, "
            "your hub login"
        ) from error
    return Path(folder)


def _folder_of_file(file: Path) -> Path:
    """Return the folder that stands for a GGUF file; refuse any other file."""
    # Imported here: models in folders do not need it.
    from d2f.gguf.container import is_gguf
    from d2f.gguf.folder import gguf_folder

    if not file.is_file():  # opening a pipe would wait for its writer
        raise CheckpointError(f"'{file}' is neither a folder nor a usual file; give one of these")
    if is_gguf(file):
        return gguf_folder(file)
    raise CheckpointError(f"'{file}' is a file; give the folder that holds it, or a GGUF file")
