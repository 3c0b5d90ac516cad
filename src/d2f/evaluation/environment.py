"""Describe the machine, the versions and the commit of a measurement."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

from d2f.provenance import describe_code


def describe_environment(*, device: str, dtype: str) -> dict[str, Any]:
    """Describe processor, number format, versions, commit and time, for every result file.

    Example:
        >>> describe_environment(device="cpu", dtype="float32")["device"]
        'cpu'
    """
    import torch

    cuda = device.startswith("cuda")
    return {
        "processor": torch.cuda.get_device_name(device) if cuda else _processor(),
        "device": device,
        "dtype": dtype,
        "num_threads": torch.get_num_threads(),
        "num_cores": os.cpu_count(),
        **describe_code(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
