"""Measure the best rates of a machine: copying memory and multiplying matrices."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from d2f.evaluation.metrics import percentile

_NOMINAL_BF16 = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX-4090": 165e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The two rates that a step is measured against: of memory and of products."""

    copy_bytes_per_second: float
    """Rate of a copy on the device, bytes read plus bytes written; the best of several sizes."""
    matmul_flops_per_second: float
    """Rate of one large product of random matrices in the model's type; the median of several."""
    matmul_size: int
    """Rows and columns of these matrices."""

    def to_dict(self) -> dict[str, Any]:
        """Return the rates for a result file."""
        return asdict(self)


def measure_rates(device: str, dtype: str) -> Rates:
    """Measure both rates on `device`; it takes a second on a GPU, some on a CPU.

    Example:
        `measure_rates("cuda", "bfloat16").copy_bytes_per_second` is 3.0e12 on an H100.
    """
    on_gpu = device.startswith("cuda")
    megabytes = (256, 1024, 4096) if on_gpu else (64, 256)
    size = 8192 if on_gpu else 1024
    return Rates(
        copy_bytes_per_second=max(_copy_rate(device, m << 20) for m in megabytes),
        matmul_flops_per_second=_matmul_rate(device, getattr(torch, dtype), size),
        matmul_size=size,
    )


def nominal_bf16_rate(processor: str) -> float | None:
    """Give the maker's rate of dense bf16 products, in FLOP/s; None: not known here.

    Example:
        >>> nominal_bf16_rate("NVIDIA H100 80GB HBM3")
        989000000000000.0
    """
    return next((rate for name, rate in _NOMINAL_BF16.items() if name in processor), None)


def _copy_rate(device: str, num_bytes: int) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / min(_seconds(lambda: target.copy_(source), device, 10))


def _matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    one, other, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    seconds = _seconds(lambda: torch.mm(one, other, out=out), device, 20)
    return 2 * size**3 / percentile(seconds, 50)


def _seconds(work: Callable[[], Any], device: str, count: int) -> list[float]:
    """Time each of `count` runs, after three that do not count."""
    for _ in range(3):
        work()
    marks = [mark(device)]
    for _ in range(count):
        work()
        marks.append(mark(device))
    return laps(marks)


def mark(device: torch.device | str) -> Any:
    """A point in time: an event in a GPU's stream, or the clock's reading on a CPU."""
    if torch.device(device).type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def laps(marks: Sequence[Any]) -> list[float]:
    """Seconds from each mark to the next one; waits for the last one."""
    if isinstance(marks[-1], float):
        return [end - begin for begin, end in itertools.pairwise(marks)]
    marks[-1].synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in itertools.pairwise(marks)]
