"""A model under the name by which clients ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d2f.engine.engine import Engine
from d2f.engine.policy import changed_policy, default_limit, default_strategy, useful_strategies
from d2f.errors import unknown_name
from d2f.serving.errors import ApiError
from d2f.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model with its own engine, as clients know it.

    From `Service.start` on only the service's thread may touch the engine.
    """

    name: str
    engine: Engine
    """The model's engine, which needs the tokenizer if requests may have stop strings."""
    tokenizer: Tokenizer
    strategy: str = ""
    """The strategy of requests that name none, and of the warm-up; empty: the model's default."""
    examples: tuple[str, ...] = ()
    """Prompts that it can answer."""

    def __post_init__(self) -> None:
        if not self.strategy:
            object.__setattr__(self, "strategy", default_strategy(self.engine.model.spec))

    def entry(self, created: int) -> dict[str, Any]:
        """The model as `/v1/models` shows it: OpenAI's object with a field `d2f`."""
        network = self.engine.model
        spec = network.spec
        return {
            "id": self.name,
            "object": "model",
            "created": created,
            "owned_by": "d2f",
            "d2f": {
                "strategies": useful_strategies(spec),
                "strategy": self.strategy,
                "policy": changed_policy(spec, {}).to_dict(),
                "max_positions": spec.max_positions,
                "max_tokens": default_limit(spec),
                "chat_template": self.tokenizer.chat_template is not None,
                "leaves_out": list(self.tokenizer.left_out),
                "examples": list(self.examples),
                "num_parameters": spec.num_parameters,
                "device": str(network.device),
                "dtype": str(network.dtype).removeprefix("torch."),
            },
        }


def find_model(models: Mapping[str, ServedModel], name: str) -> ServedModel:
    """The model of this name.

    Raises:
        ApiError: No model has this name (404).
    """
    if name not in models:
        message = unknown_name("model", name, models)
        raise ApiError(404, message, param="model", code="model_not_found")
    return models[name]
