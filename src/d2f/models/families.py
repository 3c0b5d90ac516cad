"""The four families of hub checkpoints: LLaDA, Dream, and the autoregressive Llama and Qwen2.

A family turns a published config.json into a `ModelSpec` and back. Everything that differs between
them is a value here; no other module asks which family a model is of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from d2f.errors import CheckpointError, ConfigError, unknown_name
from d2f.models.spec import Architecture, ModelSpec

Config = Mapping[str, Any]

_HUGGING_FACE_NAMES = {
    "embed": "model.embed_tokens",
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.qkv.q_proj": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.qkv.k_proj": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.qkv.v_proj": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.o_proj": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.gate_up.gate_proj": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.gate_up.up_proj": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.down_proj": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
_LLADA_NAMES = {
    "embed": "model.transformer.wte",
    "layers.{i}.attention_norm": "model.transformer.blocks.{i}.attn_norm",
    "layers.{i}.qkv.q_proj": "model.transformer.blocks.{i}.q_proj",
    "layers.{i}.qkv.k_proj": "model.transformer.blocks.{i}.k_proj",
    "layers.{i}.qkv.v_proj": "model.transformer.blocks.{i}.v_proj",
    "layers.{i}.o_proj": "model.transformer.blocks.{i}.attn_out",
    "layers.{i}.mlp_norm": "model.transformer.blocks.{i}.ff_norm",
    "layers.{i}.gate_up.gate_proj": "model.transformer.blocks.{i}.ff_proj",
    "layers.{i}.gate_up.up_proj": "model.transformer.blocks.{i}.up_proj",
    "layers.{i}.down_proj": "model.transformer.blocks.{i}.ff_out",
    "norm": "model.transformer.ln_f",
    # One level up from the blocks, yet of the same last name as their down projection.
    "lm_head": "model.transformer.ff_out",
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

LLADA = Architecture(
    name="llada",
    class_name="LLaDAModelLM",
    shifted=False,
    causal=False,
    rope_full_precision=True,
    lora_targets=("q_proj", "k_proj", "v_proj", "attn_out"),
    sampler="low_confidence",
    names=_LLADA_NAMES,
)
DREAM = Architecture(
    name="Dream",
    class_name="DreamModel",
    shifted=True,
    causal=False,
    rope_full_precision=False,
    lora_targets=_ATTENTION,
    sampler="entropy",
    names=_HUGGING_FACE_NAMES,
)
LLAMA = Architecture(
    name="llama",
    class_name="LlamaForCausalLM",
    shifted=True,
    causal=True,
    rope_full_precision=False,
    lora_targets=_ATTENTION,
    sampler=None,
    names=_HUGGING_FACE_NAMES,
)
QWEN2 = Architecture(
    name="qwen2",
    class_name="Qwen2ForCausalLM",
    shifted=True,
    causal=True,
    rope_full_precision=False,
    lora_targets=_ATTENTION,
    sampler=None,
    names=_HUGGING_FACE_NAMES,
)


def spec_from_config(config: Config, where: str = "config.json") -> ModelSpec:
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
    architecture, read = FAMILIES[model_type]
    try:
        spec = read(_DEFAULTS[model_type] | dict(config), architecture, where)
    except KeyError as error:
        raise CheckpointError(f"{where}: the entry {error} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: an entry is of the wrong type: {error}") from None
    _check(spec, where)
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The config.json with which the hub's own code, and `spec_from_config`, read the model."""
    name = spec.architecture.name
    common = {
        "architectures": [spec.architecture.class_name],
        "model_type": name,
        "vocab_size": spec.vocab_size,
        "rope_theta": spec.rope_theta,
        "rms_norm_eps": spec.norm_eps,
        "mask_token_id": spec.mask_token_id,
        "bos_token_id": spec.bos_token_id,
        "pad_token_id": spec.pad_token_id,
        "eos_token_id": spec.eos_token_ids[0]
        if len(spec.eos_token_ids) == 1
        else list(spec.eos_token_ids) or None,
    }
    if spec.architecture is LLADA:
        return common | {
            "d_model": spec.hidden_size,
            "mlp_hidden_size": spec.intermediate_size,
            "n_layers": spec.num_layers,
            "n_heads": spec.num_heads,
            "n_kv_heads": spec.num_kv_heads,
            "max_sequence_length": spec.max_positions,
            "embedding_size": spec.vocab_size,
            "weight_tying": spec.tie_embeddings,
            "include_qkv_bias": spec.qkv_bias,
            **_LLADA_FIXED,
        }
    return common | {
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


def read_as_diffusion(spec: ModelSpec, mask_token_id: int) -> ModelSpec:
    """The spec of an autoregressive model that is read as a diffusion model (see `as_diffusion`).

    Raises:
        ConfigError: The model is a diffusion model already, or its vocabulary does not hold
            `mask_token_id`.
    """
    if not spec.architecture.causal:
        raise ConfigError(f"{spec.architecture.name} is a diffusion model already")
    if not 0 <= mask_token_id < spec.vocab_size:
        raise ConfigError(
            f"mask_token_id is {mask_token_id}; the vocabulary holds ids 0 to {spec.vocab_size - 1}"
        )
    return replace(
        spec,
        architecture=DREAM,
        mask_token_id=mask_token_id,
        eos_token_ids=tuple(token for token in spec.eos_token_ids if token != mask_token_id),
        qkv_bias=True,
        recommended_policy=None,
        recommended_max_new_tokens=None,
        read_from=spec.architecture.name,
    )


_LLADA_FIXED = {
    "block_type": "llama",
    "block_group_size": 1,
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "include_bias": False,
    "bias_for_layer_norm": False,
    "layer_norm_with_affine": True,
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_positions",
)
# What the published classes take for an entry that is missing. Not the token ids: transformers'
# Llama class has some, but what it generates does not end there. Of the sizes only those of
# transformers' own classes: Dream's and LLaDA's published models are of none of their defaults.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llada": {
        "mlp_ratio": 4,
        "max_sequence_length": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "weight_tying": True,
    },
    "Dream": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
    },
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
    },
}
# Where a setting is off, the published code only asks whether it is true, so null is off too.
_OFF = (False, None)
_ACTIVATIONS = ("silu", "swish")  # two names of one function
_FIRST_WINDOW_LAYER = 28


