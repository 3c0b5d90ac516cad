"""Programmatic dependent launch: a kernel starts while the one before it on the stream still runs.

Each kernel first allows its successor to start, then waits for its predecessor's writes before it
reads or writes memory that others write. On devices without the feature both calls vanish.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

try:  # since Triton 3.4
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # pragma: no cover
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def begin(EARLY: tl.constexpr):
    """Let the next kernel start, and wait for the writes of the one before."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


def early_start(x: Tensor) -> dict[str, Any]:
    """Launch options of a kernel that calls `begin`, on the device of `x`."""
    if x.is_cuda and _has_early_start(x.device.index):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


@functools.cache
def _has_early_start(device: int) -> bool:
    return gdc_wait is not None and torch.cuda.get_device_capability(device) >= (9, 0)
