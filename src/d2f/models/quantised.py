"""Quantised checkpoints, which are refused by the name of their scheme."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from d2f.errors import CheckpointError
from d2f.models.storage import FLOATS, StoredTensor

_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fbgemm_fp8": "fp8",
}
"""`quant_method` of a config.json -> what people call it; others go by their own name."""
_SUFFIXES = {
    ".g_idx": "GPTQ",
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes, 8 bits",
    ".absmax": "bitsandbytes, 4 bits",
    ".weight_packed": "compressed-tensors",
}
"""Ends of names that only a scheme's files have, the most telling first."""
_KINDS = {"F8": "fp8", "F4": "fp4", "I8": "int8", "U8": "uint8"}
"""Begin of a header's type -> what people call it."""


def refuse_quantised(
    folder: Path,
    config: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    wanted: Iterable[str],
) -> None:
    """Refuse weights that are no plain numbers, and say which scheme made them.

    The tensors decide, since a config.json may still speak of a scheme whose weights were converted
    back.

    Args:
        folder: The checkpoint, for the error.
        config: Its config.json.
        stored: All its tensors.
        wanted: Names of the model's parameters.

    Raises:
        CheckpointError: The weights are quantised.

    Example:
        >>> weight = StoredTensor(file=Path("x"), name="w", shape=(4, 4), kind="F8_E4M3")
        >>> refuse_quantised(Path("model"), {}, {"w": weight}, ["w"])
        Traceback (most recent call last):
        ...
        d2f.errors.CheckpointError: model: the weights are quantised (fp8): w is F8_E4M3; only \
F64, F32, BF16, F16 are supported, so load the model that this one was made from, or have it \
converted to bf16 first
    """
    scheme, name = _scheme(stored, wanted)
    if scheme is None:
        return
    raise CheckpointError(
        f"{folder}: the weights are quantised ({_told(config) or scheme}): {name} is "
        f"{stored[name].kind}; only {', '.join(FLOATS)} are supported, so load the model that "
        "this one was made from, or have it converted to bf16 first"
    )


def _scheme(stored: Mapping[str, StoredTensor], wanted: Iterable[str]) -> tuple[str | None, str]:
    """The scheme that the tensors show, and a tensor that shows it."""
    for suffix, scheme in _SUFFIXES.items():
        for name in stored:
            if name.endswith(suffix):
                return scheme, name
    for name in wanted:
        if name in stored and stored[name].kind not in FLOATS:
            kind = stored[name].kind
            return _KINDS.get(kind[:2], kind), name
    return None, ""


def _told(config: Mapping[str, Any]) -> str | None:
    """The scheme of which a config.json speaks."""
    given = config.get("quantization_config")
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(method, str):
        return None
    scheme = _METHODS.get(method, method)
    bits = given.get("bits") or next((n for n in (4, 8) if given.get(f"load_in_{n}bit")), None)
    return scheme if bits is None else f"{scheme}, {bits} bits"
