"""Which code made a file: versions and the git commit."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from d2f import __version__

_PACKAGE = Path(__file__).parent


def describe_code() -> dict[str, Any]:
    """Versions of d2f, Python and what d2f computes with, and the commit of the source tree.

    Outside a git checkout `git_commit` and `git_dirty` are None.

    Example:
        >>> describe_code()["d2f"] == __version__
        True
    """
    # In somebody else's repository (a virtual environment there) the commit would be theirs.
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
    """What git answers in the package's folder; None if it fails or is not there."""
    command = ["git", "-C", str(_PACKAGE), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
