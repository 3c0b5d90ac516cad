"""The page's files, as they are sent."""

from __future__ import annotations

import mimetypes
from pathlib import Path

from starlette.responses import Response

_FOLDER = Path(__file__).parent / "page"
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # The browser asks each time: another version of the server has other files.
    "Cache-Control": "no-cache",
}


class Page:
    """Static files, read once; nothing else can be asked for.

    Example:
        >>> Page().file("../settings.py") is None
        True
    """

    def __init__(self) -> None:
        self._files = {
            str(path.relative_to(_FOLDER)): (
                path.read_bytes(),
                mimetypes.guess_type(path.name)[0] or "application/octet-stream",
            )
            for path in sorted(_FOLDER.rglob("*"))
            if path.is_file()
        }

    def file(self, name: str) -> Response | None:
        """The answer with a file, if there is one of this name."""
        if name not in self._files:
            return None
        content, kind = self._files[name]
        return Response(content, media_type=kind, headers=_HEADERS)
