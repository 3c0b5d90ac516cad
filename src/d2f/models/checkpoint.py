"""Models from checkpoints and back."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from d2f.errors import CheckpointError, ConfigError, D2FWarning, counted, unknown_name
from d2f.gguf.folder import linked_gguf
from d2f.hub import resolve_folder
from d2f.models import storage
from d2f.models.adapter_base import other_base
from d2f.models.ends import find_ends
from d2f.models.families import config_from_spec, spec_from_config
from d2f.models.families.dream import read_as_diffusion
from d2f.models.lora import has_adapter, load_adapter
from d2f.models.lora_config import is_adapter
from d2f.models.lora_folder import adapter_entries, read_adapter
from d2f.models.spec import ModelSpec
from d2f.models.transformer import Transformer, filled_model, published_parameters

_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
_TRUNK = "model."
"""Start of the names of the trunk in a whole model; a trunk that was saved by itself has names
without it."""
_BUFFERS = (
    "rotary_emb.inv_freq", "rotary_emb.original_inv_freq", "rotary_emb.cos_cached",
    "rotary_emb.sin_cached", ".attn.bias", ".attn.masked_bias", ".self_attn.bias",
    ".self_attn.masked_bias", ".attention.bias", ".attention.masked_bias",
)  # fmt: skip
"""Ends of the names of buffers in floating point; no module of these ends has a bias of its own."""
OWNED = ("model*.safetensors", "model.safetensors.index.json", "config.json", storage.POLICY_FILE)
"""Files of a folder that a saved model replaces."""


def load_model(
    path_or_hub_id: str | Path,
    adapter: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    merge_adapter: bool = True,
) -> Transformer:
    """Load a checkpoint of a known family (`d2f.models.families`), with or without a LoRA adapter.

    No code of the checkpoint runs and no tokenizer is needed; where there is one, it says with
    config.json and generation_config.json which tokens end an answer (`find_ends`). The model is in
    evaluation mode and its parameters require no gradient.

    Args:
        path_or_hub_id: Folder with config.json and safetensors, a hub id such as `owner/name`, or
            a GGUF file of the Llama or Qwen2 layout.
        adapter: Folder or hub id of an adapter in PEFT's format, or of one that d2f has written,
            which may read an autoregressive base as a diffusion model.
        device: Where the weights go; None: the GPU if there is one, else the CPU.
        dtype: `torch.float32`, `"bfloat16"`, …; None: the one that the checkpoint holds;
            of quantised blocks, which hold none, `torch.float32`, which loses nothing.
        merge_adapter: Add the adapter to the weights, rather than compute it beside them.

    Raises:
        CheckpointError: Something is missing, broken, of an unknown architecture or of another
            model. All keys at fault are named at once, before any weight is loaded; that an
            adapter belongs to another model of the same shape shows after that.
        ConfigError: `device` or `dtype` is unknown.

    Warns:
        D2FWarning: The adapter names another base model than the loaded one, and holds nothing
            by which that could be checked.

    Example:
        >>> from d2f.testing import write_checkpoint
        >>> import tempfile
        >>> folder = write_checkpoint(tempfile.mkdtemp(), "Dream")
        >>> load_model(folder, device="cpu").spec.architecture.name
        'Dream'
    """
    target, to_dtype = resolve_device(device), resolve_dtype(dtype)
    folder = resolve_folder(path_or_hub_id)
    adapter_folder = None if adapter is None else resolve_folder(adapter)
    spec = read_spec(folder)
    with torch.device("meta"):
        model = Transformer(spec)
    places = published_parameters(model)
    stored = match_headers(folder, spec, places)
    _check_tied_head(folder, spec)
    declared = None
    if adapter_folder is not None:
        # A wrong one shows before gigabytes are read.
        found = read_adapter(adapter_folder, spec)
        declared = found.declaration
        warning = other_base(found.base_model, path_or_hub_id, folder)
        if warning is not None and (declared is None or declared.base.fingerprint is None):
            warnings.warn(warning, D2FWarning, stacklevel=2)
    kept = to_dtype or main_dtype(stored)
    for name, place in places.items():
        value = storage.read_tensor(stored[name], target, kept)
        setattr(*place, nn.Parameter(value, requires_grad=False))
    model.eval()
    if adapter_folder is not None:
        if declared is not None and declared.mask_token_id is not None:
            model = as_diffusion(model, mask_token_id=declared.mask_token_id)
        load_adapter(model, adapter_folder, merge=merge_adapter)
    return model


def read_spec(folder: Path) -> ModelSpec:
    """Read what a model folder says of the model: config.json, decoding policy, ends of an answer.

    With an adapter the model is another one (`with_adapter`). Raises `CheckpointError` if a file is
    missing or broken.
    """
    if is_adapter(folder):
        base = adapter_entries(folder)[0].get("base_model_name_or_path")
        named = f", '{base}'," if base else ""
        raise CheckpointError(
            f"{folder} holds an adapter, not a model; give the base model{named} and pass this as "
            "adapter"
        )
    if not (folder / "config.json").exists() and (files := sorted(folder.glob("*.gguf"))):
        raise CheckpointError(f"{folder} holds GGUF files; give one of them, such as {files[0]}")
    config = folder / "config.json"
    spec = spec_from_config(storage.read_json(config), str(linked_gguf(folder) or config))
    ends = tuple(end.id for end in find_ends(folder, spec) if end.has_row)
    policy = storage.read_policy(folder)
    return replace(
        spec,
        eos_token_ids=ends,
        recommended_policy=policy,
        recommended_max_new_tokens=storage.read_max_new_tokens(folder),
        distilled=policy is not None or spec.architecture.causal,
    )


def match_headers(
    folder: Path, spec: ModelSpec, places: Mapping[str, tuple[nn.Module, str]] | None = None
) -> dict[str, storage.StoredTensor]:
    """The stored tensors of a model, checked against its config by their headers.

    `places` are the parameters of a model of this spec, when one is already built.
    """
    if places is None:
        with torch.device("meta"):
            places = published_parameters(Transformer(spec))
    wanted = {name: tuple(getattr(*place).shape) for name, place in places.items()}
    tensors = _published_names(storage.read_headers(folder, "model"), wanted)
    storage.refuse_quantised(folder, storage.read_json(folder / "config.json"), tensors, wanted)
    if spec.tie_embeddings:
        embed, head = _tied_names(spec)
        # Stored under one of the two names, or under both; `_check_tied_head` compares them.
        tensors = {embed: tensors[head]} | tensors if head in tensors else tensors
        tensors.pop(head, None)
    # Old checkpoints store masks, positions and rotary frequencies beside the weights.
    stored = {
        name: tensor
        for name, tensor in tensors.items()
        if name in wanted or not (tensor.kind not in storage.FLOATS or name.endswith(_BUFFERS))
    }
    problems = storage.compare_tensors(stored, wanted)
    if problems:
        gguf = linked_gguf(folder)
        config = "config.json" if gguf is None else "the metadata"
        raise CheckpointError(f"{gguf or folder}: the weights do not fit {config}: {problems}")
    return stored


def _published_names(
    tensors: Mapping[str, storage.StoredTensor], wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, storage.StoredTensor]:
    """The tensors by the names of the whole model, where the trunk was saved by itself."""
    if any(name in tensors for name in wanted if name.startswith(_TRUNK)):
        return dict(tensors)
    return {
        _TRUNK + name if _TRUNK + name in wanted else name: tensor
        for name, tensor in tensors.items()
    }


def _tied_names(spec: ModelSpec) -> tuple[str, str]:
    names = spec.architecture.names
    return f"{names['embed']}.weight", f"{names['lm_head']}.weight"


def _check_tied_head(folder: Path, spec: ModelSpec) -> None:
    """A tied checkpoint may store its head once more, but not another one."""
    if not spec.tie_embeddings:
        return
    embed, head = _tied_names(spec)
    tensors = storage.read_headers(folder, "model")
    embed = embed if embed in tensors else embed.removeprefix(_TRUNK)
    if head not in tensors or embed not in tensors:
        return
    cpu = torch.device("cpu")
    same = tensors[head].shape == tensors[embed].shape and torch.equal(
        storage.read_tensor(tensors[head], cpu), storage.read_tensor(tensors[embed], cpu)
    )
    if not same:
        raise CheckpointError(
            f"{folder}: config.json ties the embeddings, but {head} differs from {embed}; "
            "correct config.json, or remove the tensor"
        )


def main_dtype(stored: Mapping[str, storage.StoredTensor]) -> torch.dtype:
    """The dtype of most numbers: a few norms in fp32 do not make an fp32 model."""
    count: Counter[torch.dtype] = Counter()
    for tensor in stored.values():
        count[tensor.dtype] += tensor.num_bytes // tensor.dtype.itemsize
    most = count.most_common(1)[0][0]
    # Nothing here computes in fp64.
    return torch.float32 if most == torch.float64 else most


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device that an option names; None: the GPU if there is one, else the CPU.

    Raises `ConfigError` for a device that torch does not know or this machine lacks.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device '{device}'; use 'cpu', 'cuda' or 'cuda:0'") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device '{device}' is not on this machine, which has "
            f"{counted(torch.cuda.device_count(), 'GPU')} that torch can use; use 'cpu'"
        )
    return found


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The floating-point type that an option names; raises `ConfigError` for any other.

    Example:
        >>> resolve_dtype("bfloat16")
        torch.bfloat16
    """
    if dtype is None or dtype in _DTYPES.values():
        return dtype  # type: ignore[return-value]
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(unknown_name("dtype", name, _DTYPES))
    return _DTYPES[name]


