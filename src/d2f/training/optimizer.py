"""AdamW, the learning rate over a run, updates that skip what is not finite, and saved states.

In a checkpoint the optimizer's state is whole in one file, or in shards that each process writes.
Shards are those of torch.distributed.checkpoint, by the parameters' names, and can be read by any
number of processes, one included.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2f.errors import TrainingError
from d2f.models.transformer import Transformer
from d2f.training.processes import Processes
from d2f.training.sections import ModelConfig, OptimizerConfig


def require_gradients(model: Transformer, settings: ModelConfig) -> None:
    """Choose the weights to train where no adapter is: all, or all but the token embeddings."""
    model.requires_grad_(True)
    model.embed.requires_grad_(settings.train_embeddings)


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


SHARDS_FOLDER = "optimizer"
_KEY = "optimizer"


def save_shards(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, processes: Processes
) -> None:
    """Write each process's part of the state to a folder; all processes must come here.

    Raises `TrainingError` if one of them could not write its part.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state = {_KEY: get_optimizer_state_dict(model, optimizer)}
    try:
        dcp.save(
            state,
            storage_writer=dcp.FileSystemWriter(folder / SHARDS_FOLDER),
            process_group=processes.group,
        )
    except dcp.CheckpointException as error:
        raise TrainingError(f"cannot save to '{folder}': {_reason(error)}") from None


def load_shards(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, processes: Processes
) -> None:
    """Read what `save_shards` wrote; the model need not be sharded as it was, or at all.

    Raises `TrainingError` if a shard is missing or broken, or belongs to another model.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    state = {_KEY: get_optimizer_state_dict(model, optimizer)}
    try:
        with warnings.catch_warnings():
            # A process alone is told that it is alone.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(
                state,
                storage_reader=dcp.FileSystemReader(folder / SHARDS_FOLDER),
                process_group=processes.group,
                no_dist=processes.world_size == 1,
            )
    except (dcp.CheckpointException, OSError, ValueError, RuntimeError, KeyError) as error:
        raise TrainingError(
            f"cannot resume from {folder}: its optimizer state is incomplete or of another model "
            f"({_reason(error)}); remove the folder to go on from the checkpoint before or, if "
            "another version of d2f wrote them all, finish the run with that version"
        ) from None
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state[_KEY])


def load_whole(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], *, shard: bool
) -> None:
    """Give the optimizer a state of `optimizer.state_dict()`; `shard`: in parts, as the model is.

    Raises `KeyError` or `ValueError` if it is the state of another optimizer.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != [len(group["params"]) for group in state["param_groups"]]:
        raise ValueError("its optimizer has other groups of parameters")
    for number, entry in state["state"].items():
        # The optimizer itself does not look, and would write past the ends.
        found, wanted = tuple(entry["exp_avg"].shape), tuple(parameters[number].shape)
        if found != wanted:
            raise ValueError(f"its optimizer has a moment of {found} for a parameter of {wanted}")
    if not shard:
        optimizer.load_state_dict(dict(state))
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    names = {id(p): name for name, p in model.named_parameters()}
    groups = zip(optimizer.param_groups, state["param_groups"], strict=True)
    named: dict[str, Any] = {
        "state": {names[id(p)]: state["state"][number] for number, p in enumerate(parameters)},
        "param_groups": [
            {**saved, "params": [names[id(p)] for p in group["params"]]} for group, saved in groups
        ],
    }
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, optim_state_dict=named, options=options)


def _reason(error: BaseException) -> str:
    """The first cause in one line; processes' failures come with their tracebacks."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
