"""Supported layouts of GGUF files, and their tensors by the names and in the order of the hub."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2f.errors import CheckpointError, unknown_name
from d2f.gguf.block_types import dequantise
from d2f.gguf.container import Container, GGUFTensor, read_container

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_TENSOR = "rope_freqs.weight"
"""Tensor of factors on the rotary wave lengths, which become an entry of config.json."""
_IGNORED = re.compile(rf"{re.escape(ROPE_TENSOR)}|blk\.\d+\.attn_rot_embd\.weight")
_NAMED = 4
_PART = 1 << 22
"""Count of numbers that are dequantised at once."""
_NUMPY = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": np.int16}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The facts in which layouts differ."""

    model_type: str
    """Entry `model_type` of config.json."""
    class_name: str
    """First entry of `architectures` in config.json."""
    biases: tuple[str, ...]
    """Tensors of a layer that always have a bias."""
    interleaved: bool
    """Whether the query and key rows that rotate together are stored side by side."""


LAYOUTS = {
    "llama": Layout(model_type="llama", class_name="LlamaForCausalLM", biases=(), interleaved=True),
    "qwen2": Layout(
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        biases=("attn_q", "attn_k", "attn_v"),
        interleaved=False,
    ),
}
"""Layouts by the metadata entry `general.architecture`."""


@dataclass(frozen=True, kw_only=True)
class HubTensor:
    """A tensor of a GGUF, and how its rows come into the hub's order."""

    source: GGUFTensor
    interleaved_heads: int | None
    """Number of heads whose rows must be reordered; None: the rows are in the hub's order."""


def layout_of(container: Container) -> Layout:
    """Return the layout of a GGUF.

    Raises:
        CheckpointError: The layout is not supported, or the file holds no language model.
    """
    file, metadata = container.file, container.metadata
    kind = metadata.get("general.type", "model")
    if kind != "model":
        what = "LoRA adapter; give its folder in PEFT's format" if kind == "adapter" else str(kind)
        raise CheckpointError(f"{file} holds no model: its general.type is {what}")
    name = metadata.get("general.architecture")
    if name not in LAYOUTS:
        raise CheckpointError(
            f"{file}: {unknown_name('GGUF layout', name, LAYOUTS)}; give a model of one of these"
        )
    experts = metadata.get(f"{name}.expert_count", 0)
    if experts:
        raise CheckpointError(
            f"{file} is of the layout {name} with {experts} experts; only models without experts "
            "are supported"
        )
    return LAYOUTS[name]


def hub_tensors(container: Container) -> dict[str, HubTensor]:
    """Return the weights of a GGUF by the hub's names.

    Raises:
        CheckpointError: The layout is not supported, or has no place for one of the tensors.
    """
    layout = layout_of(container)
    names = {tensor: _hub_name(tensor, layout) for tensor in container.tensors}
    strange = [t for t, hub in names.items() if hub is None and not _IGNORED.fullmatch(t)]
    if strange:
        more = len(strange) - _NAMED
        listed = ", ".join(strange[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        raise CheckpointError(
            f"{container.file} has tensors that the layout {layout.model_type} does not: {listed}; "
            "this variant of it is not supported"
        )
    queries = number(container, "attention.head_count")
    heads = {"q_proj": queries, "k_proj": number(container, "attention.head_count_kv", queries)}
    return {
        hub: HubTensor(
            source=container.tensors[tensor],
            interleaved_heads=heads.get(hub.split(".")[-2]) if layout.interleaved else None,
        )
        for tensor, hub in names.items()
        if hub is not None
    }


@functools.lru_cache(maxsize=8)
def _cached(file: Path, size: int, changed: int) -> dict[str, HubTensor]:
    return hub_tensors(read_container(file))


def read_hub_tensors(file: Path) -> Mapping[str, HubTensor]:
    """Return `hub_tensors` of a file, whose header is parsed again only after it has changed."""
    about = file.stat()
    return _cached(file, about.st_size, about.st_mtime_ns)


def _hub_name(tensor: str, layout: Layout) -> str | None:
    if tensor in _WHOLE:
        return _WHOLE[tensor]
    found = _BLOCK.fullmatch(tensor)
    part, _, kind = found[2].rpartition(".") if found else ("", "", "")
    known = part in _LAYER and (kind == "weight" or (kind == "bias" and part in layout.biases))
    return f"model.layers.{found[1]}.{_LAYER[part]}.{kind}" if found and known else None


def number(container: Container, entry: str, default: int | None = None) -> int:
    """Return a metadata entry of the layout that must be a whole number of at least 1.

    Raises:
        CheckpointError: The entry is missing and has no default, is not such a number, or differs
            from layer to layer.
    """
    name = f"{container.metadata.get('general.architecture')}.{entry}"
    value: Any = container.metadata.get(name, default)
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]
    if value is None:
        raise CheckpointError(
            f"{container.file}: the metadata lack {name}; convert the original model again"
        )
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"{container.file}: {name} is {value!r}; only one whole number for all layers is "
            "supported"
        )
    return value


def read_values(tensor: HubTensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor on `device`; host memory holds a few million numbers of it at a time."""
    source = tensor.source
    values = torch.empty(source.shape, dtype=dtype, device=device)
    rows = values.view(-1, source.shape[-1])
    # Copy-on-write, though nothing writes: torch warns of memory that is read-only.
    stored = np.memmap(
        source.file,
        mode="c",
        offset=source.offset,
        shape=(len(rows), source.num_bytes // len(rows)),
    )
    step = max(1, _PART // source.shape[-1])
    for start in range(0, len(rows), step):
        rows[start : start + step] = _numbers(np.asarray(stored[start : start + step]), source)
    return values if tensor.interleaved_heads is None else _paired(values, tensor.interleaved_heads)


def _numbers(stored: np.ndarray[Any, Any], source: GGUFTensor) -> Tensor:
    name = source.type.name
    if name not in _NUMPY:
        return torch.from_numpy(dequantise(stored, source.type))
    numbers = torch.from_numpy(stored.view(_NUMPY[name]))
    return numbers.view(torch.bfloat16) if name == "BF16" else numbers


def _paired(values: Tensor, heads: int) -> Tensor:
    """Return rows of queries or keys in the hub's order.

    A rotary embedding rotates pairs of rows. The layout stores the two rows of a pair side by side,
    the hub half a head apart.
    """
    by_head = values.view(heads, -1, 2, *values.shape[1:])
    return by_head.transpose(1, 2).reshape(values.shape)