def save_model(
    model: Transformer, folder: str | Path, *, max_shard_bytes: int | None = None
) -> None:
    """Write a model as the hub does: config.json, safetensors, and its decoding policy if any.

    Args:
        model: A model without adapter, or with a merged one.
        folder: Replaced as a whole once all is written; other files in it, such as a tokenizer's,
            stay. An interrupted save leaves the old folder as it was.
        max_shard_bytes: Split the weights into files of at most this size, and an index. A single
            tensor that is larger gets a file of its own.

    Raises:
        ConfigError: The model carries an adapter, or `max_shard_bytes` is not positive.
        CheckpointError: The folder cannot be written.

    Example:
        >>> from d2f.testing import tiny_model
        >>> import tempfile
        >>> save_model(tiny_model("llada"), tempfile.mkdtemp())
    """
    if has_adapter(model):
        raise ConfigError(
            "the model carries an adapter; merge it first (merge_adapter), or save it by itself "
            "(save_adapter)"
        )
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    tensors = {
        name: getattr(*place).detach().contiguous()
        for name, place in published_parameters(model).items()
    }
    # The key is the one that both older and newer releases of transformers read.
    config = config_from_spec(model.spec) | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    with storage.replaced_folder(Path(folder), OWNED) as new:
        storage.write_json(new / "config.json", config)
        storage.write_recommended(new, model.spec, Path(folder))
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        write_weights(new, sizes, tensors.__getitem__, max_shard_bytes)


