"""What a server answered to one request, read from what came over the wire.

Imports nothing but Python's library and this package's exchange: the load generator, which shares
the machine with the server, must be light.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from d2f.evaluation.http_exchange import Exchange

_DONE = "[DONE]"


@dataclass(kw_only=True)
class ServedAnswer:
    """One request and what became of it."""

    prompt: int
    """Number of the prompt."""
    began: float
    """Seconds since the load began."""
    seconds: float
    """Of the whole request."""
    status: int | None = None
    fault: str | None = None
    """What was wrong with the answer as such, whatever its text."""
    retry_after: float | None = None
    """Seconds that a refusal asks to wait."""
    first_text: float | None = None
    """Seconds until the first committed text."""
    first_text_engine: float | None = None
    """… by the engine's own clock, from the request's first step; where it was asked to say."""
    pieces: list[str] = field(default_factory=list)
    """The texts of the events in their order; of an answer in one piece, that."""
    ids: list[str] = field(default_factory=list)
    """The different names that its events give the answer."""
    choices: list[int] = field(default_factory=list)
    """The different numbers of choices with a text or an end."""
    finish_reasons: list[str] = field(default_factory=list)
    """Of all events that end a choice."""
    num_done: int = 0
    """How many events said that the stream is at its end; of an answer in one piece 1."""
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)

    def to_dict(self) -> dict[str, Any]:
        """For the process that asked for the load."""
        return asdict(self)


def read_answer(exchange: Exchange, *, prompt: int, start: float, streamed: bool) -> ServedAnswer:
    """Put the answer together from its events, or read it as it came in one piece.

    Args:
        exchange: What came.
        prompt: Number of the prompt.
        start: When the load began, of `time.perf_counter`.
        streamed: Whether events were asked for.

    Example:
        >>> exchange = Exchange(began=0.0, status=200, complete=True, seconds=0.5)
        >>> event = b'data: {"id": "a", "choices": [{"index": 0, "text": "4"}]}'
        >>> exchange.parts = [(0.2, event), (0.3, bytes([10, 10]))]
        >>> answer = read_answer(exchange, prompt=0, start=0.0, streamed=True)
        >>> answer.text, answer.first_text
        ('4', 0.3)
    """
    answer = ServedAnswer(
        prompt=prompt,
        began=exchange.began - start,
        seconds=exchange.seconds,
        status=exchange.status,
        fault=exchange.fault,
    )
    if exchange.status != 200:
        wait = exchange.headers.get("retry-after", "")
        answer.retry_after = float(wait) if wait.isdigit() else None
        answer.fault = answer.fault or _message(exchange)
        return answer
    try:
        if streamed:
            for seconds, event in _events(exchange):
                _take_event(answer, event, seconds)
        else:
            _take(answer, json.loads(exchange.body), exchange.seconds)
            answer.num_done = 1
    except (ValueError, LookupError, TypeError, AttributeError):
        answer.fault = answer.fault or "the answer is not in OpenAI's form"
    return answer


def _events(exchange: Exchange) -> Iterator[tuple[float, str]]:
    """Each event's data, and when its last byte came."""
    rest = b""
    for seconds, part in exchange.parts:
        *events, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            lines = event.decode().split("\n")
            data = [line[5:].strip() for line in lines if line.startswith("data:")]
            if data:
                yield seconds, "\n".join(data)


def _take_event(answer: ServedAnswer, event: str, seconds: float) -> None:
    if event == _DONE:
        answer.num_done += 1
        return
    chunk = json.loads(event)
    if "error" in chunk:
        answer.fault = str(chunk["error"]["message"])
        return
    _take(answer, chunk, seconds)


def _take(answer: ServedAnswer, chunk: dict[str, Any], seconds: float) -> None:
    """One chunk of a stream, or all of an answer."""
    if chunk["id"] not in answer.ids:
        answer.ids.append(chunk["id"])
    answer.usage = chunk.get("usage") or answer.usage
    for choice in chunk["choices"]:
        text, reason = choice.get("text") or "", choice.get("finish_reason")
        if text:
            answer.pieces.append(text)
            if answer.first_text is None:
                answer.first_text = seconds
                answer.first_text_engine = chunk.get("d2f", {}).get("seconds")
        if reason is not None:
            answer.finish_reasons.append(reason)
        if (text or reason) and choice["index"] not in answer.choices:
            answer.choices.append(choice["index"])


def _message(exchange: Exchange) -> str:
    """What the server says of an error."""
    try:
        return str(json.loads(exchange.body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"status {exchange.status}"
