"""Tiny models of transformers with random weights."""

from __future__ import annotations

import torch
import transformers


def random_model(family, config):
    """A model whose biases and norms are not trivial, the same for the same config."""
    torch.manual_seed(0)
    filled = getattr(transformers, f"{family}Config")(**config)
    model = getattr(transformers, f"{family}ForCausalLM")(filled).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return model
