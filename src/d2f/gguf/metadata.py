"""Type checks of the metadata entries of a GGUF that the package reads."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from d2f.errors import CheckpointError


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


_KINDS: dict[str, Callable[[Any], bool]] = {
    "a text": _is_text,
    "a number": _is_number,
    "a list of texts": _list_of(_is_text),
    "a list of numbers": _list_of(_is_number),
}
_ENTRIES = {
    "general.architecture": "a text",
    "general.type": "a text",
    "split.count": "a number",
    "split.no": "a number",
    "tokenizer.chat_template": "a text",
    "tokenizer.ggml.model": "a text",
    "tokenizer.ggml.pre": "a text",
    "tokenizer.ggml.tokens": "a list of texts",
    "tokenizer.ggml.token_type": "a list of numbers",
    "tokenizer.ggml.scores": "a list of numbers",
    "tokenizer.ggml.merges": "a list of texts",
}
_OF_THE_LAYOUT = {
    "attention.layer_norm_rms_epsilon": "a number",
    "attention.sliding_window": "a number",
    "rope.freq_base": "a number",
    "rope.scale_linear": "a number",
    "rope.scaling.type": "a text",
    "rope.scaling.factor": "a number",
    "rope.scaling.low_freq_factor": "a number",
    "rope.scaling.high_freq_factor": "a number",
    "rope.scaling.original_context_length": "a number",
}
"""Entries whose names begin with the layout's name, such as `llama.`."""


def check_metadata(file: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse metadata with an entry of the wrong type.

    Sizes and token ids, which must be whole numbers, are checked where they are read.

    Raises:
        CheckpointError: An entry that the package reads has the wrong type.
    """
    layout = metadata.get("general.architecture")
    wanted = _ENTRIES | {f"{layout}.{name}": kind for name, kind in _OF_THE_LAYOUT.items()}
    for name, kind in wanted.items():
        if name in metadata and not _KINDS[kind](metadata[name]):
            raise CheckpointError(
                f"{file} is damaged: {name} is {reprlib.repr(metadata[name])}, not {kind}; "
                "download it again, or convert the original model again"
            )
