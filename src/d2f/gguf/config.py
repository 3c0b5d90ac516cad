"""Write config.json and generation_config.json from the metadata of a GGUF."""

from __future__ import annotations

import re
from typing import Any

from d2f.errors import CheckpointError, counted
from d2f.gguf.container import Container
from d2f.gguf.layouts import hub_tensors, layout_of, number
from d2f.gguf.rope import rope_scaling

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
