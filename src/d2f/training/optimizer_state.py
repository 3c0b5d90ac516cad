"""The optimizer's state in a checkpoint: whole in one file, or in shards that each process writes.

Shards are those of torch.distributed.checkpoint, by the parameters' names, and can be read by any
number of processes, one included.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2f.errors import TrainingError
from d2f.training.processes import Processes

SHARDS_FOLDER = "optimizer"
_KEY = "optimizer"


def save_shards(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, processes: Processes
) -> None:
    """Write each process's part of the state to a folder; all processes must come here.

    Raises:
        TrainingError: One of them could not write its part.
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

    Raises:
        TrainingError: A shard is missing or broken, or belongs to another model.
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
            f"({_reason(error)}); remove the folder to go on from the checkpoint before"
        ) from None
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state[_KEY])


def load_whole(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], *, shard: bool
) -> None:
    """Give the optimizer a state of `optimizer.state_dict()`; `shard`: in parts, as the model is.

    Raises:
        KeyError, ValueError: It is the state of another optimizer.
    """
    if not shard:
        optimizer.load_state_dict(dict(state))
        for parameter, entry in optimizer.state.items():
            # The optimizer itself does not look, and would write past the ends.
            if entry["exp_avg"].shape != parameter.shape:
                raise ValueError(
                    f"its optimizer has a moment of {tuple(entry['exp_avg'].shape)} for a "
                    f"parameter of {tuple(parameter.shape)}"
                )
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    names = {id(p): name for name, p in model.named_parameters()}
    groups, named = optimizer.param_groups, {}
    sizes = [len(group["params"]) for group in groups]
    if sizes != [len(group["params"]) for group in state["param_groups"]]:
        raise ValueError("its optimizer has other groups of parameters")
    new_groups = []
    for group, saved in zip(groups, state["param_groups"], strict=True):
        group_names = [names[id(p)] for p in group["params"]]
        for parameter, name, number in zip(
            group["params"], group_names, saved["params"], strict=True
        ):
            entry = state["state"][number]
            if entry["exp_avg"].shape != parameter.shape:
                raise ValueError(f"its {name} is {tuple(entry['exp_avg'].shape)}")
            named[name] = entry
        new_groups.append({**saved, "params": group_names})
    set_optimizer_state_dict(
        model,
        optimizer,
        optim_state_dict={"state": named, "param_groups": new_groups},
        options=StateDictOptions(full_state_dict=True),
    )


def _reason(error: BaseException) -> str:
    """The first cause in one line; processes' failures come with their tracebacks."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
