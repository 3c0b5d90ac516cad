"""An adapter's settings: PEFT's adapter_config.json, and the file beside it that names its base.

PEFT ignores the second file. An adapter without it is read as PEFT reads it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from d2f.errors import CheckpointError, ConfigError
from d2f.models.adapter_base import Fingerprint
from d2f.models.spec import ModelSpec, published_modules
from d2f.models.storage import read_json
from d2f.recipe import from_table, one_of

CONFIG_FILE = "adapter_config.json"
DECLARATION_FILE = "d2f_adapter.json"
ADAPTER_DTYPES = ("float32", "bfloat16", "int8")
MERGE = "merge the adapter into its base model with peft and load the result"
"""The remedy where an adapter is more than this core computes."""
_FORMAT = 1
# What changes the result and is not computed here, with the values that switch it off.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "use_qalora": (None, False),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    # Others (PiSSA, OLoRA, …) change the base weights when the adapter is made.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Rank, scale and place of an adapter; the fields are PEFT's of the same meaning.

    Raises `ConfigError` for values outside their range.

    Example:
        >>> LoraConfig(r=16, alpha=32).scale("model.layers.0.self_attn.q_proj")
        2.0
    """

    r: int = 32
    """Rank of the updates."""
    alpha: float = 32
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout of the update's inputs while training."""
    target_modules: tuple[str, ...] | list[str] | str | None = None
    """Last parts of published module names, or one regular expression of whole names; None: the
    architecture's four attention projections."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for modules whose published name ends in a match of the key."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas, in the same way."""

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be a table")
        wanted = self.target_modules
        named = isinstance(wanted, tuple | list) and all(isinstance(name, str) for name in wanted)
        if not named and not isinstance(wanted, str | None):
            raise ConfigError(f"target_modules is {wanted!r}; it must be names or an expression")
        for rank in (self.r, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"r is {rank!r}; it must be a whole number of at least 1")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
            if not number or not math.isfinite(alpha):
                raise ConfigError(f"alpha is {alpha!r}; it must be a finite number")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        patterns = [*self.rank_pattern, *self.alpha_pattern]
        for pattern in [*patterns, wanted] if isinstance(wanted, str) else patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"'{pattern}' is no regular expression: {error}") from None

    def rank(self, published: str) -> int:
        """Rank of the module of this published name."""
        return _by_pattern(self.rank_pattern, published, self.r)

    def scale(self, published: str) -> float:
        """Return the factor of the update of the module of this published name."""
        alpha, rank = _by_pattern(self.alpha_pattern, published, self.alpha), self.rank(published)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, spec: ModelSpec) -> dict[str, str]:
        """The modules it adapts: published name -> ours.

        Raises `ConfigError` where it names none, or one outside the layers.
        """
        wanted = self.target_modules
        if wanted is None:
            wanted = spec.architecture.lora_targets
        elif wanted == "all-linear":  # PEFT's word; it leaves out the head
            wanted = r".*\.\d+\..*(proj|out)"
        found = {p: o for p, o in published_modules(spec).items() if _matches(wanted, p)}
        outside = [p for p, ours in found.items() if not ours.endswith("_proj")]
        name = spec.architecture.name
        if outside:
            raise ConfigError(
                f"target_modules names {', '.join(outside)} of {name}; only the projections "
                "inside the layers can be adapted. For a new adapter, name modules more exactly, "
                f"as in '{spec.architecture.lora_targets[0]}'; for a finished one, {MERGE}"
            )
        if not found:
            raise ConfigError(
                f"target_modules {wanted!r} names no module of {name}; its attention projections "
                f"are {', '.join(spec.architecture.lora_targets)}"
            )
        return found


