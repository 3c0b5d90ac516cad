"""Files of a checkpoint: JSON, headers of its weights, folders that are replaced as a whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2f.diffusion.policy import DecodingPolicy
from d2f.errors import CheckpointError, ConfigError
from d2f.gguf.folder import linked_gguf
from d2f.gguf.tensors import HubTensor, read_hub_tensors, read_values
from d2f.hub import expanded

if TYPE_CHECKING:
    from d2f.models.spec import ModelSpec

POLICY_FILE = "decoding_policy.json"
GENERATION_FILE = "generation_config.json"

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of a header that weights may have."""
_SCHEMES = {
    ".g_idx": "GPTQ",
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes, 8 bits",
    ".absmax": "bitsandbytes, 4 bits",
    ".weight_packed": "compressed-tensors",
}
"""Ends of names that only files of a scheme of quantisation have, the most telling first."""
_KINDS = {"F8": "fp8", "F4": "fp4", "I8": "int8", "U8": "uint8"}
"""Begin of a header's type -> what people call it."""
_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "fbgemm_fp8": "fp8"}
"""`quant_method` of a config.json -> what people call it; others go by their own name."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NUM_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """The entry on one tensor in the header of a safetensors or GGUF file."""

    file: Path
    name: str
    """Name of the tensor in the file."""
    shape: tuple[int, ...]
    kind: str
    """Its type as the header names it; weights have one of `FLOATS`. Quantised blocks of a GGUF
    have the type that they are read in."""
    in_gguf: HubTensor | None = None
    """The tensor's place and form in a GGUF, if it is in one."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of a weight."""
        return FLOATS[self.kind]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `CheckpointError` naming the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file.parent} holds no {file.name}; is it the right folder?"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a JSON object")
    return content


def read_policy(folder: Path) -> DecodingPolicy | None:
    """The decoding policy that a model or adapter folder carries, if any."""
    file = folder / POLICY_FILE
    if not file.exists():
        return None
    try:
        return DecodingPolicy.from_dict(read_json(file))
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None


def read_max_new_tokens(folder: Path) -> int | None:
    """The response length that a model's generation_config.json names, if any."""
    file = folder / GENERATION_FILE
    value = read_json(file).get("max_new_tokens") if file.exists() else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"{file}: max_new_tokens is {value!r}; it must be a whole number of at least 1"
        )
    return value


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, with a newline at its end."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_recommended(new: Path, spec: ModelSpec, folder: Path) -> None:
    """Write the policy and the length of an answer that a model recommends, if any, to `new`.

    A generation_config.json in `folder`, whose place `new` takes, stays.
    """
    if spec.recommended_policy is not None:
        write_json(new / POLICY_FILE, spec.recommended_policy.to_dict())
    limit = spec.recommended_max_new_tokens
    if limit is not None and not (folder / GENERATION_FILE).exists():
        write_json(new / GENERATION_FILE, {"max_new_tokens": limit})


def read_headers(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """Names, shapes and types of `stem`.safetensors, or of the shards that its index lists.

    The folder of a GGUF gives its tensors by the hub's names. Raises `CheckpointError` if the file
    is missing, broken or pickled.
    """
    gguf = linked_gguf(folder)
    if gguf is not None:
        return {
            name: StoredTensor(
                file=(at := tensor.source).file,
                name=at.name,
                shape=at.shape,
                kind=at.type.kind,
                in_gguf=tensor,
            )
            for name, tensor in read_hub_tensors(gguf).items()
        }
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists():
        return _read_header(single)
    if not index.exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise CheckpointError(
                f"{folder} holds pickled weights only ({some_names(pickles)}), which can run code "
                "when they are loaded; convert them to safetensors"
            )
        raise CheckpointError(f"{folder} holds neither {single.name} nor {index.name}")
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in shard_of.values()
    ):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names beside it")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(shard_of.values())):
        tensors |= _read_header(folder / name)
    absent = [name for name in shard_of if name not in tensors]
    if absent:
        raise CheckpointError(f"{index} lists tensors that no shard holds: {some_names(absent)}")
    return tensors


def _read_header(file: Path) -> dict[str, StoredTensor]:
    with _opened(file) as stored:
        parts = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 (no dict)
        return {
            name: StoredTensor(
                file=file, name=name, shape=tuple(part.get_shape()), kind=part.get_dtype()
            )
            for name, part in parts.items()
        }


