"""Where words go: results to stdout, progress and statistics to stderr."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

out = Console(highlight=False, soft_wrap=True)
log = Console(stderr=True, highlight=False)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)
