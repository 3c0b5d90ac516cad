"""Provenance of a result: the versions and the git commit of the code that made it."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from d2f import __version__

_PACKAGE = Path(__file__).parent


def describe_code() -> dict[str, Any]:
    """Return the versions of d2f, Python and the libraries, and the commit of the source tree.

    `git_commit` and `git_dirty` are None outside a git checkout.

    Example:
        >>> describe_code()["d2f"] == __version__
        True
    """
    # A virtual environment may lie in another project's repository, whose commit is not ours.
    commit = git("rev-parse", "HEAD") if git("ls-files", "__init__.py") else None
    changes = git("status", "--porcelain", "--", str(_PACKAGE)) if commit else None
    return {
        "d2f": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "tokenizers")},
        "platform": platform.platform(),
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
    }


def git(*arguments: str) -> str | None:
    """Return git's output in the package's folder; None if git fails or is not installed."""
    command = ["git", "-C", str(_PACKAGE), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
