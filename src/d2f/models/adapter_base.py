"""The base model of an adapter, told from others of its shape: by its weights, or by its name.

Weights are compared in any precision. Norms and biases are stored unquantised everywhere, GGUF
files included, and training changes them: they must be equal but for rounding to 16 bits. Matrices
tell what leaves norms alone, such as a merged adapter: they may differ by as much as quantisation
makes them.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from d2f.errors import ConfigError
from d2f.hub import expanded
from d2f.models.storage import read_json

ROUNDED = 0.01
"""Largest distance of matrices that rounding to 16 or 8 bits gives (0.002; 0.008)."""
QUANTISED = 0.5
"""Largest distance of matrices that quantisation to fewer bits gives (4 bits: 0.09)."""
_ROWS = 64  # of a matrix that are looked at: quantisation and training change all of them
_FEW_ROWS = 8  # enough to see whether values are repeated
_GROUP = 16  # smallest run of weights that a quantisation scales together
_REPEATED = 0.05  # largest share of equal weights in such runs, where they are not quantised
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
# What our own runs call their results; the folder above tells them apart.
_COMMON = re.compile(r"final|best|checkpoint-\d+")


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """A model's weights in a few hundred numbers.

    Example:
        >>> weights = {"norm": torch.rand(64) + 0.5, "matrix": torch.randn(64, 64)}
        >>> rounded = {name: weight.bfloat16() for name, weight in weights.items()}
        >>> take_fingerprint(weights).difference(take_fingerprint(rounded)) is None
        True
    """

    norms: tuple[str, ...]
    """SHA-256 of all norms and biases in bf16, rounded directly and by way of fp16."""
    matrices: Mapping[str, float]
    """Number u W v / |W| of each matrix W, by published name, with fixed random signs u and v."""
    quantised: bool
    """Whether the matrices hold few different values, as quantisation leaves them."""

    def __post_init__(self) -> None:
        numbers = self.matrices.values()
        if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
            raise ConfigError("the base's fingerprint holds matrices that are no numbers")

    def distance(self, other: Fingerprint) -> float:
        """Relative distance of the matrices that both have, estimated; infinite without any.

        With random signs u and v, (u D v)² is |D|² on average, so the root mean square over all
        matrices estimates |D| / |W|. A head that is stored although it is tied is no difference.
        """
        common = self.matrices.keys() & other.matrices.keys()
        squares = [(self.matrices[name] - other.matrices[name]) ** 2 for name in common]
        return math.sqrt(sum(squares) / len(squares)) if squares else math.inf

    def difference(self, other: Fingerprint) -> str | None:
        """Tell how the two models differ, worded for an error; None where they do not."""
        if not set(self.norms) & set(other.norms):
            return "the weights of its norms are others"
        distance = self.distance(other)
        quantised = self.quantised or other.quantised
        if distance <= (QUANTISED if quantised else ROUNDED):
            return None
        return f"its matrices differ by {distance:.1%}"


@torch.no_grad()
def take_fingerprint(weights: Mapping[str, Tensor]) -> Fingerprint:
    """The fingerprint of a model's weights by their published names.

    Biases that are zero do not count: an autoregressive model that is read as a diffusion model
    has some more of them.
    """
    vectors, repeated = [], []
    matrices: dict[str, float] = {}
    for name, weight in sorted(weights.items()):
        if weight.ndim == 1:
            if weight.any():
                vectors.append(weight.float().cpu())
            continue
        rows = weight[:_ROWS].float()
        u, v = (_signs(size).to(rows.device) for size in rows.shape)
        size = rows.norm().item()
        matrices[name] = round((u @ rows @ v).item() / size, 6) if size else 0.0
        repeated.append(_repeated_share(rows[:_FEW_ROWS]))
    joined = torch.cat([torch.zeros(0), *vectors])
    rounded = (joined.bfloat16(), joined.half().bfloat16())
    return Fingerprint(
        norms=tuple(dict.fromkeys(_sha256(one) for one in rounded)),
        matrices=matrices,
        quantised=statistics.median(repeated or [0.0]) > _REPEATED,
    )


def _repeated_share(rows: Tensor) -> float:
    """Share of weights that equal another one of their group."""
    columns = rows.shape[1] // _GROUP * _GROUP
    groups = rows[:, :columns].reshape(-1, _GROUP).sort(1).values
    return (groups[:, 1:] == groups[:, :-1]).float().mean().item() if groups.numel() else 0.0


@functools.cache
def _signs(size: int) -> Tensor:
    """Random signs that are the same in every version of every library."""
    digests = (hashlib.sha256(f"d2f {i}".encode()).digest() for i in range(-(-size // 256)))
    bits = [byte >> k & 1 for digest in digests for byte in digest for k in range(8)]
    return torch.tensor(bits[:size], dtype=torch.float32) * 2 - 1


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def other_base(base_model: str | None, loaded: str | Path, folder: Path) -> str | None:
    """A line that warns of a base model other than the loaded one; None where names agree.

    The same model may lie under another path, so only the last part of a name counts, whatever its
    case. A model is known by the name it was asked for (`loaded`), its folder, the hub's id in the
    path of the hub's cache, and the name that transformers notes in config.json. `base_model` is
    what adapter_config.json says; None: nothing.
    """
    if base_model is None or _same_folder(base_model, folder):
        return None
    names = {_key(str(loaded)), _key(str(folder.resolve()))}
    if (folder / "config.json").exists():
        noted = read_json(folder / "config.json").get("_name_or_path")
        names |= {_key(noted)} if isinstance(noted, str) and noted else set()
    if _key(base_model) in names:
        return None
    return (
        f"the adapter was trained on '{base_model}', and '{loaded}' was loaded; if that is another "
        "model, answers are poor"
    )


def _same_folder(name: str, folder: Path) -> bool:
    try:
        return expanded(name).samefile(folder)
    except (OSError, ValueError):  # no such file, no name of a file
        return False


def _key(name: str) -> str:
    parts = [part for part in re.split(r"[/\\]", name.casefold()) if part not in ("", ".")]
    for part in reversed(parts):
        cached = _CACHED.fullmatch(part)
        if cached is not None:
            return cached["name"]
    last = parts[-1] if parts else ""
    return "/".join(parts[-2:]) if _COMMON.fullmatch(last) else last
