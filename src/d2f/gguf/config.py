"""Write config.json and generation_config.json from the metadata of a GGUF.

Of Llama 3's rotary scaling a GGUF holds no parameters, but a tensor with one factor per frequency:
1 for short wave lengths, `factor` for long ones. Between them, 1 / factor grows linearly with the
frequency.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from d2f.errors import CheckpointError, counted
from d2f.gguf.container import Container, GGUFTensor
from d2f.gguf.tensors import ROPE_TENSOR, hub_tensors, layout_of, number

_TYPE_SUFFIX = re.compile(r"[.-](?:I?Q\d\w*|B?F16|F32)$", re.IGNORECASE)
"""Suffix for the block type, such as `-Q4_0`, that file names carry behind the model's name."""
_NEUTRAL = {
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.causal": True,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "final_logit_softcapping": 0.0,
    "attn_logit_softcapping": 0.0,
    "use_parallel_residual": False,
}
"""Metadata entries that are not supported, each with the value at which it has no effect."""
_ENDS = ("eos", "eot", "eom")
_LENGTH = "original_max_position_embeddings"
_COMMON = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, _LENGTH: 8192}
"""Parameters that all published Llama 3 models share."""
_TOLERANCE = 1e-3
_NOISE = 2e-5
_DECIMALS = 5
"""Decimals that survive float32, to which solved parameters are rounded."""


