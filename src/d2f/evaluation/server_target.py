"""Which server is asked, and what of it."""

from __future__ import annotations

import json
import urllib.parse
from dataclasses import dataclass

from d2f.errors import ConfigError, D2FError
from d2f.evaluation.server_reading import fetch


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server's address, and the model that it is asked for."""

    url: str
    """As `http://127.0.0.1:8000`."""
    model: str
    max_tokens: int
    api_key: str | None = None

    @classmethod
    def find(cls, url: str, *, max_tokens: int, api_key: str | None = None) -> Target:
        """The first model that a server has.

        Raises:
            ConfigError: The URL is not that of a server's root.
            D2FError: The server cannot be asked.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ConfigError(f"--url is {url!r}; it must be like http://127.0.0.1:8000")
        url = url.rstrip("/")
        try:
            model = json.loads(fetch(f"{url}/v1/models", api_key))["data"][0]["id"]
        except (ValueError, LookupError, TypeError):
            raise D2FError(f"{url}/v1/models lists no model in OpenAI's form") from None
        return cls(url=url, model=model, max_tokens=max_tokens, api_key=api_key)
