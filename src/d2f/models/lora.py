"""LoRA adapters in PEFT's format: `y = W x + scale * B A x` beside frozen projections.

Shapes: R rank, I inputs, O outputs of a projection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from d2f.diffusion.policy import DecodingPolicy
from d2f.errors import CheckpointError, ConfigError, unknown_name
from d2f.hub import resolve_folder
from d2f.models.base_fingerprint import Fingerprint, take_fingerprint
from d2f.models.lora_config import LoraConfig, read_config, written_config
from d2f.models.lora_declaration import (
    ADAPTER_DTYPES,
    CONFIG_FILE,
    DECLARATION_FILE,
    Declaration,
    adapted_spec,
    read_declaration,
)
from d2f.models.lora_int8 import from_int8, num_groups, to_int8
from d2f.models.lora_tensors import MERGE, lora_keys, misfit, scale_key, sort_tensors
from d2f.models.names import published_modules, published_parameters
from d2f.models.spec import ModelSpec
from d2f.models.storage import (
    FLOATS,
    GENERATION_FILE,
    POLICY_FILE,
    StoredTensor,
    compare_tensors,
    read_headers,
    read_json,
    read_max_new_tokens,
    read_policy,
    read_tensor,
    replaced_folder,
    some_names,
    write_json,
)
from d2f.models.transformer import Transformer

_FLOAT_STEM, _INT8_STEM = "adapter_model", "adapter_int8"
_OWNED = (
    f"{_FLOAT_STEM}*.safetensors", f"{_INT8_STEM}*.safetensors", CONFIG_FILE, DECLARATION_FILE,
    POLICY_FILE,
)  # fmt: skip


class LoraLinear(nn.Module):
    """A frozen projection with a low-rank update beside it, which can be switched off.

    The update is computed in its own dtype (fp32) and rounded once to that of the projection;
    under autocast in that of autocast, without an fp32 copy of x, as a trained adapter keeps what
    it reads for the backward pass.

    Example:
        >>> a_RI, b_OR = torch.ones(2, 4), torch.ones(6, 2)
        >>> layer = LoraLinear(nn.Linear(4, 6), a_RI, b_OR, LoraConfig(), 1.0)
        >>> layer(torch.ones(1, 4)).shape
        torch.Size([1, 6])
    """

    def __init__(
        self, base: nn.Linear, a_RI: Tensor, b_OR: Tensor, config: LoraConfig, scale: float
    ) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(a_RI)
        self.lora_B = nn.Parameter(b_OR)
        self.config = config
        self.scale = scale
        # A plain attribute: torch.compile guards on it and keeps one graph for either value.
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """The projection of x (…, I), with the update unless it is switched off: (…, O)."""
        out = self.base(x)
        if not self.enabled:
            return out
        dropped = F.dropout(x, self.config.dropout, self.training)
        if not torch.is_autocast_enabled(x.device.type):
            dropped = dropped.to(self.lora_A.dtype)
        update = F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.scale
        return out + update.to(out.dtype)


def _adapted(model: Transformer) -> dict[str, LoraLinear]:
    """Our module name -> its adapter."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def has_adapter(model: Transformer) -> bool:
    """Whether the model carries an adapter that is not merged."""
    return bool(_adapted(model))


def adapter_parameters(model: Transformer) -> list[nn.Parameter]:
    """The weights of the adapter, empty if there is none."""
    return [p for m in _adapted(model).values() for p in (m.lora_A, m.lora_B)]


def attach_adapter(model: Transformer, config: LoraConfig, generator: torch.Generator) -> None:
    """Put a fresh adapter beside the model's projections, which changes no output yet.

    A is uniform as PEFT draws it, from `generator` (on the CPU), B is 0. The adapter is in fp32
    and requires gradients; the rest of the model is frozen.

    Raises:
        ConfigError: The model carries an adapter already, or `target_modules` names none of its
            modules.

    Example:
        >>> from d2f.testing import tiny_model
        >>> model = tiny_model("llada")
        >>> attach_adapter(model, LoraConfig(r=4, alpha=8), torch.Generator().manual_seed(0))
        >>> len(adapter_parameters(model))
        16
    """
    _require_no_adapter(model)
    targets = config.targets(model.spec)
    model.requires_grad_(False)
    # Now, since weights may be in shards when the adapter is saved. Some models hold no weights.
    found = None if model.embed.weight.is_meta else _fingerprint(model)
    model.spec = replace(model.spec, adapter_base=found)
    for published, ours in targets.items():
        base = model.get_submodule(ours)
        assert isinstance(base, nn.Linear)
        rank = config.rank(published)
        bound = 1 / math.sqrt(base.in_features)
        a_RI = (torch.rand(rank, base.in_features, generator=generator) * 2 - 1) * bound
        b_OR = torch.zeros(base.out_features, rank)
        new = LoraLinear(base, a_RI, b_OR, config, config.scale(published))
        _replace(model, ours, new.to(base.weight.device).train(model.training))


def _fingerprint(model: Transformer) -> Fingerprint:
    places = published_parameters(model)
    return take_fingerprint({name: getattr(*place) for name, place in places.items()})


