"""Where a number was measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from d2f import __version__


def describe_environment(*, device: str, dtype: str) -> dict[str, Any]:
    """Device, versions, commit and time, for every result file.

    Args:
        device: As torch names it.
        dtype: Number format of the weights.

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
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "d2f": __version__,
        "git_commit": git_commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def git_commit() -> str | None:
    """The commit that the package's source tree is at, `+` if it has changes; None outside git."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
        return done.stdout.strip()

    try:
        # An installed copy inside somebody else's repository is not at that repository's commit.
        if git("ls-files", "--error-unmatch", Path(__file__).name) == "":
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(folder))
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
