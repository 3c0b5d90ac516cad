"""The folder of an adapter, checked by its headers against the model that it is for.

Shapes: R rank, I inputs, O outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2f.errors import CheckpointError, ConfigError
from d2f.gguf.folder import linked_gguf
from d2f.models.base_fingerprint import Fingerprint
from d2f.models.lora_config import LoraConfig, read_config
from d2f.models.lora_declaration import (
    CONFIG_FILE,
    DECLARATION_FILE,
    Declaration,
    adapted_spec,
    read_declaration,
)
from d2f.models.lora_int8 import from_int8, num_groups
from d2f.models.lora_tensors import MERGE, lora_keys, misfit, scale_key, sort_tensors
from d2f.models.spec import ModelSpec, published_modules
from d2f.models.storage import (
    FLOATS,
    StoredTensor,
    compare_tensors,
    read_headers,
    read_json,
    read_tensor,
    read_tensors,
    some_names,
)
from d2f.models.transformer import Transformer, published_parameters

FLOAT_STEM, INT8_STEM = "adapter_model", "adapter_int8"
"""Names of the file with the tensors, without `.safetensors`."""


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """An adapter's folder, as its config and headers describe it."""

    config: LoraConfig
    targets: dict[str, str]
    """Modules that it adapts: published name -> ours."""
    halves: dict[str, StoredTensor]
    """Its tensors by `lora_keys`."""
    copies: dict[str, StoredTensor]
    """Tensors of the base model that were saved with it, by their published names."""
    base_model: str | None
    """What it was trained on, as the one who saved it called that."""
    declaration: Declaration | None
    """What d2f has written beside it; None: others made it."""
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
    """What an adapter's folder holds, checked by header.

    Raises `CheckpointError` if it is not supported or does not belong to a model of this spec.
    """
    values, declared = adapter_entries(folder)
    stored = adapter_headers(folder, declared)
    int8 = declared is not None and declared.dtype == "int8"
    where = folder / (DECLARATION_FILE if int8 else CONFIG_FILE)
    adapted_spec(spec, folder, declared)  # refuses another architecture
    try:
        config = read_config(values, spec, where)
        targets = config.targets(spec)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    scales = {n: t for n, t in stored.items() if int8 and n.endswith(".scale")}
    rest = {n: t for n, t in stored.items() if n not in scales}
    halves, copies = sort_tensors(folder, rest, spec, ("I8",) if int8 else tuple(FLOATS))
    _check_saved_modules(values.get("modules_to_save"), copies, where)
    modules = published_modules(spec)
    sizes = _linear_shapes(spec)
    shapes = {
        published: sizes[ours.rsplit(".", 1)[-1]]
        for published, ours in modules.items()
        if ours.rsplit(".", 1)[-1] in sizes
    }
    wanted: dict[str, tuple[int, ...]] = {}
    for published in targets:
        rows, columns = shapes[published]
        rank = config.rank(published)
        wanted |= dict(zip(lora_keys(published), [(rank, columns), (rows, rank)], strict=True))
    problems = compare_tensors(halves, wanted)
    if problems:
        raise CheckpointError(misfit(folder, problems, halves, shapes, spec))
    if int8:
        _check_scales(folder, scales, wanted)
    base = values.get("base_model_name_or_path")
    return StoredAdapter(
        config=config,
        targets=targets,
        halves=halves,
        copies=_check_copies(folder, copies, spec),
        base_model=base if isinstance(base, str) and base else None,
        declaration=declared,
        scales=scales,
    )


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
    """Of modules that were trained whole the file must hold the tensors; compared later."""
    stored = {name.rpartition(".")[0] for name in copies}
    for module in named if isinstance(named, list) else [] if named is None else [named]:
        if not any(f".{name}".endswith(f".{module}") for name in stored):
            raise CheckpointError(
                f"{where}: modules_to_save is {named!r}, which is not supported; {MERGE}"
            )


def _check_copies(
    folder: Path, copies: Mapping[str, StoredTensor], spec: ModelSpec
) -> dict[str, StoredTensor]:
    """Those copies that are parameters of the model, by header; buffers are left out.

    Raises `CheckpointError` for what is no tensor of the model, or one of another shape.
    """
    kept = {}
    places = parameter_places(spec) if copies else {}
    for name, tensor in copies.items():
        if name not in places:
            if tensor.kind not in FLOATS or name.endswith("inv_freq"):
                continue
            raise CheckpointError(
                f"{folder} holds {tensor.name}, which is no tensor of an adapter nor of this "
                f"{spec.architecture.name}; remove it"
            )
        shape = tuple(getattr(*places[name]).shape)
        if tensor.kind not in FLOATS or tensor.shape != shape:
            raise CheckpointError(
                f"{folder} holds {name} as {tensor.kind} of {list(tensor.shape)}, where the model "
                f"has {list(shape)}; {MERGE}"
            )
        kept[name] = tensor
    return kept


def require_same_base(
    folder: Path, found: StoredAdapter, expected: Fingerprint, fingerprint: Fingerprint
) -> None:
    """Refuse a model of the same shape that is not the base; raises `CheckpointError`."""
    difference = expected.difference(fingerprint)
    if difference is not None:
        name = f"'{found.base_model}'" if found.base_model else "the one that it was trained on"
        raise CheckpointError(
            f"{folder} is an adapter for another model of this shape: {difference}; load {name}, "
            "in any precision"
        )


def require_equal_copies(
    folder: Path, copies: Mapping[str, StoredTensor], model: Transformer
) -> None:
    """Refuse tensors beside the adapter that differ from the model's; raises `CheckpointError`."""
    places = parameter_places(model.spec, model)
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


def parameter_places(
    spec: ModelSpec, model: Transformer | None = None
) -> dict[str, tuple[nn.Module, str]]:
    """Published names of the parameters, a tied head among them."""
    if model is None:
        with torch.device("meta"):
            model = Transformer(spec)
    places = published_parameters(model)
    if spec.tie_embeddings:
        embed, head = (spec.architecture.names[name] for name in ("embed", "lm_head"))
        places[f"{head}.weight"] = places[f"{embed}.weight"]
    return places


def _linear_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the projections of a layer."""
    with torch.device("meta"):
        layer = Transformer(replace(spec, num_layers=1)).layers[0]
    return {
        name.rsplit(".", 1)[-1]: (module.out_features, module.in_features)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