def model_config(container: Container) -> dict[str, Any]:
    """Return the content of config.json for the model in a GGUF.

    Raises:
        CheckpointError: A metadata entry is missing or asks for an unsupported computation.
    """
    layout, metadata = layout_of(container), container.metadata
    tensors = hub_tensors(container)
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise CheckpointError(f"{container.file} lacks the tensor token_embd.weight")
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    if number(container, "block_count") != len(layers):
        raise CheckpointError(
            f"{container.file} has tensors of {counted(len(layers), 'layer')}, and its metadata "
            f"speak of {number(container, 'block_count')}; download it again"
        )
    heads = number(container, "attention.head_count")
    width = number(container, "embedding_length")
    head_dim = number(container, "attention.key_length", width // heads)
    _check(container, head_dim)
    prefix = metadata["general.architecture"]
    theta = float(metadata.get(f"{prefix}.rope.freq_base", 10000.0))
    epsilon = metadata.get(f"{prefix}.attention.layer_norm_rms_epsilon")
    if epsilon is None:
        raise CheckpointError(
            f"{container.file}: the metadata lack {prefix}.attention.layer_norm_rms_epsilon; "
            "convert the original model again"
        )
    return {
        "architectures": [layout.class_name],
        "model_type": layout.model_type,
        "_name_or_path": _TYPE_SUFFIX.sub("", container.file.stem),
        "vocab_size": embedding.source.shape[0],
        "hidden_size": width,
        "intermediate_size": number(container, "feed_forward_length"),
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": number(container, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": number(container, "context_length"),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rms_norm_eps": float(epsilon),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(container, theta, head_dim),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": token_id(container, "bos"),
        "eos_token_id": token_id(container, "eos"),
        "pad_token_id": token_id(container, "padding"),
        "mask_token_id": token_id(container, "mask"),
    }


def generation_config(container: Container) -> dict[str, Any] | None:
    """Return the content of generation_config.json; None unless the GGUF names several ends."""
    found = [token_id(container, name) for name in _ENDS]
    ends = list(dict.fromkeys(token for token in found if token is not None))
    if len(ends) < 2:
        return None
    return {
        "bos_token_id": token_id(container, "bos"),
        "eos_token_id": ends,
        "pad_token_id": token_id(container, "padding"),
    }


def token_id(container: Container, name: str) -> int | None:
    """Return the id of the token with a role, such as `bos`; None if the GGUF does not name it.

    Raises:
        CheckpointError: The entry is not a whole number.
    """
    entry = f"tokenizer.ggml.{name}_token_id"
    value = container.metadata.get(entry)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise CheckpointError(f"{container.file}: {entry} is {value!r}, which is no token id")
    return value


def _check(container: Container, head_dim: int) -> None:
    """Refuse metadata under which the model here would compute something else."""
    prefix = container.metadata["general.architecture"]
    for entry in ("rope.dimension_count", "attention.value_length"):
        size = number(container, entry, head_dim)
        if size != head_dim:
            raise CheckpointError(
                f"{container.file}: {prefix}.{entry} is {size}, and heads are {head_dim} wide; "
                "only heads that are rotated in whole and of one width are supported"
            )
    for entry, neutral in _NEUTRAL.items():
        value = container.metadata.get(f"{prefix}.{entry}", neutral)
        if value != neutral:
            raise CheckpointError(
                f"{container.file}: {prefix}.{entry} is {value!r}, which is not supported"
            )
    window = container.metadata.get(f"{prefix}.attention.sliding_window", 0)
    if window and window < number(container, "context_length"):
        raise CheckpointError(
            f"{container.file}: {prefix}.attention.sliding_window is {window!r}; only full "
            "attention is supported"
        )


def rope_scaling(container: Container, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Return the entry `rope_scaling` of config.json; None if the frequencies are not scaled.

    Raises:
        CheckpointError: The frequencies are scaled in another way than Llama 3's.
    """
    file, metadata = container.file, container.metadata
    prefix = f"{metadata['general.architecture']}.rope"
    kind = metadata.get(f"{prefix}.scaling.type", "none")
    long = [name for name in container.tensors if name.startswith("rope_factors")]
    old = metadata.get(f"{prefix}.scale_linear", 1.0)
    if kind not in ("none", "llama3") or long or old != 1.0:
        told = kind if kind not in ("none", "llama3") else "longrope" if long else "linear"
        raise CheckpointError(
            f"{file}: the rotary frequencies are scaled by '{told}'; only none and llama3 are "
            "supported"
        )
    if ROPE_TENSOR in container.tensors:
        factors = _factors(container.tensors[ROPE_TENSOR])
        length = metadata.get(f"{prefix}.scaling.original_context_length")
        found = _fitted(factors, theta, head_dim, length)
        if found is None:
            raise CheckpointError(
                f"{file}: the factors in {ROPE_TENSOR} are not those of Llama 3's scaling, which "
                "is the only one supported"
            )
        return found or None
    if kind == "none":
        return None
    entries = {name: metadata.get(f"{prefix}.scaling.{name}", _COMMON.get(name)) for name in (
        "factor", "low_freq_factor", "high_freq_factor"
    )}  # fmt: skip
    length = metadata.get(f"{prefix}.scaling.original_context_length", _COMMON[_LENGTH])
    return {"rope_type": "llama3"} | entries | {_LENGTH: length}


def _factors(tensor: GGUFTensor) -> np.ndarray[Any, Any]:
    if tensor.type.name != "F32":
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} is of type {tensor.type.name}, not F32; convert "
            "the original model again"
        )
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        return np.frombuffer(stream.read(tensor.num_bytes), dtype="<f4").astype(np.float64)


def _fitted(
    factors: np.ndarray[Any, Any], theta: float, head_dim: int, length: int | None
) -> dict[str, Any] | None:
    """Return the scaling that gives these factors: empty if all are 1, None if none does."""
    if factors.shape != (head_dim // 2,):
        return None
    if np.allclose(factors, 1.0):
        return {}
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    entries = dict(_COMMON)
    if length is not None:
        entries[_LENGTH] = length
    factor = round(float(factors.max()), _DECIMALS)
    for found in (entries, _solved(factors, frequencies, factor, entries[_LENGTH])):
        if found is None:
            continue
        scaling = {"rope_type": "llama3", "factor": factor} | found
        if np.allclose(llama3_factors(scaling, frequencies), factors, rtol=_TOLERANCE):
            return scaling
    return None


def _solved(
    factors: np.ndarray[Any, Any], frequencies: np.ndarray[Any, Any], factor: float, length: float
) -> dict[str, Any] | None:
    """Solve for `low_freq_factor` and `high_freq_factor` from two factors between 1 and `factor`.

    Only the ratios of both parameters to `length` matter.
    """
    inside = np.flatnonzero((factors > 1.0 + _NOISE) & (factors < factor * (1 - _NOISE)))
    if len(inside) < 2:
        return None
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    turns = length * frequencies / (2 * math.pi)
    first, last = inside[0], inside[-1]
    slope = (smooth[first] - smooth[last]) / (turns[first] - turns[last])
    if not slope > 0:
        return None
    low = turns[last] - smooth[last] / slope
    return {
        "low_freq_factor": round(float(low), _DECIMALS),
        "high_freq_factor": round(float(low + 1 / slope), _DECIMALS),
        _LENGTH: length,
    }


def llama3_factors(
    scaling: dict[str, Any], frequencies: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Return the divisor that Llama 3's scaling applies to each frequency.

    Example:
        >>> scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        ...            "original_max_position_embeddings": 8192}
        >>> llama3_factors(scaling, np.array([1.0, 1e-6]))
        array([1., 8.])
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling[_LENGTH] * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)
