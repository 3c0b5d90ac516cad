"""The processes of a run: which one this is, and what all of them agree on.

`torchrun` and `accelerate launch` start several and say so in the environment. A single process
imports nothing of theirs. Two groups carry the messages of several: gradients go over the device's
own (NCCL, or gloo on CPUs), words and decisions over one on the CPU, which may wait for hours and
notices at once when a process is gone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from d2f.errors import ConfigError, D2FError, TrainingError, counted
from d2f.models.checkpoint import resolve_device

T = TypeVar("T")

_FAILED = "d2f/failed"
# Others wait as long as the main process samples, evaluates, or encodes data.
_PATIENCE = timedelta(days=7)
_STORE_SECONDS = 3


class Processes:
    """One process by itself: the answers are its own, and nothing waits.

    Used as a context: several processes leave their group at its end, and if one of them fails all
    of them end.

    Example:
        >>> with Processes.current("cpu") as processes:
        ...     processes.world_size, processes.is_main, processes.share("a")
        (1, True, ['a'])
    """

    rank = 0
    """This process's number among all."""
    world_size = 1
    """How many there are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        """Where this process computes."""

    @staticmethod
    def current(device: str | torch.device | None = None) -> Processes:
        """The processes that the environment (`WORLD_SIZE`, `RANK`, …) describes.

        Args:
            device: None: with several processes a GPU each if there are any, with one the GPU.

        Raises:
            ConfigError: Several processes and a device with a number, or too few GPUs, or a part of
                the environment is missing.
            TrainingError: Several processes without accelerate installed.
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
        """Until all processes are here."""

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all processes, in place, of a tensor on the device."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether it is true for any of them."""
        return flag

    def share(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        return [value]

    def from_main(self, value: T) -> T:
        """The main process's value."""
        return value

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do it on the main process while the others wait; what goes wrong there is raised by all.

        Returns:
            The result on the main process, None elsewhere.
        """
        return work()

    @contextmanager
    def first_one(self) -> Iterator[None]:
        """The main process goes through the block first, then one of each machine, then the rest.

        For files that the first to come makes and the others find, on a shared disk or not.
        """
        yield

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
                "accelerate: "
                "pip install 'd2f[train]'"
            ) from None
        import torch.distributed as dist

        self._dist = dist
        self._owner = not dist.is_initialized()
        state = PartialState(cpu=cpu)
        super().__init__(state.device)
        self.rank, self.world_size = state.process_index, state.num_processes
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
                "of those "
                "started on it; start fewer, or use --device cpu"
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
            raise TrainingError(
                "this process lost the others of its run: one was killed or out of memory, or the "
                "network or a GPU failed; the same command with --resume goes on from the newest "
                f"checkpoint ({_first_line(error)})"
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


def _first_line(error: BaseException) -> str:
    # Which of the causes it was, this alone says.
    return str(error).strip().split("\n", 1)[0][:300]


def _is_lost_peer(error: BaseException) -> bool:
    """Whether it is what a process meets when another one, or the way to it, has failed."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or "gloo" in text or "nccl" in text
