"""What a client holds of a request in the service."""

from __future__ import annotations

from d2f.serving.update import Update


class Ticket:
    """A request in the service: its updates, and the means to end it.

    An asynchronous iterator of updates. A slow reader gets the newest state, once; nothing queues
    up. Only one task may read a ticket, either the updates (`async for`) or the last one (`last`).
    A ticket that is dropped before its end cancels its request, as `cancel` does at once.

    Only the thread of the service's event loop may use it.
    """

    def __aiter__(self) -> Ticket:
        """From now on the service reports each step that commits text (of a watched one: any)."""
        raise NotImplementedError

    async def __anext__(self) -> Update:
        """The newest state not seen yet; ends after the update with a result or an error."""
        raise NotImplementedError

    async def last(self) -> Update:
        """Wait for the end and return the last update, which has the result.

        Nothing is reported before the end, so this costs least.

        Raises:
            RequestError: The request failed.
            Unavailable: The service ended or failed before.
        """
        raise NotImplementedError

    def cancel(self) -> None:
        """Take the request out; its pages are free within one step. May be called at any time.

        The iteration ends without another update; `last` raises `asyncio.CancelledError`.
        """
        raise NotImplementedError