def _by_pattern(patterns: Mapping[str, Any], published: str, default: Any) -> Any:
    found = (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", published))
    return next(found, default)


def _matches(wanted: tuple[str, ...] | list[str] | str, published: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, published) is not None
    return any(published == name or published.endswith(f".{name}") for name in wanted)


def read_config(values: Mapping[str, Any], spec: ModelSpec, where: Path) -> LoraConfig:
    """The config that an adapter_config.json holds; entries that change no result are ignored.

    Raises `CheckpointError` for another kind of adapter, a variant of LoRA or a value that is not
    supported; `where` is the file that the error names.
    """
    kind = values.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where}: peft_type is {kind!r}; only 'LORA' is supported")
    for name, off in _REFUSED.items():
        value = values.get(name)
        if not any(value == other and type(value) is type(other) for other in off):
            raise CheckpointError(f"{where}: {name} is {value!r}, which is not supported; {MERGE}")
    config = LoraConfig(
        r=values.get("r", 8),
        alpha=values.get("lora_alpha", 8),
        dropout=values.get("lora_dropout") or 0.0,
        target_modules=values.get("target_modules"),
        use_rslora=bool(values.get("use_rslora")),
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {},
    )
    excluded, layers = values.get("exclude_modules"), values.get("layers_to_transform")
    if not excluded and layers in (None, []):
        return config
    # Both narrow the targets down; what is left is named in full.
    chosen = [layers] if isinstance(layers, int) else layers
    left = [
        published
        for published, ours in config.targets(spec).items()
        if not (excluded and _matches(excluded, published))
        and (not chosen or int(ours.split(".")[1]) in chosen)
    ]
    return replace(config, target_modules=tuple(left))


def written_config(config: LoraConfig, spec: ModelSpec, base_model: str) -> dict[str, Any]:
    """The adapter_config.json with which PEFT, and `read_config`, read the adapter."""
    targets = config.target_modules or spec.architecture.lora_targets
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "use_rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


@dataclass(frozen=True, kw_only=True)
class DeclaredBase:
    """The base model that an adapter is for."""

    model_type: str
    vocab_size: int
    fingerprint: Fingerprint | None = None


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """The content of d2f_adapter.json; raises `ConfigError` for entries that do not fit."""

    format: int = _FORMAT
    mask_token_id: int | None
    """Read the autoregressive base as a diffusion model with this mask token; None: as it is."""
    distilled: bool
    """Whether the adapter was trained to be decoded in blocks."""
    dtype: str
    """Type of the adapter's numbers: one of `ADAPTER_DTYPES`."""
    base: DeclaredBase
    lora: Mapping[str, Any] | None = None
    """int8: the entries of an adapter_config.json, which would lead PEFT to read what it cannot."""

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, ADAPTER_DTYPES)
        if (self.dtype == "int8") != (self.lora is not None):
            raise ConfigError(f"dtype is {self.dtype!r}; int8 needs the table lora, others not")
        mask, size = self.mask_token_id, self.base.vocab_size
        if mask is not None and not 0 <= mask < size:
            raise ConfigError(f"mask_token_id is {mask}; the vocabulary holds 0 to {size - 1}")

    def to_dict(self) -> dict[str, Any]:
        """The declaration as plain JSON values, without what it lacks."""
        table = asdict(self)
        for part, name in ((table["base"], "fingerprint"), (table, "lora")):
            if part[name] is None:
                del part[name]
        return table


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    found = any((folder / name).exists() for name in (CONFIG_FILE, DECLARATION_FILE))
    return found and not (folder / "config.json").exists()


def read_declaration(folder: Path) -> Declaration | None:
    """Read what an adapter's folder declares; None for a folder that others wrote.

    Raises `CheckpointError` if the file is broken, or of a newer version.
    """
    file = folder / DECLARATION_FILE
    if not file.exists():
        return None
    values = read_json(file)
    if values.get("format") != _FORMAT:
        raise CheckpointError(
            f"{file}: format is {values.get('format')!r}; this version of d2f reads {_FORMAT}, so "
            "update d2f, or fetch the adapter again"
        )
    # A later version of d2f may write entries that this one can do without.
    values = _known(Declaration, values)
    if isinstance(values.get("base"), Mapping):
        values["base"] = _known(DeclaredBase, values["base"])
    try:
        return from_table(Declaration, values, str(file))
    except ConfigError as error:
        raise CheckpointError(f"{error}; fetch the adapter again") from None


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the values that are fields of a dataclass."""
    names = [entry.name for entry in fields(kind)]
    return {name: values[name] for name in names if name in values}
