"""AdamW, the learning rate over a run, and an update that skips itself when it is not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from d2f.training.sections import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient; norms, biases, embeddings do not decay."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim >= 2 and not name.startswith("embed.")]
    kept = [p for name, p in trained if p.ndim < 2 or name.startswith("embed.")]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, config.weight_decay), (kept, 0.0))
        if parameters
    ]
    # The fused form is the one that looks at `found_inf`, on the CPU too.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimizerConfig, step: int, progress: float) -> float:
    """Learning rate of a step (the first is 0) at this share of the run.

    Example:
        >>> learning_rate(OptimizerConfig(lr=1.0, schedule="wsd", decay_start=0.5), 9, 0.75)
        0.5
    """
    progress = min(max(progress, 0.0), 1.0)
    if config.schedule == "linear":
        shape = 1 - progress
    elif config.schedule == "cosine":
        shape = (1 + math.cos(math.pi * progress)) / 2
    elif config.schedule == "wsd" and progress > config.decay_start:
        shape = (1 - progress) / (1 - config.decay_start)
    else:
        shape = 1.0
    warm = min((step + 1) / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    return config.lr * warm * (config.final_lr_share + (1 - config.final_lr_share) * shape)


class GuardedUpdate:
    """Clip, check, update. The check lives on the device, so no step waits for the host.

    Once a loss or gradient is not finite, that update and all later ones change nothing, and
    `first_bad_step` says where it happened: the weights stay those of the step before.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._clip_norm = clip_norm or math.inf
        self._bad_step = torch.zeros((), dtype=torch.int64, device=self.parameters[0].device)

    def apply(self, step: int, lr: float, loss: Tensor) -> Tensor:
        """Update from the gradients; `step` counts from 1. Returns the gradient's norm."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self._clip_norm)
        if hasattr(norm, "full_tensor"):  # of gradients in shards, each process knows its part
            norm = norm.full_tensor()
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        self._bad_step = torch.where((self._bad_step == 0) & bad, step, self._bad_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Fused optimizers skip an update whose `found_inf` is not 0, as gradient scalers use it.
        self.optimizer.found_inf = (self._bad_step > 0).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def first_bad_step(self) -> int | None:
        """The first step that was not finite, if any; waits for the device."""
        return int(self._bad_step) or None