def write_weights(
    folder: Path, sizes: Mapping[str, int], read: Callable[[str], Tensor], max_bytes: int | None
) -> None:
    """Write model.safetensors, or shards of at most `max_bytes` and their index.

    `sizes` are the bytes of each tensor, in the order of the files. `read` gives a tensor by its
    name; those of one file are in memory at a time.
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name, num_bytes in sizes.items():
        # The header takes its share: name, dtype, shape and offsets as JSON, padded.
        size = num_bytes + len(name) + 160
        if max_bytes is not None and shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    files: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = "model" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}"
        tensors = {name: read(name) for name in shard}
        save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
        files |= dict.fromkeys(shard, f"{file}.safetensors")
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        storage.write_json(folder / "model.safetensors.index.json", index)


def as_diffusion(model: Transformer, *, mask_token_id: int) -> Transformer:
    """An autoregressive model's weights as a diffusion model with the shifted head, as Dream's.

    The new model shares the weights of the given one: no copy is made, and training one changes
    the other. Dream has biases on queries, keys and values; where the given model has none (Llama)
    they are zero. Its decoding policy, if any, is dropped.

    Raises:
        ConfigError: The model is a diffusion model already, carries an adapter, or its vocabulary
            does not hold `mask_token_id`.

    Example:
        >>> from d2f.testing import tiny_model
        >>> as_diffusion(tiny_model("qwen2"), mask_token_id=94).spec.architecture.name
        'Dream'
    """
    new_spec = read_as_diffusion(model.spec, mask_token_id)
    if has_adapter(model):
        raise ConfigError("the model carries an adapter; merge it first (merge_adapter)")
    given = dict(model.named_parameters())

    def shared(name: str, parameter: Tensor) -> Tensor:
        if name in given:
            return given[name]
        return torch.zeros(parameter.shape, device=model.device, dtype=model.dtype)

    return filled_model(new_spec, shared).train(model.training)
