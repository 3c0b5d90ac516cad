"""Training: one trainer for autoregression, masked diffusion and D2F distillation.

Names load on first use: the worker processes that encode data need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2f.training.config import TrainConfig, load_recipe
    from d2f.training.objective import (
        autoregressive_loss,
        distillation_loss,
        masked_diffusion_loss,
    )
    from d2f.training.run import TrainingSummary, train
    from d2f.training.tokenizer import train_tokenizer

_HOMES = {
    "TrainConfig": "d2f.training.config",
    "TrainingSummary": "d2f.training.run",
    "autoregressive_loss": "d2f.training.objective",
    "distillation_loss": "d2f.training.objective",
    "load_recipe": "d2f.training.config",
    "masked_diffusion_loss": "d2f.training.objective",
    "train": "d2f.training.run",
    "train_tokenizer": "d2f.training.tokenizer",
}

__all__ = [
    "TrainConfig",
    "TrainingSummary",
    "autoregressive_loss",
    "distillation_loss",
    "load_recipe",
    "masked_diffusion_loss",
    "train",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'd2f.training' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
