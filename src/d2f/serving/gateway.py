"""The way in: every HTTP request passes the `Gateway`, and bodies are read here within bounds."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d2f.errors import counted
from d2f.serving.errors import ApiError, Disconnected, as_api_error
from d2f.serving.log import LOGGER, log_request
from d2f.serving.metrics import Metrics
from d2f.serving.settings import ServeSettings, is_loopback

_CLIENT_GONE = 499
"""The status that log and metrics show where the client went away before there was an answer."""
_KINDS = {500: "internal", 504: "timeout"}
_OPEN = ("/page/", "/health/")
"""Paths that need no key, with all below them: the page's files and the probes."""
_DISCARDED_BODIES = 16
"""A body of up to this many times the limit is read to its end and thrown away, since a client that
is cut off while it sends does not get to see the answer."""

T = TypeVar("T")


class Gateway:
    """ASGI middleware around the whole application.

    It gives each request an id (header `X-Request-Id`), refuses those that may not be made, turns
    exceptions into errors in OpenAI's format, writes one line of log and counts. A handler adds
    fields to the log through the dict `scope["d2f.log"]`.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req-{secrets.token_hex(8)}"
        fields: dict[str, Any] = {}
        scope["d2f.id"], scope["d2f.log"] = request_id, fields
        status = _CLIENT_GONE
        began = time.perf_counter()

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            self._check_access(scope["path"], dict(scope["headers"]))
            await self._app(scope, receive, send_marked)
        except Disconnected:
            fields["finish_reason"] = "disconnected"
        except Exception as error:
            answer = as_api_error(error, request_id)
            note_error(answer, request_id, self._metrics)
            if status == _CLIENT_GONE:  # nothing was sent yet
                await send_error(answer, send_marked)
        finally:
            # Routes have the names under which they are counted.
            route = getattr(scope.get("route"), "name", "other")
            self._metrics.count_request(fields.get("model"), route, status)
            taken = round(time.perf_counter() - began, 6)
            head = {"id": request_id, "method": scope["method"], "endpoint": scope["path"]}
            log_request({**head, "status": status, "duration": taken, **fields})

    def _check_access(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Refuse a request without the right key (401) or under a foreign name (403).

        A server without a key listens on a loopback address, and any web page that its user opens
        could reach it under a name of its own that resolves there (DNS rebinding); so it answers
        under loopback names only.
        """
        if self._key is None:
            # "[::1]:8000", "localhost:8000"; a colon inside brackets is no port's.
            host = headers.get(b"host", b"").decode("latin-1")
            name, _, port = host.rpartition(":")
            if not is_loopback(name if port.isdigit() else host):
                raise ApiError(
                    403,
                    "this server answers on loopback names only, such as localhost; to serve "
                    "others start it with --api-key",
                    code="host_not_allowed",
                )
        elif path != "/" and not f"{path}/".startswith(_OPEN):
            authorization = headers.get(b"authorization", b"")
            scheme, _, token = authorization.partition(b" ")
            # The comparison takes as long for any token, so that its time tells nothing of the key.
            if not hmac.compare_digest(token.strip(), self._key) or scheme.lower() != b"bearer":
                what = "wrong" if authorization else "missing"
                raise ApiError(
                    401,
                    f"the API key is {what}; send it as the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )


def note_error(error: ApiError, request_id: str, metrics: Metrics) -> None:
    """Count and log an error that is the server's fault, while it is handled."""
    if error.status >= 500:
        metrics.count_error(_KINDS.get(error.status, "unavailable"))
    if error.status == 500:
        LOGGER.error("internal error in %s", request_id, exc_info=True)


async def send_error(error: ApiError, send: Send) -> None:
    """Answer with an error."""
    body = error.body()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **{name.lower(): value for name, value in error.headers.items()},
    }
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def read_json(scope: Scope, receive: Receive, settings: ServeSettings) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises:
        ApiError: The body is of another content type (415), too long (413), too slow (408), or no
            object in JSON as RFC 8259 defines it (400).
        Disconnected: The client went away meanwhile.
    """
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    wrong = None
    if kind != b"application/json":
        wrong = "the body must be JSON with the header Content-Type: application/json"
    elif headers.get(b"content-encoding", b"identity").lower() != b"identity":
        wrong = "compressed bodies are not read; send it plain"
    if wrong is not None:
        raise ApiError(415, wrong, code="unsupported_media_type")
    try:
        async with asyncio.timeout(settings.body_timeout):
            content = await _read(receive, settings.max_body_bytes)
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {settings.body_timeout:g} s",
            code="timeout",
            headers={"Connection": "close"},
        ) from None
    return parse_json(content)


async def _read(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more and size <= limit * _DISCARDED_BODIES:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        part = message.get("body", b"")
        size += len(part)
        more = message.get("more_body", False)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
    if size > limit:
        raise ApiError(
            413,
            f"the body is longer than the {counted(limit, 'byte')} that this server takes",
            code="body_too_large",
            headers={"Connection": "close"},
        )
    return b"".join(parts)


def parse_json(content: bytes) -> dict[str, Any]:
    r"""The object that JSON in UTF-8 holds.

    Raises:
        ApiError: The bytes hold none; the message says where they are wrong.

    Example:
        >>> parse_json(b'{"n": 1}')
        {'n': 1}
    """
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
        if isinstance(value, dict) and b"\\u" in content:
            # An escape such as \ud800 can write half of a surrogate pair, which UTF-8 cannot.
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise _malformed(f"not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise _malformed("half of a surrogate pair is no character") from None
    except RecursionError:
        raise _malformed("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise _malformed(str(error).partition(":")[0]) from None
    if not isinstance(value, dict):
        raise _malformed("not an object { … }")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _malformed(what: str) -> ApiError:
    return ApiError(400, f"the body is no valid JSON: {what}", code="invalid_json")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do work for a client, whose body was read, as long as it is there.

    Raises:
        Disconnected: The client went away first; the work was cancelled.
    """

    async def wait_for_end() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.create_task(work), asyncio.create_task(wait_for_end())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            # The task must not send any more once this call has ended.
            await asyncio.wait((task,))
