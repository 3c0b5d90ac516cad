"""An adapter's tensors: which module each belongs to, whichever of PEFT's spellings names it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from d2f.errors import CheckpointError, counted
from d2f.models.spec import ModelSpec, published_modules
from d2f.models.storage import FLOATS, StoredTensor

PREFIX = "base_model.model."
"""What PEFT writes before the name of each module."""
MERGE = "merge the adapter into its base model with peft and load the result"
"""The remedy where an adapter is more than this core computes."""
# Segments that wrappers of a model (torch.compile, FSDP, checkpointing) put into its names.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
# A module that PEFT wraps, when all of the wrapped model was saved.
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.[^.]+)?)(?=\.[^.]+$)")
_UNTRAINED = ".original_module."  # what PEFT keeps of a module that it trains whole
_VARIANTS = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "LoRA of an embedding",
    "lora_B.bias": "LoRA with a bias",
    "trainable_tokens": "training of single tokens",
}


def lora_keys(published: str) -> tuple[str, str]:
    """The names of both halves of a module's adapter, as PEFT writes them.

    Example:
        >>> lora_keys("lm_head")[0]
        'base_model.model.lm_head.lora_A.weight'
    """
    a, b = (f"{PREFIX}{published}.lora_{half}.weight" for half in "AB")
    return a, b


def scale_key(half: str) -> str:
    """The name of the scales of a half in 8 bits."""
    return f"{half.removesuffix('.weight')}.scale"


def sort_tensors(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    spec: ModelSpec,
    kinds: Collection[str] = tuple(FLOATS),
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The halves of the adapter by `lora_keys`, and copies of the base's tensors by their names.

    Names of an adapter (`lora_A.default.weight`) and of wrappers (`_orig_mod.`) are left out, and
    PEFT's prefix is put before names without it.

    Raises:
        CheckpointError: The file holds several adapters, a variant of LoRA that is not supported,
            or numbers of another type than `kinds`, as headers name them.
    """
    modules = published_modules(spec)
    halves: dict[str, StoredTensor] = {}
    copies: dict[str, StoredTensor] = {}
    adapters: set[str | None] = set()
    for stored_name, tensor in stored.items():
        name = _plain(stored_name)
        for sign, variant in _VARIANTS.items():
            if sign in name:
                raise CheckpointError(
                    f"{folder}: {stored_name} belongs to {variant}, which is not supported; {MERGE}"
                )
        match = _LORA.fullmatch(name)
        if _UNTRAINED in name:
            continue
        if match is None:
            name = _WRAPPED.sub("", name)
            module, _, attribute = name.rpartition(".")
            copies[f"{_known(module, modules)}.{attribute}"] = tensor
            continue
        if tensor.kind not in kinds:
            raise CheckpointError(
                f"{folder}: {stored_name} is {tensor.kind}; only {', '.join(kinds)} are supported"
            )
        adapters.add(match["adapter"])
        halves[lora_keys(_known(match["module"], modules))["AB".index(match["half"])]] = tensor
    if len(adapters) > 1:
        names = ", ".join(sorted(str(name) for name in adapters))
        raise CheckpointError(
            f"{folder} holds several adapters ({names}); save the one that is wanted by itself"
        )
    return halves, copies


def _plain(name: str) -> str:
    segments = [segment for segment in name.split(".") if segment not in _WRAPPERS]
    if segments[0] == "module":  # of data-parallel training
        segments = segments[1:]
    name = ".".join(segments)
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
    return name


def _known(module: str, modules: Mapping[str, str]) -> str:
    """The published name of a module; adapters of the trunk alone leave out its first part."""
    return f"model.{module}" if module not in modules and f"model.{module}" in modules else module


def misfit(
    folder: Path,
    problems: str,
    halves: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, int]],
    spec: ModelSpec,
) -> str:
    """Why an adapter's tensors do not fit, worded for an error.

    Args:
        folder: The adapter.
        problems: What is missing, unexpected or wrongly shaped.
        halves: Its tensors by `lora_keys`.
        shapes: (outputs, inputs) of the modules that can be adapted, by published name.
        spec: The model's.
    """
    ranks: set[int] = set()
    for module, (outputs, inputs) in shapes.items():
        a, b = lora_keys(module)
        for key, size, axis in ((a, inputs, 1), (b, outputs, 0)):
            shape = halves[key].shape if key in halves else ()
            if key in halves and (len(shape) != 2 or shape[axis] != size):
                return _another(folder, problems, spec)
            ranks |= {shape[1 - axis]} if key in halves else set()
    known = {key for module in shapes for key in lora_keys(module)}
    if any(key not in known for key in halves):
        return _another(folder, problems, spec)
    layers = {int(number) for key in halves for number in re.findall(r"\.(\d+)\.", key)}
    if layers and max(layers) + 1 < spec.num_layers and layers == set(range(len(layers))):
        return _another(folder, problems, spec)
    where = folder / "adapter_config.json"
    if "missing" not in problems and "unexpected" not in problems:
        found = ", ".join(map(str, sorted(ranks)))
        return f"{where}: r and rank_pattern do not fit the tensors, of rank {found}: {problems}"
    return f"{where}: target_modules does not fit the tensors: {problems}"


def _another(folder: Path, problems: str, spec: ModelSpec) -> str:
    return (
        f"{folder} is an adapter for another model than this {spec.architecture.name} of "
        f"{counted(spec.num_layers, 'layer')} and width {spec.hidden_size}: {problems}"
    )
