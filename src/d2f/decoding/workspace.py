"""What batches without the paged cache leave to the next one: buffers and captured steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from d2f.ops.backend import Backend, select_backend

_Buffers = TypeVar("_Buffers")
MOST_GRAPHS = 512
"""Beyond so many the graph unused for longest is given up."""
LEAST_MULTIPLE, PADDED_SHARE = 32, 16
"""Captured lengths are multiples of the first, long ones of a sixteenth of the next power of two:
few shapes occur, and padding stays below an eighth."""


class Workspace:
    """Buffers and captured steps of one model, kept from batch to batch.

    A step that is a pure function over fixed buffers is captured once as a CUDA graph and replayed
    from then on, which is what makes a small model's step fast. On a CPU it is simply called.

    Args:
        device: Where the model is.
        use_graphs: Capture on a GPU.
        backend: The operations of its forwards; None: those that suit the device.
        pads: Pad lengths; None: where steps are captured. Elsewhere it only serves tests.

    Example:
        >>> workspace = Workspace(torch.device("cpu"))
        >>> count_1 = workspace.buffers("count", lambda: torch.zeros(1))
        >>> def step() -> None:
        ...     count_1.add_(1)
        >>> workspace.run("count", step); workspace.run("count", step)
        >>> workspace.buffers("count", lambda: torch.zeros(1))
        tensor([2.])
    """

    def __init__(
        self,
        device: torch.device,
        *,
        use_graphs: bool = True,
        backend: Backend | None = None,
        pads: bool | None = None,
    ) -> None:
        self.device = device
        self.backend = backend or select_backend("auto", device)
        self._use_graphs = use_graphs and device.type == "cuda"
        self._pads = self._use_graphs if pads is None else pads
        self._buffers: dict[Hashable, Any] = {}
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        """The one used last comes last."""
        self._pool = torch.cuda.graph_pool_handle() if self._use_graphs else None

    @property
    def num_graphs(self) -> int:
        """Steps captured so far."""
        return len(self._graphs)

    def padded(self, length: int) -> int:
        """The length of the buffers and steps for so many tokens.

        Example:
            >>> padded = Workspace(torch.device("cpu"), pads=True).padded
            >>> [padded(n) for n in (1, 33, 512, 1000, 1025)]
            [32, 64, 512, 1024, 1152]
        """
        if not self._pads:
            return length
        multiple = max(LEAST_MULTIPLE, (1 << max(length - 1, 0).bit_length()) // PADDED_SHARE)
        return -(-length // multiple) * multiple

    def buffers(self, key: Hashable, make: Callable[[], _Buffers]) -> _Buffers:
        """What `make` returned when it was first called for `key`."""
        if key not in self._buffers:
            self._buffers[key] = make()
        return self._buffers[key]

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run `step`, which reads and writes the buffers of `key` only and waits for no host.

        The first time on a GPU it runs as it is, which compiles what it needs; the second time it
        is captured.
        """
        if not self._use_graphs:
            step()
            return
        if key not in self._graphs:
            if (key, "seen") not in self._buffers:
                self._buffers[key, "seen"] = True
                step()
                return
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()
            self._graphs[key] = graph
            if len(self._graphs) > MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
        graph = self._graphs[key] = self._graphs.pop(key)
        graph.replay()
