"""The server's errors, and what clients are told of them in OpenAI's format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from d2f.errors import ConfigError, D2FError, RequestError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_LONGEST_VALUE = 80
_LONGEST_MESSAGE = 1000
"""Messages quote names that clients give, which may be as long as a body."""


class QueueFull(D2FError):
    """The queue is full; the same request can be served after some seconds, at least 1."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {math.ceil(retry_after)} s")
        self.retry_after = retry_after


class Unavailable(D2FError):
    """The service does not take requests: it is about to stop, has stopped or has failed."""


class Disconnected(Exception):
    """The client has gone, so nobody reads an answer."""


class ApiError(Exception):
    """An error that the client is told.

    Args:
        status: The HTTP status.
        message: The offending value and the remedy in words.
        param: The field of the request that is wrong.
        code: A name of the error for programs.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _cut(message, _LONGEST_MESSAGE)
        self.param = None if param is None else _cut(param, _LONGEST_VALUE)
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The error as JSON, escaped to ASCII, so that its message may quote any text."""
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode()


def bad_field(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """The error (400) of a request with a wrong field."""
    return ApiError(400, message, param=param, code=code)


def show_value(value: object) -> str:
    """A client's value as a message quotes it: cut where it is long.

    Example:
        >>> show_value("a" * 100)[-8:]
        'aaaaaaa…'
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with thousands of digits; a deep list
        return f"a {type(value).__name__}"
    return _cut(text, _LONGEST_VALUE)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def as_api_error(error: Exception, request_id: str) -> ApiError:
    """The error that a client is told of an exception; of an unexpected one only the request's id.

    Example:
        >>> as_api_error(RequestError("the prompt is empty"), "req-1").status
        400
        >>> as_api_error(KeyError("/secret/path"), "req-1").message
        'internal error; the log of the server has more under req-1'
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        seconds = max(1, math.ceil(error.retry_after))
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(seconds)})
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), code="unavailable")
    if isinstance(error, RequestError | ConfigError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request took longer than the server allows", code="timeout")
    # Other errors of this package are internal, too: a broken chat template's may name files.
    message = f"internal error; the log of the server has more under {request_id}"
    return ApiError(500, message, code="internal_error")