def load_adapter(model: Transformer, path_or_hub_id: str | Path, *, merge: bool = True) -> None:
    """Put a stored adapter on the model, and its decoding policy if it carries one.

    Args:
        model: The adapter's base model, without another adapter.
        path_or_hub_id: Folder or hub id with adapter_config.json and adapter_model.safetensors.
        merge: Add it to the weights (see `merge_adapter`) rather than keep it beside them, in
            fp32 and requiring no gradient.

    Raises:
        CheckpointError: The folder is broken, the adapter is of a kind that is not supported or
            belongs to another model, or it reads its base as a diffusion model and this one is not
            read so (`as_diffusion`; `load_model` does both). The model is then as it was.
        ConfigError: The model carries an adapter already.

    Example:
        >>> from d2f.testing import tiny_model, write_adapter
        >>> import tempfile
        >>> model = tiny_model("Dream")
        >>> load_adapter(model, write_adapter(tempfile.mkdtemp(), "Dream"), merge=False)
        >>> has_adapter(model)
        True
    """
    _require_no_adapter(model)
    folder = resolve_folder(path_or_hub_id)
    found = read_adapter(folder, model.spec)
    declared = found.declaration
    if declared is not None and declared.mask_token_id is not None and model.spec.read_from is None:
        raise CheckpointError(
            f"{folder} reads its base as a diffusion model; use load_model(base, adapter=…), or "
            f"as_diffusion(model, mask_token_id={declared.mask_token_id}) first"
        )
    _require_equal_copies(folder, found.copies, model)
    fingerprint = _fingerprint(model)
    _require_same_base(folder, found, fingerprint)
    new = {}
    for published, ours in found.targets.items():
        base = model.get_submodule(ours)
        assert isinstance(base, nn.Linear)
        a_RI, b_OR = found.read(published, base.weight.device)
        new[ours] = LoraLinear(base, a_RI, b_OR, found.config, found.config.scale(published))
    for ours, module in new.items():
        _replace(model, ours, module.requires_grad_(False).train(model.training))
    model.spec = replace(with_adapter(model.spec, folder), adapter_base=fingerprint)
    if merge:
        merge_adapter(model)


def _require_same_base(folder: Path, found: StoredAdapter, fingerprint: Fingerprint) -> None:
    """Refuse a model of the same shape that is not the base, where the adapter knows its base."""
    if found.declaration is None or found.declaration.fingerprint is None:
        return
    difference = found.declaration.fingerprint.difference(fingerprint)
    if difference is not None:
        name = f"'{found.base_model}'" if found.base_model else "the one that it was trained on"
        raise CheckpointError(
            f"{folder} is an adapter for another model of this shape: {difference}; load {name}, "
            "in any precision"
        )


def with_adapter(spec: ModelSpec, folder: Path) -> ModelSpec:
    """The spec of a model with the adapter of this folder.

    The base may be read as a diffusion model, and the adapter may carry a decoding policy and the
    length of an answer (generation_config.json). A diffusion model with an adapter counts as
    distilled unless the adapter says otherwise: those that the paper's authors publish carry no
    policy, and are decoded with the default one.

    Raises:
        CheckpointError: A file is broken, or the base is of another architecture.
    """
    declared = read_declaration(folder)
    spec = adapted_spec(spec, folder, declared)
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
        if not self.scales:
            a_RI, b_OR = (read_tensor(self.halves[k], device, torch.float32) for k in keys)
            return a_RI, b_OR
        a, b = (read_tensor(self.halves[k], device, torch.int8) for k in keys)
        a_scale, b_scale = (read_tensor(self.scales[scale_key(k)], device) for k in keys)
        return from_int8(a, a_scale, b, b_scale)


def read_adapter(folder: Path, spec: ModelSpec) -> StoredAdapter:
    """What an adapter's folder holds, checked by header.

    Raises `CheckpointError` if it is not supported or does not belong to a model of this spec.
    """
    declared = read_declaration(folder)
    int8 = declared is not None and declared.lora is not None
    where = folder / (DECLARATION_FILE if int8 else CONFIG_FILE)
    if not where.exists() and (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds a whole model, not an adapter; load it by itself")
    adapted_spec(spec, folder, declared)  # refuses another architecture
    values = declared.lora if declared is not None and declared.lora is not None else {}
    values = values or read_json(where)
    try:
        config = read_config(values, spec, where)
        targets = config.targets(spec)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    stored = read_headers(folder, _INT8_STEM if int8 else _FLOAT_STEM)
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
    places = _places(spec) if copies else {}
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


def _require_equal_copies(
    folder: Path, copies: Mapping[str, StoredTensor], model: Transformer
) -> None:
    """Refuse tensors beside the adapter that differ from the model's own."""
    places = _places(model.spec, model)
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


def _places(spec: ModelSpec, model: Transformer | None = None) -> dict[str, tuple[nn.Module, str]]:
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
        name: (module.out_features, module.in_features)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }


def _require_no_adapter(model: Transformer) -> None:
    if has_adapter(model):
        raise ConfigError(
            "the model carries an adapter already; merge it first (merge_adapter), or load the "
            "base model again"
        )


