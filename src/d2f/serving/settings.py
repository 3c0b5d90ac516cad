"""The settings of the HTTP side of the server."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from d2f.errors import ConfigError
from d2f.recipe import at_least

_COUNTS = (
    "max_waiting", "max_body_bytes", "max_prompt_tokens", "max_tokens", "default_max_tokens",
    "max_choices",
)  # fmt: skip
_SECONDS = ("request_timeout", "body_timeout", "drain_seconds")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _check_origin(origin: str) -> None:
    """Refuse what no browser sends as an origin, since it would silently allow nobody."""
    example = "https://app.example or http://localhost:3000, or * for all"
    if origin == "*":
        return
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"CORS origin {origin!r} is no origin of web pages; give {example}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    usual = port in (None, {"http": 80, "https": 443}[parts.scheme])
    sent = f"{parts.scheme}://{host}" + ("" if usual else f":{port}")
    if origin != sent:
        raise ConfigError(f"CORS origin {origin!r} is not what browsers send; give {sent}")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The address that the server listens on, and what it demands and refuses."""

    host: str = "127.0.0.1"
    port: int = 8000
    """The port; 0: any that is free."""
    api_key: str | None = field(default=None, repr=False)
    """The bearer token that clients must send; None: none, on a loopback address only."""
    max_waiting: int = 256
    """Most requests that may wait for their first step."""
    request_timeout: float = 600.0
    """Seconds that a request may take, its time in the queue included."""
    body_timeout: float = 30.0
    """Seconds that a client may take to send a request's body."""
    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    """Most tokens of a prompt; None: what the model has room for."""
    max_tokens: int | None = None
    """Most tokens that a request may ask for; None: what the model has room for."""
    default_max_tokens: int | None = None
    """Most tokens of responses to requests that do not say; None: what the model names, else 256.
    It is fewer where the prompt leaves no more room."""
    max_choices: int = 64
    """Most responses to one request: its prompts times `n`."""
    drain_seconds: float = 30.0
    """Seconds that running requests have to end once the server is told to stop."""
    log_prompts: bool = False
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may use the server from a browser; `*`: all."""

    def __post_init__(self) -> None:
        for name in (*_COUNTS, "port"):
            value = getattr(self, name)
            if type(value) is not int and not (value is None and name.endswith("_tokens")):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number")
        for name in _COUNTS:
            at_least(name, getattr(self, name), 1)
        for name in _SECONDS:
            value = getattr(self, name)
            if type(value) not in (int, float):
                raise ConfigError(f"{name} is {value!r}; it must be a number")
            at_least(name, value, 0)
            if math.isinf(value):
                raise ConfigError(f"{name} is infinite; it must be a finite number of seconds")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port is {self.port!r}; it must be a whole number from 0 to 65535")
        for origin in self.cors_origins:
            _check_origin(origin)
        self._check_access()

    def _check_access(self) -> None:
        if not self.host:
            raise ConfigError("host is empty; give an address, such as 127.0.0.1")
        key = self.api_key
        # Visible ASCII: what a header can carry unchanged. The key itself is never shown.
        if key is not None and not (key and all("!" <= character <= "~" for character in key)):
            raise ConfigError(
                "the API key is empty or has characters other than letters, digits and "
                "punctuation; give one such as the output of: openssl rand -hex 24"
            )
        if key is None and not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host!r} can be reached from other machines, so an API key is "
                "required: --api-key or the environment variable D2F_API_KEY"
            )
