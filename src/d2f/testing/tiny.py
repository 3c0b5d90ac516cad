"""Tiny random models of every architecture: 96 tokens, width 32, 2 layers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from d2f.errors import ConfigError, unknown_name
from d2f.models.families import FAMILIES, spec_from_config
from d2f.models.lora import LoraConfig, adapter_parameters, attach_adapter
from d2f.models.presets import build_model
from d2f.models.spec import ModelSpec
from d2f.models.transformer import Transformer

VOCAB_SIZE = 96
MASK_TOKEN_ID = 94
EOS_TOKEN_ID = 95
# Makes the best of 96 tokens win with probabilities that spread over all of (0, 1).
_HEAD_GAIN = 4.0


def tiny_config(model_type: str) -> dict[str, Any]:
    """A config.json as published for a family (such as "llada", "Dream", "llama"), at tiny sizes.

    Example:
        >>> tiny_config("llada")["d_model"]
        32
    """
    if model_type not in FAMILIES:
        raise ConfigError(unknown_name("model_type", model_type, FAMILIES))
    family = FAMILIES[model_type]
    published = next(iter(family.presets.values()))
    spec = replace(
        published,
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        # Heads share keys where those of the published model do.
        num_kv_heads=4 if published.num_kv_heads == published.num_heads else 2,
        head_dim=8,
        rope_theta=10000.0,
        norm_eps=1e-5,
        max_positions=512,
        tie_embeddings=False,
        mask_token_id=None if family.architecture.causal else MASK_TOKEN_ID,
        eos_token_ids=(EOS_TOKEN_ID,),
        bos_token_id=None,
        pad_token_id=EOS_TOKEN_ID,
    )
    config = {name: value for name, value in family.write(spec).items() if value is not None}
    if "head_dim" not in family.defaults:
        # Left out, so that heads become wider where a test makes the model wider.
        config.pop("head_dim", None)
    return config


def tiny_spec(model_type: str) -> ModelSpec:
    """The spec of `tiny_config`."""
    return spec_from_config(tiny_config(model_type))


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> Transformer:
    """A tiny model on the CPU in fp32 whose random weights give varied, confident predictions.

    `overrides` replace entries of the config, such as `tie_word_embeddings=True`.

    Example:
        >>> tiny_model("Dream").spec.vocab_size
        96
    """
    model = build_model(spec_from_config(tiny_config(model_type) | overrides))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "lm_head.weight" or (name == "embed.weight" and model.lm_head is None):
            parameter.copy_(noise * _HEAD_GAIN / math.sqrt(parameter.shape[1]))
        elif name == "embed.weight":
            parameter.copy_(noise)
        elif parameter.ndim == 2:
            parameter.copy_(noise / math.sqrt(parameter.shape[1]))
        else:
            parameter.add_(noise * 0.1)
    return model


def tiny_adapter(model: Transformer, seed: int = 0, *, config: LoraConfig | None = None) -> None:
    """Attach a random adapter whose update is not 0; it requires no gradient.

    Example:
        >>> model = tiny_model("llada")
        >>> tiny_adapter(model)
        >>> len(adapter_parameters(model))
        16
    """
    generator = torch.Generator().manual_seed(seed)
    attach_adapter(model, config or LoraConfig(r=4, alpha=8), generator)
    for parameter in adapter_parameters(model):
        parameter.requires_grad_(False)
        spread = 1 / math.sqrt(parameter.shape[1])
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
