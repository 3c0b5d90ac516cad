"""The served models as clients see them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from d2f.engine.policy import changed_policy, default_limit, useful_strategies
from d2f.errors import unknown_name
from d2f.serving.errors import ApiError
from d2f.serving.served_model import ServedModel


class Catalogue:
    """What `/v1/models` says: OpenAI's objects, each with a field `d2f`.

    Args:
        models: The served ones, the default first.
    """

    def __init__(self, models: Iterable[ServedModel]) -> None:
        created = int(time.time())
        self._entries = {model.name: _entry(model, created) for model in models}

    def all(self) -> dict[str, Any]:
        """All models."""
        return {"object": "list", "data": list(self._entries.values())}

    def one(self, name: str) -> dict[str, Any]:
        """A model.

        Raises:
            ApiError: There is none of this name (404).
        """
        if name not in self._entries:
            message = unknown_name("model", name, self._entries)
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._entries[name]


def _entry(model: ServedModel, created: int) -> dict[str, Any]:
    network = model.engine.model
    spec = network.spec
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "d2f",
        "d2f": {
            "strategies": useful_strategies(spec),
            "strategy": model.strategy,
            "policy": changed_policy(spec, {}).to_dict(),
            "max_positions": spec.max_positions,
            "max_tokens": default_limit(spec),
            "chat_template": model.tokenizer.chat_template is not None,
            "leaves_out": list(model.tokenizer.left_out),
            "examples": list(model.examples),
            "num_parameters": spec.num_parameters,
            "device": str(network.device),
            "dtype": str(network.dtype).removeprefix("torch."),
        },
    }
