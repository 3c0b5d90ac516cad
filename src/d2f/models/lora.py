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

from d2f.errors import CheckpointError, ConfigError, unknown_name
from d2f.hub import resolve_folder
from d2f.models.adapter_base import Fingerprint, take_fingerprint
from d2f.models.linear import Linear
from d2f.models.lora_config import (
    ADAPTER_DTYPES,
    CONFIG_FILE,
    DECLARATION_FILE,
    Declaration,
    DeclaredBase,
    LoraConfig,
    written_config,
)
from d2f.models.lora_folder import (
    FLOAT_STEM,
    INT8_STEM,
    lora_keys,
    read_adapter,
    require_same_weights,
    scale_key,
    with_adapter,
)
from d2f.models.lora_int8 import to_int8
from d2f.models.spec import published_modules
from d2f.models.storage import POLICY_FILE, replaced_folder, write_json, write_recommended
from d2f.models.transformer import Transformer, published_parameters
from d2f.ops.backend import Backend

_OWNED = (
    f"{FLOAT_STEM}*.safetensors", f"{INT8_STEM}*.safetensors", CONFIG_FILE, DECLARATION_FILE,
    POLICY_FILE,
)  # fmt: skip


class LoraLinear(nn.Module):
    """A frozen projection with a low-rank update beside it, which can be switched off.

    The update is computed in its own dtype (fp32) and rounded once to that of the projection;
    under autocast in that of autocast, without an fp32 copy of x, as a trained adapter keeps what
    it reads for the backward pass.

    Example:
        >>> a_RI, b_OR = torch.ones(2, 4), torch.ones(6, 2)
        >>> layer = LoraLinear(Linear(4, 6), a_RI, b_OR, LoraConfig(), 1.0)
        >>> layer(torch.ones(1, 4)).shape
        torch.Size([1, 6])
    """

    def __init__(
        self, base: Linear, a_RI: Tensor, b_OR: Tensor, config: LoraConfig, scale: float
    ) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(a_RI)
        self.lora_B = nn.Parameter(b_OR)
        self.config = config
        self.scale = scale
        # A plain attribute: torch.compile guards on it and keeps one graph for either value.
        self.enabled = True

    def forward(self, x: Tensor, backend: Backend | None = None) -> Tensor:
        """The projection of x (…, I), with the update unless it is switched off: (…, O)."""
        out = self.base(x)
        if not self.enabled:
            return out
        dropped = F.dropout(x, self.config.dropout, self.training)
        if not torch.is_autocast_enabled(x.device.type):
            dropped = dropped.to(self.lora_A.dtype)
        update = F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.scale
        return out + update.to(out.dtype)

    def for_steps(self) -> LoraLinear:
        """Itself: beside an adapter, a projection is joined with no other one."""
        return self


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
        assert isinstance(base, Linear)
        rank = config.rank(published)
        bound = 1 / math.sqrt(base.in_features)
        a_RI = (torch.rand(rank, base.in_features, generator=generator) * 2 - 1) * bound
        b_OR = torch.zeros(base.out_features, rank)
        new = LoraLinear(base, a_RI, b_OR, config, config.scale(published))
        _replace(model, ours, new.to(base.weight.device).train(model.training))
    _renew_steps(model)


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
    require_same_weights(folder, found.copies, model)
    expected = None if declared is None else declared.base.fingerprint
    # It reads all weights, so only where it is compared or may be saved again.
    fingerprint = None if merge and expected is None else _fingerprint(model)
    if expected is not None and fingerprint is not None:
        difference = expected.difference(fingerprint)
        if difference is not None:
            name = f"'{found.base_model}'" if found.base_model else "the one that it was trained on"
            raise CheckpointError(
                f"{folder} is an adapter for another model of this shape: {difference}; load "
                f"{name}, in any precision"
            )
    new = {}
    for published, ours in found.targets.items():
        base = model.get_submodule(ours)
        assert isinstance(base, Linear)
        a_RI, b_OR = found.read(published, base.weight.device)
        new[ours] = LoraLinear(base, a_RI, b_OR, found.config, found.config.scale(published))
    for ours, module in new.items():
        _replace(model, ours, module.requires_grad_(False).train(model.training))
    _renew_steps(model)
    model.spec = replace(with_adapter(model.spec, folder), adapter_base=fingerprint)
    if merge:
        merge_adapter(model)


