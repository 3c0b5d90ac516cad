"""A model with all that is needed to serve it under a name."""

from __future__ import annotations

from dataclasses import dataclass

from d2f.engine.engine import Engine
from d2f.engine.policy import default_strategy
from d2f.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model with its own engine, as clients know it.

    From `Service.start` on only the service's thread may touch the engine.
    """

    name: str
    engine: Engine
    """With the tokenizer, if requests may have stop strings."""
    tokenizer: Tokenizer
    strategy: str = ""
    """Of requests that name none; also what the engine is warmed up with. Empty: the model's own
    default."""
    examples: tuple[str, ...] = ()
    """Prompts that it can answer."""

    def __post_init__(self) -> None:
        if not self.strategy:
            object.__setattr__(self, "strategy", default_strategy(self.engine.model.spec))
