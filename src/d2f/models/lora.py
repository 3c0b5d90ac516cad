"""LoRA adapters in PEFT's format: `y = W x + scale * B A x` beside frozen projections.

Shapes: R rank, I inputs, O outputs of a projection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from d2f.errors import CheckpointError, ConfigError
from d2f.hub import resolve_folder
from d2f.models.lora_config import LoraConfig, read_config, written_config
from d2f.models.names import published_modules
from d2f.models.spec import ModelSpec
from d2f.models.storage import (
    POLICY_FILE,
    StoredTensor,
    compare_tensors,
    read_headers,
    read_json,
    read_policy,
    read_tensor,
    replaced_folder,
    write_json,
)
from d2f.models.transformer import Transformer

_PREFIX = "base_model.model."
_OWNED = ("adapter_model*.safetensors", "adapter_config.json", POLICY_FILE)


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
    for published, ours in targets.items():
        base = model.get_submodule(ours)
        assert isinstance(base, nn.Linear)
        rank = config.rank(published)
        bound = 1 / math.sqrt(base.in_features)
        a_RI = (torch.rand(rank, base.in_features, generator=generator) * 2 - 1) * bound
        b_OR = torch.zeros(base.out_features, rank)
        new = LoraLinear(base, a_RI, b_OR, config, config.scale(published))
        _replace(model, ours, new.to(base.weight.device).train(model.training))


def load_adapter(model: Transformer, path_or_hub_id: str | Path, *, merge: bool = True) -> None:
    """Put a stored adapter on the model, and its decoding policy if it carries one.

    Args:
        model: The adapter's base model, without another adapter.
        path_or_hub_id: Folder or hub id with adapter_config.json and adapter_model.safetensors.
        merge: Add it to the weights (see `merge_adapter`) rather than keep it beside them, in
            fp32 and requiring no gradient.

    Raises:
        CheckpointError: The folder is broken, the adapter is of a kind that is not supported or
            belongs to another model. The model is then as it was.
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
    config, targets, stored = read_adapter(folder, model.spec)
    policy = read_policy(folder)
    new = {}
    for published, ours in targets.items():
        base = model.get_submodule(ours)
        assert isinstance(base, nn.Linear)
        a_RI, b_OR = (
            read_tensor(stored[name], base.weight.device, torch.float32)
            for name in _keys(published)
        )
        new[ours] = LoraLinear(base, a_RI, b_OR, config, config.scale(published))
    for ours, module in new.items():
        _replace(model, ours, module.requires_grad_(False).train(model.training))
    if policy is not None:
        model.spec = replace(model.spec, recommended_policy=policy)
    if merge:
        merge_adapter(model)


def read_adapter(
    folder: Path, spec: ModelSpec
) -> tuple[LoraConfig, dict[str, str], dict[str, StoredTensor]]:
    """An adapter's config, targets (published name -> ours) and tensors, checked by header.

    Raises `CheckpointError` if it is not supported or does not belong to a model of this spec.
    """
    where = folder / "adapter_config.json"
    if not where.exists() and (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds a whole model, not an adapter; load it by itself")
    values = read_json(where)
    try:
        config = read_config(values, spec, where)
        targets = config.targets(spec)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    modules = published_modules(spec)
    stored = read_headers(folder, "adapter_model")
    shapes = _linear_shapes(spec)
    wanted: dict[str, tuple[int, ...]] = {}
    for published in targets:
        rows, columns = shapes[modules[published].rsplit(".", 1)[-1]]
        rank = config.rank(published)
        wanted |= dict(zip(_keys(published), [(rank, columns), (rows, rank)], strict=True))
    problems = compare_tensors(stored, wanted)
    if problems:
        raise CheckpointError(
            f"{folder} is an adapter for another model than this {spec.architecture.name} of "
            f"{spec.num_layers} layers and width {spec.hidden_size}: {problems}"
        )
    return config, targets, stored


def _linear_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the projections of a layer."""
    with torch.device("meta"):
        layer = Transformer(replace(spec, num_layers=1)).layers[0]
    return {
        name: (module.out_features, module.in_features)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }


def _keys(published: str) -> tuple[str, str]:
    return tuple(f"{_PREFIX}{published}.lora_{half}.weight" for half in "AB")  # type: ignore[return-value]


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


def save_adapter(model: Transformer, folder: str | Path, *, base_model: str = "") -> None:
    """Write the model's adapter as PEFT does, and the model's decoding policy if it has one.

    Args:
        model: A model with an adapter that is not merged.
        folder: Replaced as a whole once all is written; other files in it stay.
        base_model: Hub id or folder of the base model, noted in adapter_config.json.

    Raises:
        ConfigError: The model carries no adapter.
        CheckpointError: The folder cannot be written.
    """
    adapted = _adapted(model)
    if not adapted:
        raise ConfigError("the model carries no adapter that could be saved")
    published = {ours: name for name, ours in published_modules(model.spec).items()}
    tensors: dict[str, Tensor] = {}
    for ours, module in adapted.items():
        halves = (module.lora_A, module.lora_B)
        tensors |= {
            key: half.detach().contiguous()
            for key, half in zip(_keys(published[ours]), halves, strict=True)
        }
    config = next(iter(adapted.values())).config
    with replaced_folder(Path(folder), _OWNED) as new:
        write_json(new / "adapter_config.json", written_config(config, model.spec, base_model))
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
        if model.spec.recommended_policy is not None:
            write_json(new / POLICY_FILE, model.spec.recommended_policy.to_dict())
