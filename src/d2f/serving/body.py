"""Reading a request's body: JSON of bounded size, in bounded time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

from starlette.types import Receive, Scope

from d2f.errors import counted
from d2f.serving.errors import ApiError
from d2f.serving.settings import ServeSettings

_DISCARDED_BODIES = 16
"""So many times the limit is read and thrown away: a client that is cut off while it sends does not
get to see the answer."""


T = TypeVar("T")


class Disconnected(Exception):
    """The client has gone; there is nobody to answer."""


async def read_json(scope: Scope, receive: Receive, settings: ServeSettings) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises:
        ApiError: Of another content type (415), too long (413), too slow (408), or not JSON as
            RFC 8259 has it, or no object (400).
        Disconnected: The client went away meanwhile.
    """
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise ApiError(
            415,
            "the body must be JSON with the header Content-Type: application/json",
            code="unsupported_media_type",
        )
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise ApiError(
            415, "compressed bodies are not read; send it plain", code="unsupported_media_type"
        )
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
    """An object from JSON in UTF-8.

    Raises:
        ApiError: It is none; says where.

    Example:
        >>> parse_json(b'{"n": 1}')
        {'n': 1}
    """
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _malformed(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise _malformed("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise _malformed(str(error).partition(":")[0]) from None
    if not isinstance(value, dict):
        raise _malformed("not an object { … }")
    if b"\\u" in content:
        _check_unicode(value)
    return value


def _check_unicode(value: dict[str, Any]) -> None:
    r"""Refuse halves of a surrogate pair, which an escape such as \ud800 can write."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _malformed("half of a surrogate pair is no character") from None
    except RecursionError:  # writing goes a little less deep than reading
        raise _malformed("nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _malformed(what: str) -> ApiError:
    return ApiError(400, f"the body is no valid JSON: {what}", code="invalid_json")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work for a client as long as it is there.

    Args:
        receive: Of a request whose body was read.
        work: Cancelled when the client goes, or when this is cancelled.

    Raises:
        Disconnected: The client went away first.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_wait_for_end(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            # It must not send any more once this has ended.
            await asyncio.wait((task,))


async def _wait_for_end(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