def read_tensor(
    stored: StoredTensor, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """One tensor, copied to `device` and converted (None: as stored)."""
    if stored.in_gguf is not None:
        return read_values(stored.in_gguf, device, dtype or stored.dtype)
    # Opened anew for each tensor, and copied: a map of the whole file would stay resident beside
    # the copies, and a tensor that lies in the map is not aligned as CPU kernels like it.
    with _opened(stored.file) as file:
        return file.get_tensor(stored.name).to(device, dtype or stored.dtype, copy=True)


def read_tensors(
    stored: Sequence[StoredTensor], device: torch.device, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Some small tensors, as `read_tensor` gives each, with one look at a file that holds all."""
    if len({one.file for one in stored}) != 1:
        return [read_tensor(one, device, dtype) for one in stored]
    with _opened(stored[0].file) as file:
        tensors = [file.get_tensor(one.name) for one in stored]
        return [one.to(device, dtype or one.dtype, copy=True) for one in tensors]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            yield stored
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; fetch the checkpoint again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file ({error}); fetch it again"
        ) from None


def compare_tensors(
    stored: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]]
) -> str:
    """Tell which tensors are missing, unexpected or misshaped, for an error; empty if none is."""
    misshaped = [
        f"{name} is {list(stored[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != shape
    ]
    problems = {
        "missing": [name for name in wanted if name not in stored],
        "unexpected": [name for name in stored if name not in wanted],
        "wrongly shaped": misshaped,
    }
    return "; ".join(
        f"{len(names)} {kind}: {some_names(names)}" for kind, names in problems.items() if names
    )


def refuse_quantised(
    folder: Path,
    config: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    wanted: Iterable[str],
) -> None:
    """Refuse weights that are no plain numbers, and say which scheme made them.

    The tensors decide, since a config.json may still speak of a scheme whose weights were converted
    back. `stored` are all tensors, `wanted` the names of the model's parameters. Raises
    `CheckpointError`.
    """
    signs = ((name, s) for end, s in _SCHEMES.items() for name in stored if name.endswith(end))
    kinds = ((name, stored[name].kind) for name in wanted if name in stored)
    other = ((name, _KINDS.get(kind[:2], kind)) for name, kind in kinds if kind not in FLOATS)
    name, scheme = next(chain(signs, other), ("", ""))
    if not name:
        return
    given = config.get("quantization_config")
    if isinstance(given, Mapping) and isinstance(method := given.get("quant_method"), str):
        bits = given.get("bits") or next((n for n in (4, 8) if given.get(f"load_in_{n}bit")), None)
        scheme = _METHODS.get(method, method) + ("" if bits is None else f", {bits} bits")
    raise CheckpointError(
        f"{folder}: the weights are quantised ({scheme}): {name} is "
        f"{stored[name].kind}; only {', '.join(FLOATS)} are supported, so load the model that "
        "this one was made from, or have it converted to bf16 first"
    )


def some_names(names: Iterable[str]) -> str:
    """The first of these names, and how many more there are."""
    listed = list(names)
    more = len(listed) - _NUM_NAMED
    return ", ".join(listed[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def replaced_folder(folder: Path, owned: Iterable[str]) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder` when the block ends well.

    Files of the old folder stay, except those that match a pattern of `owned`. An interrupted
    block leaves the old folder as it was.
    """
    target = expanded(folder).resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"cannot save to '{folder}': it is a file")
    new, old = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))

    def kept_back(at: str, names: list[str]) -> set[str]:
        if Path(at) != target:
            return set()
        return {n for n in names if (new / n).exists() or any(fnmatch(n, x) for x in owned)}

    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        if target.exists():
            # Links, so that big neighbours such as trainer states cost nothing.
            shutil.copytree(
                target,
                new,
                symlinks=True,
                ignore=kept_back,
                copy_function=_link_or_copy,
                dirs_exist_ok=True,
            )
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except (OSError, SafetensorError) as error:  # the latter is how a full disk shows there
        raise CheckpointError(f"cannot save to '{folder}': {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _link_or_copy(source: str, to: str) -> None:
    try:
        os.link(source, to)
    except OSError:
        shutil.copy2(source, to)