def use_config(model: Transformer, config: LoraConfig) -> None:
    """Go on with a loaded adapter under this config, of which only the dropout may be another.

    Raises `ConfigError` if rank, scale or targets are not those of the adapter.
    """
    adapted = _adapted(model)
    targets = {ours: published for published, ours in config.targets(model.spec).items()}
    for ours in dict.fromkeys((*adapted, *targets)):
        module, name = adapted.get(ours), targets.get(ours)
        found = None if module is None else (module.lora_A.shape[0], module.scale)
        wanted = None if name is None else (config.rank(name), config.scale(name))
        if found != wanted:
            kinds = [
                "none" if x is None else f"rank {x[0]}, scale {x[1]:g}" for x in (found, wanted)
            ]
            raise ConfigError(
                f"the adapter to start from does not fit [lora]: at {name or ours} it has "
                f"{kinds[0]}, and [lora] asks for {kinds[1]}; give [lora] the adapter's own "
                "r, alpha and target_modules"
            )
    for module in adapted.values():
        module.config = config


def _require_no_adapter(model: Transformer) -> None:
    if has_adapter(model):
        raise ConfigError(
            "the model carries an adapter already; merge it first (merge_adapter), or load the "
            "base model again"
        )


def _require_adapter(model: Transformer, done: str) -> dict[str, LoraLinear]:
    adapted = _adapted(model)
    if not adapted:
        raise ConfigError(f"the model carries no adapter that could be {done}")
    return adapted


def _renew_steps(model: Transformer) -> None:
    # The parts of an engine's steps hold the modules that stood there before.
    if model.has_steps:
        model.prepare_steps()


def _replace(model: Transformer, ours: str, module: nn.Module) -> None:
    parent, name = ours.rsplit(".", 1)
    setattr(model.get_submodule(parent), name, module)


@contextmanager
def adapter_disabled(model: Transformer) -> Iterator[None]:
    """Within the block the model computes as if it had no adapter (the teacher's view).

    May be nested. Raises `ConfigError` if there is no adapter to switch off.
    """
    modules = _require_adapter(model, "switched off").values()
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
    for ours, module in _require_adapter(model, "merged").items():
        base = module.base
        update_OI = (module.lora_B.float() @ module.lora_A.float()) * module.scale
        merged_OI = (base.weight.float() + update_OI).to(base.weight.dtype)
        base.weight = nn.Parameter(merged_OI, requires_grad=False)
        _replace(model, ours, base)
    _renew_steps(model)
    # These are no longer the weights of an autoregressive checkpoint, nor of the adapter's base.
    model.spec = replace(model.spec, read_from=None, adapter_base=None)


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
        dtype: `float32`, `bfloat16`, or `int8`, which loses 0.5 to 0.8% of the update.
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
    adapted, spec = _require_adapter(model, "saved"), model.spec
    if dtype not in ADAPTER_DTYPES:
        raise ConfigError(unknown_name("dtype of an adapter", dtype, ADAPTER_DTYPES))
    config = written_config(next(iter(adapted.values())).config, spec, base_model)
    int8 = dtype == "int8"
    declared = Declaration(
        mask_token_id=None if spec.read_from is None else spec.mask_token_id,
        distilled=distilled,
        dtype=dtype,
        base=DeclaredBase(
            model_type=spec.read_from or spec.architecture.name,
            vocab_size=spec.vocab_size,
            fingerprint=spec.adapter_base,
        ),
        lora=config if int8 else None,
    )
    tensors = _stored_tensors(model, dtype)
    with replaced_folder(Path(folder), _OWNED) as new:
        if not int8:
            write_json(new / CONFIG_FILE, config)
        write_json(new / DECLARATION_FILE, declared.to_dict())
        stem = INT8_STEM if int8 else FLOAT_STEM
        save_file(tensors, new / f"{stem}.safetensors", metadata={"format": "pt"})
        write_recommended(new, spec, Path(folder))


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
