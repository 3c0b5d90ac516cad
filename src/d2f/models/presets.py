"""Models with fresh random weights, and the shapes of published ones to measure speed with."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from d2f.errors import ConfigError, unknown_name
from d2f.models.checkpoint import resolve_device, resolve_dtype
from d2f.models.families import FAMILIES, autoregressive
from d2f.models.spec import ModelSpec
from d2f.models.transformer import Transformer, filled_model

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

    def drawn(name: str, parameter: Tensor) -> Tensor:
        value = torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0)
        if parameter.ndim == 2:
            value = torch.randn(parameter.shape, generator=generator) * _INIT_STD
            value /= _damping(name, spec)
        return value.to(target, to_dtype)

    return filled_model(spec, drawn).eval()


def _damping(name: str, spec: ModelSpec) -> float:
    to_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
    return math.sqrt(2 * spec.num_layers) if to_stream else 1.0


@torch.no_grad()
def random_model(
    spec: ModelSpec,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = torch.bfloat16,
) -> Transformer:
    """A model as `build_model`'s, drawn where and as it is kept: seconds for 8B on a GPU.

    So the values depend on the device and type.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> random_model(tiny_spec("Dream"), device="cpu").dtype
        torch.bfloat16
    """
    target, to_dtype = resolve_device(device), resolve_dtype(dtype) or torch.bfloat16
    generator = torch.Generator(target).manual_seed(seed)

    def drawn(name: str, parameter: Tensor) -> Tensor:
        value = torch.empty(parameter.shape, device=target, dtype=to_dtype)
        if parameter.ndim == 2:
            return value.normal_(0, _INIT_STD / _damping(name, spec), generator=generator)
        return value.fill_(0.0 if name.endswith("bias") else 1.0)

    return filled_model(spec, drawn).eval()


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
    twin = replace(
        spec, architecture=autoregressive(spec), mask_token_id=None, recommended_policy=None
    )
    return filled_model(twin, lambda name, _: model.get_parameter(name)).eval()
