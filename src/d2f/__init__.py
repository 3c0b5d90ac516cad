"""d2f: Discrete Diffusion Forcing. Distil a diffusion language model, decode it in a pipeline.

Names load on first use, so that importing the package (and `d2f --help`) does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2f.decoding.batch import GenerationResult
    from d2f.diffusion.layout import BlockLayout
    from d2f.diffusion.policy import DecodingPolicy
    from d2f.engine.engine import Engine, EngineConfig
    from d2f.engine.generate import generate_ids
    from d2f.engine.request import Request
    from d2f.errors import D2FError
    from d2f.models.checkpoint import load_model
    from d2f.training.objective import distillation_loss

__version__ = "0.1.0"

_HOMES = {
    "BlockLayout": "d2f.diffusion.layout",
    "D2FError": "d2f.errors",
    "DecodingPolicy": "d2f.diffusion.policy",
    "Engine": "d2f.engine.engine",
    "EngineConfig": "d2f.engine.engine",
    "GenerationResult": "d2f.decoding.batch",
    "Request": "d2f.engine.request",
    "distillation_loss": "d2f.training.objective",
    "generate_ids": "d2f.engine.generate",
    "load_model": "d2f.models.checkpoint",
}

__all__ = [
    "BlockLayout",
    "D2FError",
    "DecodingPolicy",
    "Engine",
    "EngineConfig",
    "GenerationResult",
    "Request",
    "__version__",
    "distillation_loss",
    "generate_ids",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'd2f' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
