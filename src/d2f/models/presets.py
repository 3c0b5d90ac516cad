"""Models with fresh random weights, and the shapes of published ones to measure speed with."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from d2f.errors import ConfigError, unknown_name
from d2f.models.checkpoint import resolve_device, resolve_dtype
from d2f.models.families import FAMILIES, autoregressive
from d2f.models.spec import ModelSpec, published_modules
from d2f.models.transformer import Transformer

_INIT_STD = 0.02
PRESETS = {name: spec for family in FAMILIES.values() for name, spec in family.presets.items()}
"""Sizes and token ids as published, by the names of shapes."""


def preset_spec(name: str, *, num_layers: int | None = None) -> ModelSpec:
    """The spec of a published model, cut down to `num_layers` if given.

    Raises:
        ConfigError: The name is unknown, or the layers are not at least 1.

    Example:
        >>> preset_spec("llada-8b").num_parameters
        8015581184
    """
    if name not in PRESETS:
        raise ConfigError(unknown_name("shape", name, PRESETS))
    if num_layers is None:
        return PRESETS[name]
    if num_layers < 1:
        raise ConfigError(f"num_layers is {num_layers}; it must be at least 1")
    return replace(PRESETS[name], num_layers=num_layers)


def build_model(
    spec: ModelSpec,
    *,
    seed: int = 0,
    device: str | torch.device | None = "cpu",
    dtype: str | torch.dtype | None = torch.float32,
) -> Transformer:
    """A model with fresh random weights, the same on every device for the same seed.

    Matrices are normal with deviation 0.02, those that write to the residual stream scaled down by
    sqrt(2 * layers); norms are 1 and biases 0.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> build_model(tiny_spec("llada"), seed=1).embed.weight.std().item() < 0.03
        True
    """
    generator = torch.Generator().manual_seed(seed)
    target, to_dtype = resolve_device(device), resolve_dtype(dtype) or torch.float32
    with torch.device("meta"):
        model = Transformer(spec)
    for ours in published_modules(spec).values():
        module = model.get_submodule(ours)
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 2:
                value = torch.randn(parameter.shape, generator=generator) * _INIT_STD
                if ours.endswith(("o_proj", "down_proj")):
                    value /= math.sqrt(2 * spec.num_layers)
            else:
                fill = 0.0 if attribute == "bias" else 1.0
                value = torch.full(parameter.shape, fill)
            parameter = nn.Parameter(value.to(target, to_dtype), requires_grad=False)
            setattr(module, attribute, parameter)
    return model.eval()


@torch.no_grad()
def random_model(
    spec: ModelSpec,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = torch.bfloat16,
) -> Transformer:
    """A model of random weights, drawn where and as they are kept: seconds for 8B on a GPU.

    Matrices are normal with deviation 0.02, those that write to the residual stream scaled down by
    sqrt(2 * layers); norms are 1 and biases 0. Unlike `build_model`'s, the values depend on the
    device and type.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> random_model(tiny_spec("Dream"), device="cpu").dtype
        torch.bfloat16
    """
    target, to_dtype = resolve_device(device), resolve_dtype(dtype) or torch.bfloat16
    generator = torch.Generator(target).manual_seed(seed)
    with torch.device("meta"):
        model = Transformer(spec)
    for ours in published_modules(spec).values():
        module = model.get_submodule(ours)
        scale = math.sqrt(2 * spec.num_layers) if ours.endswith(("o_proj", "down_proj")) else 1.0
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, device=target, dtype=to_dtype)
            if parameter.ndim == 2:
                value.normal_(0, _INIT_STD / scale, generator=generator)
            else:
                value.fill_(0.0 if attribute == "bias" else 1.0)
            setattr(module, attribute, nn.Parameter(value, requires_grad=False))
    return model.eval()


def autoregressive_twin(model: Transformer) -> Transformer:
    """The model's weights as an autoregressive model of the same sizes: what a fair race needs.

    No weight is copied. It is as fast as a trained model of these sizes, and its text means
    nothing. An autoregressive model is its own twin.

    Example:
        >>> from d2f.testing import tiny_model
        >>> autoregressive_twin(tiny_model("llada")).spec.architecture.name
        'llama'
    """
    spec = model.spec
    if spec.architecture.causal:
        return model
    with torch.device("meta"):
        twin = Transformer(
            replace(
                spec,
                architecture=autoregressive(spec),
                mask_token_id=None,
                recommended_policy=None,
            )
        )
    for name, module in model.named_modules():
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            setattr(twin.get_submodule(name), attribute, parameter)
    return twin.eval()
