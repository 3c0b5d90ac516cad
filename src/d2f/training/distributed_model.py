"""A model as several processes hold it: each a copy (DDP), or each a part of all weights (FSDP2).

Frozen weights below a LoRA adapter are sharded, the adapter is not: it is small, has another type
than the weights that it stands beside, and DDP sums its gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from d2f.models.lora import adapter_parameters, has_adapter
from d2f.models.transformer import Transformer
from d2f.training.processes import Processes


class DistributedModel:
    """A model, ready to be trained by these processes; with one process, the model as it is.

    Args:
        model: On the processes' device, the same on all of them. If it is to be sharded its
            parameters are replaced by their shards in place.
        processes: Those that train it.
        sharding: `"none"` or `"full"`; see `TrainConfig.sharding`.
    """

    def __init__(self, model: Transformer, processes: Processes, sharding: str) -> None:
        self.model = model
        self.forward: nn.Module = model
        """What to call for hidden states, so that gradients are summed over the processes."""
        self._processes = processes
        self.is_sharded = sharding == "full" and processes.world_size > 1
        """Whether each process holds a part of the (frozen) weights only."""
        self._meta = _without_weights(model) if self.is_sharded else None
        if self.is_sharded:
            _shard(model, processes)
        # FSDP itself sums the gradients of what it shards.
        self.shards_optimizer = self.is_sharded and not has_adapter(model) and _trained(model)
        """Whether gradients and optimizer state are in shards, too."""
        self._ddp: Any = None
        if processes.world_size > 1 and not self.shards_optimizer and _trained(model):
            from torch.nn.parallel import DistributedDataParallel

            self.forward = self._ddp = DistributedDataParallel(
                model,
                gradient_as_bucket_view=True,
                # Shards differ from process to process; whole weights are made to be the same.
                init_sync=not self.is_sharded,
            )

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a process's share of the loss; sums are those of all shares."""
        # Engines divide the sum over processes by their number, as if each had a mean.
        scale = self._processes.world_size
        (loss if scale == 1 else loss * scale).backward()

    def gradients(self, *, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch: gradients cross processes with the `last` of an update only."""
        if self._ddp is not None:
            return nullcontext() if last else self._ddp.no_sync()
        if self.shards_optimizer:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    @contextmanager
    def whole(
        self, device: torch.device, dtype: torch.dtype | None = None
    ) -> Iterator[Transformer | None]:
        """The model with all its weights on the main process; None on the others.

        If it is sharded the weights are gathered on `device` for the block; all processes must
        come here. Else it is the model itself, where it is.

        Args:
            device: Where gathered weights go.
            dtype: Their type where the model carries no adapter; None: as they are.
        """
        if self._meta is None:
            yield self.model if self._processes.is_main else None
            return
        meta = self._meta
        empty = dict(meta.named_parameters())
        self.model.reshard()  # type: ignore[operator]
        for name, parameter in self.model.named_parameters():
            full = _full(parameter.detach())
            if self._processes.is_main:
                _assign(meta, name, full.to(device, None if has_adapter(meta) else dtype))
            del full
        meta.spec = self.model.spec
        try:
            yield meta.train(self.model.training) if self._processes.is_main else None
        finally:
            for name, parameter in empty.items():
                _assign(meta, name, parameter)


def _trained(model: nn.Module) -> bool:
    return any(p.requires_grad for p in model.parameters())


def _shard(model: Transformer, processes: Processes) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    kept = set(adapter_parameters(model))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=kept)
    # Embedding, last norm and head stay together from the forward pass to the backward pass, since
    # the loss reads the head's weight between the two.
    fully_shard(model, mesh=mesh, ignored_params=kept, reshard_after_forward=False)


def _without_weights(model: Transformer) -> Transformer:
    """The same modules with parameters that hold no memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in model.parameters()
    }
    # What it computed once and keeps belongs to it.
    return copy.deepcopy(model, memo)


def _full(value: Tensor) -> Tensor:
    """A tensor of which each process may hold a part; all processes must come here."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
