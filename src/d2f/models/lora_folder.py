"""The folder of an adapter: its tensors, checked by their headers against the model it is for.

Shapes: R rank, I inputs, O outputs of a projection.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2f.diffusion.policy import DecodingPolicy
from d2f.errors import CheckpointError, ConfigError, counted
from d2f.gguf.folder import linked_gguf
from d2f.models.families.dream import read_as_diffusion
from d2f.models.lora_config import (
    CONFIG_FILE,
    DECLARATION_FILE,
    MERGE,
    Declaration,
    LoraConfig,
    read_config,
    read_declaration,
)
from d2f.models.lora_int8 import from_int8, num_groups
from d2f.models.spec import ModelSpec, published_modules
from d2f.models.storage import (
    FLOATS,
    StoredTensor,
    compare_tensors,
    read_headers,
    read_json,
    read_max_new_tokens,
    read_policy,
    read_tensor,
    read_tensors,
    some_names,
)
from d2f.models.transformer import Transformer, published_parameters

FLOAT_STEM, INT8_STEM = "adapter_model", "adapter_int8"
"""Names of the file with the tensors, without `.safetensors`."""
_PREFIX = "base_model.model."  # what PEFT writes before the name of each module
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


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """An adapter's folder, as its config and headers describe it."""

    config: LoraConfig
    targets: dict[str, str]
    """Modules that it adapts: published name -> ours."""
    halves: dict[str, StoredTensor]
    """Tensors of the adapter by `lora_keys`."""
    copies: dict[str, StoredTensor]
    """Tensors of the base model that were saved with it, by their published names."""
    base_model: str | None
    """Name or path of the model that the adapter was trained on, as its maker gave it."""
    declaration: Declaration | None
    """Declaration that d2f has written beside the adapter; None: others made it."""
    scales: dict[str, StoredTensor]
    """int8: the scales of `halves` by `scale_key`; else empty."""

    def read(self, published: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both halves of a module's adapter in fp32: (R, I) and (O, R)."""
        keys = lora_keys(published)
        halves = [self.halves[key] for key in keys]
        if not self.scales:
            a_RI, b_OR = read_tensors(halves, device, torch.float32)
            return a_RI, b_OR
        scales = [self.scales[scale_key(key)] for key in keys]
        a, b, a_scale, b_scale = read_tensors([*halves, *scales], device)
        return from_int8(a, a_scale, b, b_scale)


def adapter_entries(folder: Path) -> tuple[Mapping[str, Any], Declaration | None]:
    """PEFT's entries of an adapter's folder, and what d2f declares there.

    Raises `CheckpointError` if something is missing or broken.
    """
    declared = read_declaration(folder)
    if declared is not None and declared.lora is not None:
        return declared.lora, declared
    where = folder / CONFIG_FILE
    if not where.exists() and (folder / "config.json").exists():
        named = linked_gguf(folder) or folder
        raise CheckpointError(f"{named} holds a whole model, not an adapter; load it by itself")
    return read_json(where), declared


def adapter_headers(folder: Path, declared: Declaration | None) -> dict[str, StoredTensor]:
    """The tensors of an adapter's folder by their names there; raises `CheckpointError`."""
    int8 = declared is not None and declared.dtype == "int8"
    return read_headers(folder, INT8_STEM if int8 else FLOAT_STEM)


def read_adapter(folder: Path, spec: ModelSpec) -> StoredAdapter:
    """Read an adapter's folder, checked by header.

    Raises `CheckpointError` if it is not supported or does not belong to a model of this spec.
    """
    values, declared = adapter_entries(folder)
    stored = adapter_headers(folder, declared)
    int8 = declared is not None and declared.dtype == "int8"
    where = folder / (DECLARATION_FILE if int8 else CONFIG_FILE)
    with_adapter(spec, folder)  # refuses another architecture
    try:
        config = read_config(values, spec, where)
        targets = config.targets(spec)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    scales = {n: t for n, t in stored.items() if int8 and n.endswith(".scale")}
    rest = {n: t for n, t in stored.items() if n not in scales}
    halves, copies = _sort_tensors(folder, rest, spec, ("I8",) if int8 else tuple(FLOATS))
    _check_saved_modules(values.get("modules_to_save"), copies, where)
    with torch.device("meta"):
        model = Transformer(spec)
    shapes = {
        published: tuple(model.get_parameter(f"{ours}.weight").shape)
        for published, ours in published_modules(spec).items()
        if ours.endswith("_proj")
    }
    wanted: dict[str, tuple[int, ...]] = {}
    for published in targets:
        (rows, columns), rank = shapes[published], config.rank(published)
        wanted |= dict(zip(lora_keys(published), [(rank, columns), (rows, rank)], strict=True))
    problems = compare_tensors(halves, wanted)
    if problems:
        raise CheckpointError(_misfit(folder, problems, halves, shapes, spec))
    if int8:
        _check_scales(folder, scales, wanted)
    base = values.get("base_model_name_or_path")
    return StoredAdapter(
        config=config,
        targets=targets,
        halves=halves,
        copies=_check_copies(folder, copies, model),
        base_model=base if isinstance(base, str) and base else None,
        declaration=declared,
        scales=scales,
    )


def with_adapter(spec: ModelSpec, folder: Path) -> ModelSpec:
    """The spec of a model with the adapter of this folder.

    The base may be read as a diffusion model, and the adapter may carry a decoding policy and the
    length of an answer (generation_config.json). A diffusion model with an adapter counts as
    distilled unless the adapter says otherwise: those that the paper's authors publish carry no
    policy, and are decoded with the default one. Raises `CheckpointError` if a file is broken, or
    the base is of another architecture, kind or vocabulary.
    """
    declared = read_declaration(folder)
    if declared is not None:
        spec = _declared_spec(spec, folder, declared)
    policy = read_policy(folder) or spec.recommended_policy
    causal = spec.architecture.causal
    distilled = causal or policy is not None or declared is None or declared.distilled
    if policy is None and distilled and not causal:
        policy = DecodingPolicy()
    return replace(
        spec,
        recommended_policy=policy,
        recommended_max_new_tokens=read_max_new_tokens(folder) or spec.recommended_max_new_tokens,
        distilled=distilled,
    )


def _declared_spec(spec: ModelSpec, folder: Path, declared: Declaration) -> ModelSpec:
    """The base's spec as the adapter reads it; one that is read as a diffusion model stays."""
    mask, name, base = declared.mask_token_id, spec.architecture.name, declared.base
    own = spec.read_from or name
    if mask is not None and not spec.architecture.causal and spec.read_from is None:
        raise CheckpointError(
            f"{folder} reads an autoregressive base, a {base.model_type}, as a diffusion model, "
            f"and this {name} is one already; give the base that the adapter was trained on, or, "
            "if the adapter is merged into this model, leave the adapter out"
        )
    if (own, spec.vocab_size) != (base.model_type, base.vocab_size):
        raise CheckpointError(
            f"{folder} is an adapter for another model: it was trained on a {base.model_type} "
            f"of {counted(base.vocab_size, 'token')}, and this is a {own} of "
            f"{spec.vocab_size}; give the base that it was trained on"
        )
    if mask is not None and spec.read_from is None:
        return read_as_diffusion(spec, mask)
    if mask is not None and spec.mask_token_id != mask:
        raise CheckpointError(
            f"{folder} was trained with the mask token {mask}, and the model was read as a "
            f"diffusion model with {spec.mask_token_id}; read it with mask_token_id {mask}"
        )
    return spec


def require_same_weights(
    folder: Path, copies: Mapping[str, StoredTensor], model: Transformer
) -> None:
    """Refuse tensors beside the adapter that differ from the model's; raises `CheckpointError`."""
    places = _places(model)
    different = []
    for name, tensor in copies.items():
        own = getattr(*places[name]).detach()
        saved = read_tensor(tensor, own.device)
        # One of them may have been rounded to a narrower type.
        types = (saved.dtype, own.dtype)
        if not any(torch.equal(saved.to(kind), own.to(kind)) for kind in types):
            different.append(name)
    if different:
        raise CheckpointError(
            f"{folder} holds {some_names(different)} otherwise than the model, so it was trained "
            f"with the adapter or is another model's; {MERGE}"
        )


def _places(model: Transformer) -> dict[str, tuple[nn.Module, str]]:
    """Published names of the parameters, a tied head among them."""
    places, names = published_parameters(model), model.spec.architecture.names
    if model.spec.tie_embeddings:
        places[f"{names['lm_head']}.weight"] = places[f"{names['embed']}.weight"]
    return places


def _check_scales(
    folder: Path, scales: Mapping[str, StoredTensor], halves: Mapping[str, tuple[int, ...]]
) -> None:
    """The scales must be those of the halves of these shapes, by header."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in halves.items():
        groups = (rows, num_groups(columns)) if "lora_A" in name else (num_groups(rows), columns)
        wanted[scale_key(name)] = groups
    problems = compare_tensors(scales, wanted)
    kinds = {tensor.kind for tensor in scales.values()} - FLOATS.keys()
    if problems or kinds:
        problems = problems or f"they are {', '.join(sorted(kinds))}"
        raise CheckpointError(f"{folder}: the scales do not fit: {problems}; fetch it again")


def _check_saved_modules(named: object, copies: Mapping[str, StoredTensor], where: Path) -> None:
    """Check that the file holds tensors of modules that were trained whole; compared later."""
    stored = {name.rpartition(".")[0] for name in copies}
    for module in named if isinstance(named, list) else [] if named is None else [named]:
        if not any(f".{name}".endswith(f".{module}") for name in stored):
            raise CheckpointError(
                f"{where}: modules_to_save is {named!r}, which is not supported; {MERGE}"
            )


def _check_copies(
    folder: Path, copies: Mapping[str, StoredTensor], model: Transformer
) -> dict[str, StoredTensor]:
    """Return those copies that are parameters of the model, by header; buffers are left out."""
    kept, places = {}, _places(model)
    for name, tensor in copies.items():
        if name not in places:
            if tensor.kind not in FLOATS or name.endswith("inv_freq"):
                continue
            raise CheckpointError(
                f"{folder} holds {tensor.name}, which is no tensor of an adapter nor of this "
                f"{model.spec.architecture.name}; remove it"
            )
        shape = tuple(getattr(*places[name]).shape)
        if tensor.kind not in FLOATS or tensor.shape != shape:
            raise CheckpointError(
                f"{folder} holds {name} as {tensor.kind} of {list(tensor.shape)}, where the model "
                f"has {list(shape)}; {MERGE}"
            )
        kept[name] = tensor
    return kept


# ------------------------------------------------------------------------------ names of tensors


def lora_keys(published: str) -> tuple[str, str]:
    """The names of both halves of a module's adapter, as PEFT writes them.

    Example:
        >>> lora_keys("lm_head")[0]
        'base_model.model.lm_head.lora_A.weight'
    """
    a, b = (f"{_PREFIX}{published}.lora_{half}.weight" for half in "AB")
    return a, b


def scale_key(half: str) -> str:
    """The name of the scales of a half in 8 bits."""
    return f"{half.removesuffix('.weight')}.scale"


def _sort_tensors(
    folder: Path, stored: Mapping[str, StoredTensor], spec: ModelSpec, kinds: Collection[str]
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The halves of the adapter by `lora_keys`, and copies of the base's tensors by their names.

    Names of an adapter (`lora_A.default.weight`) and of wrappers (`_orig_mod.`) are left out, and
    PEFT's prefix is put before names without it. Several adapters, variants of LoRA and numbers of
    another type than `kinds` are refused.
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
            module, _, attribute = _WRAPPED.sub("", name).rpartition(".")
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
    while name.startswith(_PREFIX):
        name = name.removeprefix(_PREFIX)
    return name


def _known(module: str, modules: Mapping[str, str]) -> str:
    """The published name of a module; adapters of the trunk alone leave out its first part."""
    return f"model.{module}" if module not in modules and f"model.{module}" in modules else module


def _misfit(
    folder: Path,
    problems: str,
    halves: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    spec: ModelSpec,
) -> str:
    """Say why an adapter's halves do not fit modules of these shapes (O, I), for an error."""
    another = (
        f"{folder} is an adapter for another model than this {spec.architecture.name} of "
        f"{counted(spec.num_layers, 'layer')} and width {spec.hidden_size}: {problems}"
    )
    sides = {
        key: (size, axis)
        for module, (outputs, inputs) in shapes.items()
        for key, size, axis in zip(lora_keys(module), (inputs, outputs), (1, 0), strict=True)
    }
    ranks: set[int] = set()
    for key, tensor in halves.items():
        size, axis = sides.get(key, (0, 0))
        if len(tensor.shape) != 2 or tensor.shape[axis] != size:
            return another
        ranks.add(tensor.shape[1 - axis])
    layers = {int(number) for key in halves for number in re.findall(r"\.(\d+)\.", key)}
    if layers and max(layers) + 1 < spec.num_layers and layers == set(range(len(layers))):
        return another
    where = folder / CONFIG_FILE
    if "missing" not in problems and "unexpected" not in problems:
        found = ", ".join(map(str, sorted(ranks)))
        return f"{where}: r and rank_pattern do not fit the tensors, of rank {found}: {problems}"
    return f"{where}: target_modules does not fit the tensors: {problems}"
