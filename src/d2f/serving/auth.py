"""Who may ask: the API key, and the names under which a server without one answers."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from d2f.serving.errors import ApiError
from d2f.serving.settings import ServeSettings, is_loopback

_OPEN = ("/page/", "/health/")
"""Paths that need no key, with what is below them: the page's files and the probes."""


class Guard:
    """Lets requests pass or refuses them by their headers.

    Without a key the server is on a loopback address, and any web page that the user opens could
    reach it under a name of its own that resolves there (DNS rebinding); so only loopback names are
    answered.

    Example:
        >>> guard = Guard(ServeSettings(api_key="secret"))
        >>> guard.check("/v1/models", [(b"authorization", b"Bearer secret")])
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._key = None if settings.api_key is None else settings.api_key.encode()

    def check(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Refuse a request that may not be made.

        Raises:
            ApiError: 401 without the right key, 403 under a name that is not this machine's.
        """
        named = dict(headers)
        if self._key is None:
            _check_host(named.get(b"host", b"").decode("latin-1"))
        elif path != "/" and not f"{path}/".startswith(_OPEN):
            self._check_key(named.get(b"authorization"))

    def _check_key(self, authorization: bytes | None) -> None:
        assert self._key is not None
        scheme, _, token = (authorization or b"").partition(b" ")
        # Both are compared whole whatever they are, so that time tells nothing about the key.
        if not hmac.compare_digest(token.strip(), self._key) or scheme.lower() != b"bearer":
            what = "wrong" if authorization else "missing"
            raise ApiError(
                401,
                f"the API key is {what}; send it as the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _check_host(header: str) -> None:
    # "[::1]:8000", "localhost:8000"; a colon inside brackets is no port's.
    name = header.rpartition(":")[0] if header.rpartition(":")[2].isdigit() else header
    if not is_loopback(name):
        raise ApiError(
            403,
            "this server answers on loopback names only, such as localhost; to serve others start "
            "it with --api-key",
            code="host_not_allowed",
        )
