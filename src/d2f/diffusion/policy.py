"""The thresholds of pipelined parallel decoding (paper, section 4 and algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from d2f.errors import ConfigError, unknown_name

CONFIDENCES = ("probability", "margin", "neg_entropy")


@dataclass(frozen=True, kw_only=True)
class DecodingPolicy:
    """Decides when blocks open, when they become fully active and which tokens are accepted.

    Raises `ConfigError` for a value outside its range.

    Example:
        >>> DecodingPolicy(confidence_threshold=0.98).block_size
        32
    """

    block_size: int = 32
    """Tokens of a block (k)."""
    add_threshold: float = 0.1
    """Open the next block when the last one's decoded share is >= this (tau_add)."""
    activate_threshold: float = 0.95
    """A block becomes fully active when its predecessor's decoded share is >= this (tau_act)."""
    confidence_threshold: float = 0.9
    """Accept a token when its probability is > this (tau_conf)."""
    max_live_blocks: int | None = None
    """Most blocks that are open and not yet cached; None: the paper's unbounded window."""
    confidence: str = "probability"
    """The score that picks the token a fully active block is forced to accept: its `probability`,
    the `margin` between the two most probable tokens, or `neg_entropy`, the negative entropy."""

    def __post_init__(self) -> None:
        for name in ("add_threshold", "activate_threshold", "confidence_threshold"):
            value = getattr(self, name)
            # Above 1 no block might ever become fully active, and decoding would not end.
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value!r}; it must be a number between 0 and 1")
        for name in ("block_size", "max_live_blocks"):
            value = getattr(self, name)
            if name == "max_live_blocks" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.confidence not in CONFIDENCES:
            raise ConfigError(unknown_name("confidence", self.confidence, CONFIDENCES))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecodingPolicy:
        """Build a policy from a checkpoint's or a recipe's table; unknown keys are refused."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(unknown_name("decoding policy field", name, known))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as a plain table, the form in which checkpoints carry it."""
        return asdict(self)
