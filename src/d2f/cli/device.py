"""Choose the device, the number format and the threads of a command."""

from __future__ import annotations

import os
import time

from d2f.cli.usage import UsageError, usage

_SMALL = 100_000_000
"""Parameters of a model below which several threads may be slower than one."""


def choose_device(name: str | None) -> str:
    """Return the named device; if none is named, the GPU if there is one, else the CPU."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return name


def choose_dtype(name: str | None, device: str) -> str:
    """Return the named number format; if none is named, the device's fastest."""
    from d2f.models.checkpoint import resolve_dtype

    with usage():
        resolve_dtype(name)
    return name or fastest_dtype(device)


def choose_threads(num_parameters: int, device: str) -> None:
    """Let torch compute a small model with one thread if that is faster on the CPU now.

    The threads of a small product wait for each other. If another process uses a core, they wait
    for that core: with one of two cores busy, one thread is several times faster than two. The
    choice is measured in some milliseconds. Nothing changes if OMP_NUM_THREADS or MKL_NUM_THREADS
    is set, or for a large model, for which torch uses all cores.
    """
    import torch

    chosen = any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    if chosen or device != "cpu" or num_parameters > _SMALL or torch.get_num_threads() == 1:
        return
    all_threads = torch.get_num_threads()
    seconds = {1: 0.0, all_threads: 0.0}
    x_MD, weight_DE = torch.randn(48, 256), torch.randn(256, 768)
    for turn in range(6):
        for count in seconds:
            torch.set_num_threads(count)
            start = time.perf_counter()
            for _ in range(8):
                x_MD @ weight_DE
            if turn > 0:  # the first turn includes starting the threads
                seconds[count] += time.perf_counter() - start
    torch.set_num_threads(min(seconds, key=seconds.__getitem__))


def fastest_dtype(device: str) -> str:
    """Return `bfloat16` if the device multiplies faster in it, else `float32`.

    A CPU with bf16 instructions computes a window of tokens about twice as fast in bf16; without
    them it is slower. The choice is measured on a product of the shipped model's size, in some
    milliseconds.
    """
    import torch

    if device != "cpu":
        return "bfloat16"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x_MD = torch.randn(48, 256).to(dtype)
        weight_DE = torch.randn(256, 768).to(dtype)
        best = float("inf")
        for _ in range(12):
            start = time.perf_counter()
            for _ in range(4):
                x_MD @ weight_DE
            best = min(best, time.perf_counter() - start)
        seconds[dtype] = best
    return "bfloat16" if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else "float32"
