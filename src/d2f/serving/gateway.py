"""What every HTTP request passes: id, access, log, and the answer to what went wrong."""

from __future__ import annotations

import secrets
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d2f.serving.auth import Guard
from d2f.serving.body import Disconnected
from d2f.serving.errors import ApiError, as_api_error
from d2f.serving.log import LOGGER, log_request
from d2f.serving.metrics import Metrics
from d2f.serving.settings import ServeSettings

_CLIENT_GONE = 499
"""In log and metrics: the client went away before there was an answer."""
_KINDS = {500: "internal", 504: "timeout"}


class Gateway:
    """ASGI middleware around the whole app.

    It gives each request an id (header `X-Request-Id`), refuses those that may not be made, turns
    exceptions into errors in OpenAI's format, writes one line of log and counts.
    What a handler wants in the log it puts into `scope["d2f.log"]`, a dict.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self._app = app
        self._guard = Guard(settings)
        self._metrics = metrics

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
            self._guard.check(scope["path"], scope["headers"])
            await self._app(scope, receive, send_marked)
        except Disconnected:
            fields["finish_reason"] = "disconnected"
        except Exception as error:
            answer = as_api_error(error, request_id)
            note_error(answer, request_id, self._metrics)
            if status == _CLIENT_GONE:  # nothing was sent yet
                await send_error(answer, send_marked)
        finally:
            # Routes are named as they are counted.
            route = getattr(scope.get("route"), "name", "other")
            self._metrics.count_request(fields.get("model"), route, status)
            taken = round(time.perf_counter() - began, 6)
            head = {"id": request_id, "method": scope["method"], "endpoint": scope["path"]}
            log_request({**head, "status": status, "duration": taken, **fields})


def note_error(error: ApiError, request_id: str, metrics: Metrics) -> None:
    """Count and log, while it is handled, what a client is told to be the server's fault."""
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