def _refuse_other(config: Config, fixed: Config, where: str) -> None:
    for name, value in fixed.items():
        given = config.get(name, value)
        if given != value and not (value is False and given in _OFF):
            raise CheckpointError(f"{where}: {name} is {given!r}; only {value!r} is supported")


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


def _token_ids(config: Config) -> dict[str, Any]:
    eos = config.get("eos_token_id")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    return {
        "mask_token_id": config.get("mask_token_id"),
        "eos_token_ids": eos_ids,
        "bos_token_id": config.get("bos_token_id"),
        "pad_token_id": config.get("pad_token_id"),
    }


def _read_llada(config: Config, architecture: Architecture, where: str) -> ModelSpec:
    _refuse_other(config, _LLADA_FIXED, where)
    width, heads = config["d_model"], config["n_heads"]
    kv_heads = config.get("n_kv_heads")
    if kv_heads is None:
        kv_heads = 1 if config.get("multi_query_attention") else heads
    return ModelSpec(
        architecture=architecture,
        # The rows of the embedding may exceed the tokenizer's vocabulary.
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=width,
        intermediate_size=config.get("mlp_hidden_size") or config["mlp_ratio"] * width,
        num_layers=config["n_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        rope_theta=float(config["rope_theta"]),
        norm_eps=float(config["rms_norm_eps"]),
        max_positions=config["max_sequence_length"],
        qkv_bias=bool(config.get("include_qkv_bias")),
        tie_embeddings=bool(config.get("weight_tying")),
        **_token_ids(config),
    )


def _read_hugging_face(config: Config, architecture: Architecture, where: str) -> ModelSpec:
    if config.get("hidden_act", "silu") not in _ACTIVATIONS:
        raise CheckpointError(
            f"{where}: hidden_act is {config['hidden_act']!r}; only 'silu' is supported"
        )
    # transformers' Llama heeds these biases and no sliding window; Qwen2 and Dream do the opposite.
    if architecture is LLAMA:
        _refuse_other(config, {"attention_bias": False, "mlp_bias": False}, where)
        config = dict(config) | {"use_sliding_window": False}
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
        # Qwen2 and Dream have it always and do not say so.
        qkv_bias=architecture is not LLAMA,
        tie_embeddings=bool(config.get("tie_word_embeddings")),
        **_token_ids(config),
    )


FAMILIES: dict[str, tuple[Architecture, Callable[[Config, Architecture, str], ModelSpec]]] = {
    "llada": (LLADA, _read_llada),
    "Dream": (DREAM, _read_hugging_face),
    "llama": (LLAMA, _read_hugging_face),
    "qwen2": (QWEN2, _read_hugging_face),
}
