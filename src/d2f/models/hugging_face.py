"""Functions shared by the families whose files follow transformers' own classes.

A family's file passes its facts to these functions; what a config.json leaves out is what
transformers takes for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2f.errors import CheckpointError, unknown_name
from d2f.models.spec import Architecture, ModelSpec

Config = Mapping[str, Any]

NAMES = {
    "embed": "model.embed_tokens",
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.qkv.q_proj": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.qkv.k_proj": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.qkv.v_proj": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.qkv.q_norm": "model.layers.{i}.self_attn.q_norm",
    "layers.{i}.qkv.k_norm": "model.layers.{i}.self_attn.k_norm",
    "layers.{i}.o_proj": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.gate_up.gate_proj": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.gate_up.up_proj": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.down_proj": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
"""Our module name -> published module name; `{i}` stands for the layer."""
_QK_NORM = "qk_norm"
"""Our own entry, of a diffusion model that was an autoregressive one with normalised heads: no
published class of diffusion models has these norms and no biases beside them."""
DEFAULTS: dict[str, Any] = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6}
SIZES: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
"""Sizes that transformers' classes of autoregressive models take where a config names none."""
_ACTIVATIONS = ("silu", "swish")  # two names of one function
_FIRST_WINDOW_LAYER = 28


def _refuse_windows(config: Config, where: str) -> None:
    """Layers that see a window only; whether there are any is as transformers tells it."""
    kinds, first = config.get("layer_types"), config.get("max_window_layers", _FIRST_WINDOW_LAYER)
    for kind in kinds or ():
        if kind != "full_attention":
            raise CheckpointError(f"{where}: layer type {kind!r}; only full_attention is supported")
    windows = kinds is None and config.get("sliding_window", 1) and config.get("use_sliding_window")
    if windows and first < config["num_hidden_layers"]:
        raise CheckpointError(
            f"{where}: use_sliding_window is {windows!r}, for the layers from {first} on; only "
            "full attention is supported"
        )


def _rope(config: Config, where: str) -> tuple[float, Config | None]:
    """The base of the rotary frequencies, and their scaling if there is any."""
    # transformers 5 writes the entries into one table, earlier versions beside the others; where
    # a file has both, transformers takes the older one.
    table = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = float(table.pop("rope_theta", config["rope_theta"]))
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"{where}: {unknown_name('rope type', kind, ['default', 'llama3'])}")
    for entries in (config, table):
        share = entries.get("partial_rotary_factor")
        if share not in (None, 1):
            raise CheckpointError(
                f"{where}: partial_rotary_factor is {share!r}; only 1 is supported"
            )
    if kind == "default":
        return theta, None
    length = "original_max_position_embeddings"
    table[length] = config.get(length, table.get(length, config["max_position_embeddings"]))
    return theta, table


def token_ids(config: Config) -> dict[str, Any]:
    """The entries of a config that name tokens, as arguments of a spec."""
    eos = config.get("eos_token_id")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    return {
        "mask_token_id": config.get("mask_token_id"),
        "eos_token_ids": eos_ids,
        "bos_token_id": config.get("bos_token_id"),
        "pad_token_id": config.get("pad_token_id"),
    }


def read(config: Config, architecture: Architecture, where: str) -> ModelSpec:
    """The spec that a config.json describes; raises `CheckpointError` for what is not computed."""
    if config.get("hidden_act", "silu") not in _ACTIVATIONS:
        raise CheckpointError(
            f"{where}: hidden_act is {config['hidden_act']!r}; only 'silu' is supported"
        )
    _refuse_windows(config, where)
    theta, scaling = _rope(config, where)
    heads = config["num_attention_heads"]
    return ModelSpec(
        architecture=architecture,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rope_theta=theta,
        norm_eps=float(config["rms_norm_eps"]),
        max_positions=config["max_position_embeddings"],
        rope_scaling=scaling,
        qkv_bias=bool(architecture.qkv_bias),
        qk_norm=architecture.qk_norm or (not architecture.causal and bool(config.get(_QK_NORM))),
        tie_embeddings=bool(config.get("tie_word_embeddings")),
        **token_ids(config),
    )


def write_common(spec: ModelSpec) -> dict[str, Any]:
    """The entries of a config.json that all families name alike."""
    eos = spec.eos_token_ids
    return {
        "architectures": [spec.architecture.class_name],
        "model_type": spec.architecture.name,
        "vocab_size": spec.vocab_size,
        "rope_theta": spec.rope_theta,
        "rms_norm_eps": spec.norm_eps,
        "mask_token_id": spec.mask_token_id,
        "bos_token_id": spec.bos_token_id,
        "pad_token_id": spec.pad_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
    }


def write(spec: ModelSpec) -> dict[str, Any]:
    """The config.json with which transformers' classes, and `read`, read the model."""
    own = {_QK_NORM: True} if spec.qk_norm and not spec.architecture.qk_norm else {}
    return (
        write_common(spec)
        | own
        | {
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "num_key_value_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "max_position_embeddings": spec.max_positions,
            "tie_word_embeddings": spec.tie_embeddings,
            "rope_scaling": dict(spec.rope_scaling) if spec.rope_scaling else None,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
        }
    )
