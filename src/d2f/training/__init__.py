"""Training: one trainer for autoregression, masked diffusion and D2F distillation.

Names load on first use: the worker processes that encode data need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2f.training.config import TrainConfig, load_recipe
    from d2f.training.objective import autoregressive_loss, distillation_loss, masked_diffusion_loss
    from d2f.training.run import TrainingSummary, train
    from d2f.training.tokenizer import train_tokenizer

__all__ = [
    "TrainConfig", "TrainingSummary", "autoregressive_loss", "distillation_loss", "load_recipe",
    "masked_diffusion_loss", "train", "train_tokenizer",
]  # fmt: skip
_HOMES = {
    "TrainConfig": "config", "TrainingSummary": "run", "autoregressive_loss": "objective",
    "distillation_loss": "objective", "load_recipe": "config", "masked_diffusion_loss": "objective",
    "train": "run", "train_tokenizer": "tokenizer",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'd2f.training' has no attribute '{name}'")
    return getattr(importlib.import_module(f"d2f.training.{_HOMES[name]}"), name)
