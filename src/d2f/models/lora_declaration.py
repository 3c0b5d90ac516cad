"""The file beside an adapter in PEFT's format that names its base and how that is read.

PEFT ignores the file. An adapter without it is read as PEFT reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f.errors import CheckpointError, counted, unknown_name
from d2f.models.base_fingerprint import Fingerprint
from d2f.models.families.dream import read_as_diffusion
from d2f.models.spec import ModelSpec
from d2f.models.storage import read_json

CONFIG_FILE = "adapter_config.json"
DECLARATION_FILE = "d2f_adapter.json"
ADAPTER_DTYPES = ("float32", "bfloat16", "int8")
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """The content of d2f_adapter.json."""

    base_type: str
    """`model_type` of the base model's config.json."""
    vocab_size: int
    """Of the base model."""
    mask_token_id: int | None = None
    """Read the autoregressive base as a diffusion model with this mask token; None: read it as it
    is."""
    distilled: bool = True
    """Whether the adapter was trained to be decoded in blocks."""
    dtype: str = "float32"
    """Of the adapter's numbers: one of `ADAPTER_DTYPES`."""
    fingerprint: Fingerprint | None = None
    """Of the base model."""
    lora: Mapping[str, Any] | None = None
    """int8: the entries of an adapter_config.json, which would lead PEFT to read what it cannot."""

    def to_dict(self) -> dict[str, Any]:
        """The declaration as plain JSON values."""
        found = None if self.fingerprint is None else self.fingerprint.to_dict()
        lora = {} if self.lora is None else {"lora": dict(self.lora)}
        return {
            "format": _FORMAT,
            "mask_token_id": self.mask_token_id,
            "distilled": self.distilled,
            "dtype": self.dtype,
            "base": {"model_type": self.base_type, "vocab_size": self.vocab_size}
            | ({} if found is None else {"fingerprint": found}),
        } | lora


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    found = any((folder / name).exists() for name in (CONFIG_FILE, DECLARATION_FILE))
    return found and not (folder / "config.json").exists()


def read_declaration(folder: Path) -> Declaration | None:
    """What an adapter's folder declares; None for one that others wrote.

    Raises:
        CheckpointError: The file is broken, or of a newer version.
    """
    file = folder / DECLARATION_FILE
    if not file.exists():
        return None
    values = read_json(file)
    if values.get("format") != _FORMAT:
        raise CheckpointError(
            f"{file}: format is {values.get('format')!r}; this version of d2f reads {_FORMAT}, so "
            "update d2f, or fetch the adapter again"
        )
    base, lora = values.get("base"), values.get("lora")
    if not isinstance(base, Mapping):
        raise CheckpointError(f"{file}: base is {base!r}; it must be a table")
    found = base.get("fingerprint")
    if not isinstance(found, Mapping | None) or not isinstance(lora, Mapping | None):
        raise CheckpointError(f"{file}: fingerprint and lora must be tables")
    dtype = values.get("dtype")
    if dtype not in ADAPTER_DTYPES:
        raise CheckpointError(f"{file}: {unknown_name('dtype', dtype, ADAPTER_DTYPES)}")
    if (dtype == "int8") != (lora is not None):
        raise CheckpointError(f"{file}: dtype is {dtype!r}; int8 needs the table lora, others not")
    vocab_size = _typed(base, "vocab_size", int, file)
    mask = _typed(values, "mask_token_id", int | None, file)
    if mask is not None and not 0 <= mask < vocab_size:
        raise CheckpointError(
            f"{file}: mask_token_id is {mask}; the vocabulary holds 0 to {vocab_size - 1}"
        )
    return Declaration(
        base_type=_typed(base, "model_type", str, file),
        vocab_size=vocab_size,
        mask_token_id=mask,
        distilled=_typed(values, "distilled", bool, file),
        dtype=dtype,
        fingerprint=None if found is None else Fingerprint.from_dict(found, str(file)),
        lora=lora,
    )


def _typed(values: Mapping[str, Any], name: str, kind: Any, file: Path) -> Any:
    if name not in values:
        raise CheckpointError(f"{file} lacks {name}; fetch the adapter again")
    value = values[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise CheckpointError(f"{file}: {name} is {value!r}, which is of the wrong type")
    return value


def adapted_spec(spec: ModelSpec, folder: Path, declared: Declaration | None) -> ModelSpec:
    """The base's spec as the adapter in `folder` reads it: perhaps as a diffusion model.

    A spec that `read_as_diffusion` gave already stays as it is.

    Raises:
        CheckpointError: The base is of another architecture or vocabulary, or is a diffusion model
            where the adapter wants an autoregressive one.
    """
    if declared is None:
        return spec
    mask, name = declared.mask_token_id, spec.architecture.name
    own = spec.read_from or name
    if mask is not None and not spec.architecture.causal and spec.read_from is None:
        raise CheckpointError(
            f"{folder} reads an autoregressive base, a {declared.base_type}, as a diffusion model, "
            f"and this {name} is one already; give the base that the adapter was trained on, or, "
            "if the adapter is merged into this model, leave the adapter out"
        )
    if (own, spec.vocab_size) != (declared.base_type, declared.vocab_size):
        raise CheckpointError(
            f"{folder} is an adapter for another model: it was trained on a {declared.base_type} "
            f"of {counted(declared.vocab_size, 'token')}, and this is a {own} of "
            f"{spec.vocab_size}; give the base that it was trained on"
        )
    if mask is None:
        return spec
    if spec.read_from is None:
        return read_as_diffusion(spec, mask)
    if spec.mask_token_id != mask:
        raise CheckpointError(
            f"{folder} was trained with the mask token {mask}, and the model was read as a "
            f"diffusion model with {spec.mask_token_id}; read it with mask_token_id {mask}"
        )
    return spec
