"""The HTTP answer that goes on while tokens come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from d2f.serving.answers import log_fields
from d2f.serving.body import Disconnected, unless_gone
from d2f.serving.choice import TokenTexts
from d2f.serving.errors import Unavailable, as_api_error
from d2f.serving.gateway import note_error
from d2f.serving.metrics import Metrics
from d2f.serving.plan import Plan
from d2f.serving.stream import DONE, Chunks, error_event, merged
from d2f.serving.ticket import Ticket

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # Proxies in front must not collect events.
    "X-Accel-Buffering": "no",
}
_FAREWELL_SECONDS = 1.0
"""How long a client that does not read may hold up its last event."""


class EventStream(Response):
    """Server-sent events of one request's tickets, which end with it, however it ends.

    Args:
        plan: What was asked.
        tickets: One for each choice.
        texts: Texts of the model's tokens.
        deadline: When it ends at the latest, on the event loop's clock.
        metrics: Where faults are counted.
    """

    def __init__(
        self,
        plan: Plan,
        tickets: Sequence[Ticket],
        texts: TokenTexts,
        deadline: float,
        metrics: Metrics,
    ) -> None:
        super().__init__(headers=_HEADERS)
        # It is not known how long it will be.
        del self.headers["content-length"]
        self._plan = plan
        self._tickets = tickets
        self._chunks = Chunks(plan, texts)
        self._deadline = deadline
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events; a fault is the last of them."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            async with asyncio.timeout_at(self._deadline):
                await send(start)
                await unless_gone(receive, self._write(send))
        except Disconnected:
            raise
        except Exception as error:
            answer = as_api_error(error, scope["d2f.id"])
            note_error(answer, scope["d2f.id"], self._metrics)
            scope["d2f.log"]["finish_reason"] = answer.code
            event = {"type": "http.response.body", "body": error_event(answer)}
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FAREWELL_SECONDS):
                    await send(event)
        finally:
            for ticket in self._tickets:
                ticket.cancel()
            self._log(scope)

    async def _write(self, send: Send) -> None:
        chunks = self._chunks
        async for index, update in merged(self._tickets):
            if update.error is not None:
                raise update.error
            event = chunks.of(index, update)
            if event:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        if len(chunks.lasts) < len(self._tickets):
            raise Unavailable("the server ended this request; try again")
        last = chunks.usage() + DONE if self._plan.include_usage else DONE
        await send({"type": "http.response.body", "body": last})

    def _log(self, scope: Scope) -> None:
        lasts = [update for _, update in sorted(self._chunks.lasts.items())]
        if lasts:
            scope["d2f.log"].update(log_fields(self._plan, lasts))
