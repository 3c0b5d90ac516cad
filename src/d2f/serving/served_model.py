"""A model with all that is needed to serve it under a name."""

from __future__ import annotations

from dataclasses import dataclass

from d2f.engine.engine import Engine
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
    strategy: str = "pipelined"
    """Of requests that name none; also what the engine is warmed up with."""
    examples: tuple[str, ...] = ()
    """Prompts that it can answer."""
