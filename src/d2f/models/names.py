"""Published names: which tensor of a checkpoint belongs to which module of the core."""

from __future__ import annotations

from torch import nn

from d2f.models.spec import ModelSpec
from d2f.models.transformer import Transformer


def published_modules(spec: ModelSpec) -> dict[str, str]:
    """Published module name -> ours, for every module that holds weights.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> published_modules(tiny_spec("llada"))["model.transformer.blocks.1.attn_out"]
        'layers.1.o_proj'
    """
    modules = {}
    for ours, published in spec.architecture.names.items():
        if ours == "lm_head" and spec.tie_embeddings:
            continue
        count = spec.num_layers if "{i}" in ours else 1
        for i in range(count):
            modules[published.replace("{i}", str(i))] = ours.replace("{i}", str(i))
    return modules


def published_parameters(model: Transformer) -> dict[str, tuple[nn.Module, str]]:
    """Published tensor name -> the module that holds it and its attribute there."""
    places = {}
    for published, ours in published_modules(model.spec).items():
        module = model.get_submodule(ours)
        for attribute, _ in module.named_parameters(recurse=False):
            places[f"{published}.{attribute}"] = (module, attribute)
    return places