def _replace(model: Transformer, ours: str, module: nn.Module) -> None:
    parent, name = ours.rsplit(".", 1)
    setattr(model.get_submodule(parent), name, module)


@contextmanager
def adapter_disabled(model: Transformer) -> Iterator[None]:
    """Within the block the model computes as if it had no adapter (the teacher's view).

    May be nested. Raises `ConfigError` if there is no adapter to switch off.
    """
    modules = list(_adapted(model).values())
    if not modules:
        raise ConfigError("the model carries no adapter that could be switched off")
    before = [module.enabled for module in modules]
    try:
        for module in modules:
            module.enabled = False
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled


@torch.no_grad()
def merge_adapter(model: Transformer) -> None:
    """Add the adapter to the weights: `W + scale * B A`, in fp32 and rounded once.

    The merged weights are new tensors, so a model that shares the old ones keeps them. Raises
    `ConfigError` if the model carries no adapter.
    """
    adapted = _adapted(model)
    if not adapted:
        raise ConfigError("the model carries no adapter that could be merged")
    for ours, module in adapted.items():
        base = module.base
        update_OI = (module.lora_B.float() @ module.lora_A.float()) * module.scale
        merged_OI = (base.weight.float() + update_OI).to(base.weight.dtype)
        base.weight = nn.Parameter(merged_OI, requires_grad=False)
        _replace(model, ours, base)


def save_adapter(
    model: Transformer,
    folder: str | Path,
    *,
    base_model: str = "",
    dtype: str = "float32",
    distilled: bool = True,
) -> None:
    """Write the model's adapter as PEFT does, and what else it takes to load it.

    That is the model's decoding policy and length of an answer if it has them, and
    d2f_adapter.json: whether the base is read as a diffusion model, and what tells it from others.
    PEFT does not read 8 bits, so an adapter in int8 has no adapter_config.json.

    Args:
        model: A model with an adapter that is not merged.
        folder: Replaced as a whole once all is written; other files in it stay.
        base_model: Hub id or folder of the base model, noted in adapter_config.json.
        dtype: `float32`, `bfloat16`, or `int8`, which loses less than 1% of the update.
        distilled: Whether it was trained to be decoded in blocks; False: it is decoded by
            `vanilla` unless it carries a policy.

    Raises:
        ConfigError: The model carries no adapter, `dtype` is unknown, or numbers are not finite.
        CheckpointError: The folder cannot be written.

    Example:
        >>> from d2f.testing import tiny_adapter, tiny_model
        >>> import tempfile
        >>> model, folder = tiny_model("Dream"), tempfile.mkdtemp()
        >>> tiny_adapter(model)
        >>> save_adapter(model, folder, dtype="int8")
        >>> load_adapter(tiny_model("Dream"), folder)
    """
    adapted, spec = _adapted(model), model.spec
    if not adapted:
        raise ConfigError("the model carries no adapter that could be saved")
    if dtype not in ADAPTER_DTYPES:
        raise ConfigError(unknown_name("dtype of an adapter", dtype, ADAPTER_DTYPES))
    config = written_config(next(iter(adapted.values())).config, spec, base_model)
    int8 = dtype == "int8"
    declared = Declaration(
        base_type=spec.read_from or spec.architecture.name,
        vocab_size=spec.vocab_size,
        mask_token_id=None if spec.read_from is None else spec.mask_token_id,
        distilled=distilled,
        dtype=dtype,
        fingerprint=spec.adapter_base,
        lora=config if int8 else None,
    )
    tensors = _stored_tensors(model, dtype)
    with replaced_folder(Path(folder), _OWNED) as new:
        if not int8:
            write_json(new / CONFIG_FILE, config)
        write_json(new / DECLARATION_FILE, declared.to_dict())
        stem = _INT8_STEM if int8 else _FLOAT_STEM
        save_file(tensors, new / f"{stem}.safetensors", metadata={"format": "pt"})
        if spec.recommended_policy is not None:
            write_json(new / POLICY_FILE, spec.recommended_policy.to_dict())
        limit = spec.recommended_max_new_tokens
        if limit is not None and not (Path(folder) / GENERATION_FILE).exists():
            write_json(new / GENERATION_FILE, {"max_new_tokens": limit})


def _stored_tensors(model: Transformer, dtype: str) -> dict[str, Tensor]:
    """The tensors of the adapter's file, by their names there."""
    published = {ours: name for name, ours in published_modules(model.spec).items()}
    tensors: dict[str, Tensor] = {}
    for ours, module in _adapted(model).items():
        a_RI, b_OR = module.lora_A.detach(), module.lora_B.detach()
        keys = lora_keys(published[ours])
        if dtype == "int8":
            names = [name for key in keys for name in (key, scale_key(key))]
            tensors |= dict(zip(names, to_int8(a_RI, b_OR), strict=True))
        else:
            halves = (half.to(getattr(torch, dtype)).contiguous() for half in (a_RI, b_OR))
            tensors |= dict(zip(keys, halves, strict=True))
    return tensors
