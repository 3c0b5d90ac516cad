"""The processes of a run, what all of them agree on, and the model that they share.

`torchrun` and `accelerate launch` start several and say so in the environment. A single process
imports nothing of theirs. Two groups carry the messages of several: gradients go over the device's
own (NCCL, or gloo on CPUs), words and decisions over one on the CPU, which may wait for hours and
notices at once when a process is gone.

Each process holds a copy of the model (DDP), or a part of all weights (FSDP2). Frozen weights below
a LoRA adapter are sharded, the adapter is not: it is small, has another type than the weights that
it stands beside, and DDP sums its gradients.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from d2f.errors import ConfigError, D2FError, TrainingError, counted
from d2f.models.checkpoint import resolve_device
from d2f.models.lora import adapter_parameters, has_adapter
from d2f.models.transformer import Transformer

T = TypeVar("T")

_FAILED = "d2f/failed"
# Others wait as long as the main process samples, evaluates, or encodes data.
_PATIENCE = timedelta(days=7)
_STORE_SECONDS = 3


class Processes(AbstractContextManager["Processes"]):
    """One process by itself: the answers are its own, and nothing waits.

    Used as a context: several processes leave their group at its end, and if one of them fails all
    of them end.
    """

    rank = 0
    """Number of this process among all."""
    world_size = 1
    """Number of the processes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        """The device of this process."""

    @staticmethod
    def current(device: str | torch.device | None = None) -> Processes:
        """The processes that the environment (`WORLD_SIZE`, `RANK`, …) describes.

        By default each takes a GPU, if there are any. Raises `ConfigError` if several have a device
        with a number, too few GPUs or a part of the environment only, and `TrainingError` without
        accelerate.
        """
        if int(os.environ.get("WORLD_SIZE") or 1) == 1:
            return Processes(resolve_device(device))
        return _Group(device)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that logs and writes."""
        return self.rank == 0

    @property
    def group(self) -> Any:
        """The group for words and decisions, for libraries that want one; None: one process."""
        return None

    def wait(self) -> None:
        """Wait until all processes are here."""

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor on the device over all processes, in place."""
        return value

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on any process."""
        return flag

    def share(self, value: T) -> list[T]:
        """Give the values of all processes, by rank."""
        return [value]

    def from_main(self, value: T) -> T:
        """Give the main process's value."""
        return value

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do some work on the main process while the others wait; all raise an error of the work.

        Gives the result on the main process, None elsewhere.
        """
        return work()

    @contextmanager
    def first_one(self) -> Iterator[None]:
        """The main process goes through the block first, then one of each machine, then the rest.

        For files that the first to come makes and the others find, on a shared disk or not.
        """
        yield

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        pass


class _Group(Processes):
    """Several processes."""

    def __init__(self, device: str | torch.device | None) -> None:
        cpu = self._on_cpu(device)
        try:
            from accelerate import PartialState
        except ImportError:
            if os.environ["LOCAL_RANK"] != "0":
                raise SystemExit(1) from None  # its neighbour says so
            raise TrainingError(
                f"training with {counted(int(os.environ['WORLD_SIZE']), 'process')} needs "
                "accelerate: pip install 'd2f[train]'"
            ) from None
        import torch.distributed as dist

        self._owner = not dist.is_initialized()
        state = PartialState(cpu=cpu)
        super().__init__(state.device)
        self._dist, self.rank, self.world_size = dist, state.process_index, state.num_processes
        self._local_rank = state.local_process_index
        self._control = dist.new_group(backend="gloo", timeout=_PATIENCE)

    @staticmethod
    def _on_cpu(device: str | torch.device | None) -> bool:
        """Whether the processes compute on CPUs; checks what the launcher has set."""
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ConfigError(
                    f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {name} is not set; start "
                    "several processes by torchrun or accelerate launch"
                )
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
            raise ConfigError(
                'start without DeepSpeed; sharding = "full" in the recipe spreads a model over GPUs'
            )
        found = resolve_device(device)
        if device is not None and found.index is not None:
            raise ConfigError(
                f"device is '{device}', but each of several processes takes a GPU of its own; "
                "leave the number out"
            )
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if found.type == "cuda" and local_rank >= gpus:
            raise ConfigError(
                f"this machine has {counted(gpus, 'GPU')}, too few for process {local_rank + 1} "
                "of those started on it; start fewer, or use --device cpu"
            )
        return found.type == "cpu"

    @property
    def group(self) -> Any:
        return self._control

    def wait(self) -> None:
        self._dist.barrier(group=self._control)

    def sum(self, value: Tensor) -> Tensor:
        self._dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        flags = torch.tensor([flag], dtype=torch.int32)
        self._dist.all_reduce(flags, op=self._dist.ReduceOp.MAX, group=self._control)
        return bool(flags[0])

    def share(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.world_size
        self._dist.all_gather_object(values, value, group=self._control)
        return values

    def from_main(self, value: T) -> T:
        values = [value]
        self._dist.broadcast_object_list(
            values, src=0, group=self._control, device=torch.device("cpu")
        )
        return values[0]

    def on_main(self, work: Callable[[], T]) -> T | None:
        result: T | None = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = work()
            except (D2FError, OSError) as caught:
                error = caught
        message = self.from_main(None if error is None else str(error))
        if error is not None:
            raise error
        if message is not None:
            raise TrainingError(message)
        return result

    @contextmanager
    def first_one(self) -> Iterator[None]:
        turn = 0 if self.is_main else 1 if self._local_rank == 0 else 2
        for _ in range(turn):
            self.wait()
        yield
        for _ in range(turn, 3):
            self.wait()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.wait()
            if self._owner:
                from accelerate import PartialState

                PartialState().destroy_process_group()
                PartialState._reset_state()
            return
        # The group is left as it is: to take it down would wait for processes that may be gone.
        # This one ends; the others notice it, at the latest when the launcher stops them.
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self._first_to_fail()
            return
        if not self._first_to_fail():
            # One message is enough, and the first is the cause of the others.
            raise SystemExit(1) from None
        if _is_lost_peer(error):
            # The first line alone says which of the causes it was.
            line = str(error).strip().split("\n", 1)[0][:300]
            raise TrainingError(
                "this process lost the others of its run: one was killed or out of memory, or the "
                "network or a GPU failed; the same command with --resume goes on from the newest "
                f"checkpoint ({line})"
            ) from None
        if isinstance(error, D2FError) and not self.is_main:
            raise type(error)(f"process {self.rank}: {error}") from None

    def _first_to_fail(self) -> bool:
        try:
            store = self._dist.distributed_c10d._get_default_store()
            store.set_timeout(timedelta(seconds=_STORE_SECONDS))
            return store.add(_FAILED, 1) == 1
        except RuntimeError:  # gone with the launcher, or the process, that kept it
            return True


def _is_lost_peer(error: BaseException) -> bool:
    """Whether an error is what a process meets when another process, or the network, has failed."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or "gloo" in text or "nccl" in text


class DistributedModel:
    """A model, ready to be trained by these processes; with one process, the model as it is.

    The model is on the processes' device, the same on all of them. With `sharding="full"` (see
    `TrainConfig.sharding`) its parameters are replaced by their shards in place.
    """

    def __init__(self, model: Transformer, processes: Processes, sharding: str) -> None:
        self.model = model
        self.forward: nn.Module = model
        """The module to call for hidden states, so that gradients are summed over the processes."""
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

        If it is sharded the weights are gathered on `device` for the block, in `dtype` where the
        model carries no adapter; all processes must come here. Else it is the model itself, where
        it is.
        """
        if self._meta is None:
            yield self.model if self._processes.is_main else None
            return
        meta = self._meta
        empty = dict(meta.named_parameters())
        self.model.reshard()  # type: ignore[operator]
        for name, parameter in self.model.named_parameters():
            part = parameter.detach()
            full = part.full_tensor() if hasattr(part, "full_tensor") else part
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
    # The copy gets the values that the model computed once and keeps.
    return copy.deepcopy(model, memo)


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
