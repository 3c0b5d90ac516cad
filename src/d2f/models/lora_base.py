"""Whether an adapter's base model is the one that was loaded, as far as names tell."""

from __future__ import annotations

import re
from pathlib import Path

from d2f.hub import expanded
from d2f.models.storage import read_json

_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
# What our own runs call their results; the folder above tells them apart.
_COMMON = re.compile(r"final|best|checkpoint-\d+")


def other_base(base_model: str | None, loaded: str | Path, folder: Path) -> str | None:
    """A line that warns of a base model other than the loaded one; None where names agree.

    The same model may lie under another path, so only the last part of a name counts, whatever its
    case. A model is known by the name it was asked for, its folder, the hub's id in the path of the
    hub's cache, and the name that transformers notes in config.json.

    Args:
        base_model: What adapter_config.json calls the base model; None: nothing.
        loaded: What the model was asked for: a folder or a hub id.
        folder: Where that is.

    Example:
        >>> other_base("GSAI-ML/LLaDA-8B-Instruct", "models/llada-8b-instruct/", Path("x")) is None
        True
        >>> other_base("GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-8B-Base", Path("x"))
        "the adapter was trained on 'GSAI-ML/LLaDA-8B-Instruct', and 'GSAI-ML/LLaDA-8B-Base' was \
loaded; if that is another model, answers are poor"
    """
    if base_model is None or _same_folder(base_model, folder):
        return None
    names = {_key(str(loaded)), _key(str(folder.resolve()))}
    if (folder / "config.json").exists():
        noted = read_json(folder / "config.json").get("_name_or_path")
        names |= {_key(noted)} if isinstance(noted, str) and noted else set()
    if _key(base_model) in names:
        return None
    return (
        f"the adapter was trained on '{base_model}', and '{loaded}' was loaded; if that is another "
        "model, answers are poor"
    )


def _same_folder(name: str, folder: Path) -> bool:
    try:
        return expanded(name).samefile(folder)
    except (OSError, ValueError):  # no such file, no name of a file
        return False


def _key(name: str) -> str:
    parts = [part for part in re.split(r"[/\\]", name.casefold()) if part not in ("", ".")]
    for part in reversed(parts):
        cached = _CACHED.fullmatch(part)
        if cached is not None:
            return cached["name"]
    last = parts[-1] if parts else ""
    return "/".join(parts[-2:]) if _COMMON.fullmatch(last) else last
