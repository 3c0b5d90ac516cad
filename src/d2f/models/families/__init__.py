"""The families of hub checkpoints, a module each: names, config.json, and the facts of a family.

A module here defines `FAMILY`, which is found by itself. No other module asks which family a model
is of: what differs is a fact of its architecture or a size in its spec.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from d2f.errors import CheckpointError, unknown_name
from d2f.models.spec import Architecture, Family, ModelSpec

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
    "head_dim", "max_positions",
)  # fmt: skip


def _found() -> dict[str, Family]:
    modules = (
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
    )
    families: list[Family] = [module.FAMILY for module in modules]
    return {family.architecture.name: family for family in families}


FAMILIES = _found()
"""Families by `model_type`."""


def spec_from_config(config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """Read a published config.json.

    What a config leaves out is what transformers, or the authors' code, takes for it.

    Raises `CheckpointError` for an unknown `model_type`, a missing size, or a setting that this
    core does not compute (ALiBi, sliding windows, other activations or norms, …).

    Example:
        >>> from d2f.testing import tiny_config
        >>> spec_from_config(tiny_config("qwen2")).architecture.causal
        True
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(f"{where}: {unknown_name('model_type', model_type, FAMILIES)}")
    family = FAMILIES[model_type]
    for name, value in family.fixed.items():
        given = config.get(name, value)
        # The published code only asks whether a setting is true, so null is off too.
        if given != value and not (value is False and given is None):
            raise CheckpointError(f"{where}: {name} is {given!r}; only {value!r} is supported")
    try:
        spec = family.read({**family.defaults, **config}, family.architecture, where)
    except KeyError as error:
        raise CheckpointError(f"{where}: the entry {error} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: an entry is of the wrong type: {error}") from None
    _check(spec, where)
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The config.json with which the hub's own code, and `spec_from_config`, read the model."""
    return FAMILIES[spec.architecture.name].write(spec)


def autoregressive(spec: ModelSpec) -> Architecture:
    """The autoregressive architecture whose layers have the parts that a spec names.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> autoregressive(tiny_spec("Dream")).name
        'qwen2'
    """
    causal = (f.architecture for f in FAMILIES.values() if f.architecture.causal)
    return max(causal, key=lambda architecture: architecture.fits(spec))


def _check(spec: ModelSpec, where: str) -> None:
    if not (spec.rope_theta > 0 and spec.norm_eps >= 0):
        raise CheckpointError(
            f"{where}: rope_theta {spec.rope_theta} must be above 0 and the norm's epsilon "
            f"{spec.norm_eps} not below"
        )
    for name in _LLAMA3 if spec.rope_scaling is not None else ():
        value = (spec.rope_scaling or {}).get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(f"{where}: {name} of the rope scaling is {value!r}")
    for name in _SIZES:
        value = getattr(spec, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{where}: {name} is {value!r}; it must be a whole number >= 1")
    if spec.num_heads % spec.num_kv_heads:
        raise CheckpointError(
            f"{where}: {spec.num_heads} heads cannot share {spec.num_kv_heads} key/value heads"
        )
    if spec.head_dim % 2:
        raise CheckpointError(f"{where}: head_dim is {spec.head_dim}; rotation needs an even one")
    for name in ("eos_token_ids", "mask_token_id", "bos_token_id", "pad_token_id"):
        value = getattr(spec, name)
        for token in value if isinstance(value, tuple) else () if value is None else (value,):
            if isinstance(token, bool) or not isinstance(token, int):
                entry = name.removesuffix("s")
                raise CheckpointError(f"{where}: {entry}: {token!r} is no token id")
    mask = () if spec.mask_token_id is None else (spec.mask_token_id,)
    for name, tokens in (("mask_token_id", mask), ("eos_token_id", spec.eos_token_ids)):
        for token in tokens:
            if not 0 <= token < spec.vocab_size:
                raise CheckpointError(
                    f"{where}: {name} is {token}; the vocabulary holds 0 to {spec.vocab_size - 1}"
                )
