"""Buffers and captured steps that batches without the paged cache leave to the next batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from d2f.ops.backend import Backend, select_backend

_Buffers = TypeVar("_Buffers")
MOST_STEPS, MOST_BUFFERS = 512, 256
"""Beyond so many the steps and the buffers unused for longest are given up."""
LEAST_MULTIPLE, PADDED_SHARE = 32, 16
"""Captured lengths are multiples of the first, long ones of a sixteenth of the next power of two:
few shapes occur, and padding stays below an eighth."""


class Workspace:
    """Buffers and captured steps of one model, kept from batch to batch.

    A step that is a pure function over fixed buffers is captured once as a CUDA graph and replayed
    from then on, which is what makes a small model's step fast. On a CPU it is simply called.

    One batch uses it at a time: it asks for all its buffers, then runs its steps. Buffers of shapes
    that do not occur any more are given up, and with them the graphs that use them.

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
        self._turn, self._running = 0, False
        """A turn is what lies between two requests for buffers with steps in between."""
        self._buffers: dict[Hashable, tuple[int, Any]] = {}
        """Buffers by key, each with the turn of its last use; those used last come last."""
        self._steps: dict[Hashable, tuple[int, torch.cuda.CUDAGraph | None]] = {}
        """Steps by key, kept in the same way as buffers; None where a step is not captured yet."""
        self._pool = torch.cuda.graph_pool_handle() if self._use_graphs else None

    @property
    def num_graphs(self) -> int:
        """Steps captured so far."""
        return sum(graph is not None for _, graph in self._steps.values())

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
        """Return the buffers of `key`, which `make` makes unless they are still kept."""
        if self._running:
            self._turn, self._running = self._turn + 1, False
        value = self._buffers[key][1] if key in self._buffers else make()
        self._buffers.pop(key, None)
        self._buffers[key] = self._turn, value
        self._give_up_buffers()
        return value

    def _give_up_buffers(self) -> None:
        while len(self._buffers) > MOST_BUFFERS:
            oldest = next(iter(self._buffers))
            turn = self._buffers[oldest][0]
            if turn == self._turn:
                # The batch that asks now has them all.
                return
            del self._buffers[oldest]
            # A graph holds the addresses of its buffers, none of which was used before it was.
            self._steps = {k: step for k, step in self._steps.items() if step[0] > turn}
        if self._use_graphs and self.num_graphs == 0:
            # A pool that no graph uses any more cannot be captured into again.
            self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run `step`, which reads and writes the buffers of `key` only and waits for no host.

        The first time on a GPU it runs as it is, which compiles what it needs; the second time it
        is captured.
        """
        self._running = True
        if not self._use_graphs:
            step()
            return
        known, (_, graph) = key in self._steps, self._steps.get(key, (0, None))
        if not known:
            step()
        else:
            graph = graph or self._captured(step)
            graph.replay()
        self._steps.pop(key, None)
        self._steps[key] = self._turn, graph
        if len(self._steps) > MOST_STEPS:
            del self._steps[next(iter(self._steps))]

    def _captured(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return graph
