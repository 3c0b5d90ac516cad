"""Answers in OpenAI's format: whole, or as server-sent events while tokens come."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from d2f.engine.response_text import ResponseText, TokenLogprob, TokenTexts
from d2f.serving.errors import Disconnected, Unavailable, as_api_error
from d2f.serving.gateway import note_error, unless_gone
from d2f.serving.metrics import Metrics
from d2f.serving.plan import Plan
from d2f.serving.ticket import Ticket, Update

_LOGGED = (
    "prompt_tokens", "completion_tokens", "num_forwards", "seconds", "waited", "finish_reason",
)  # fmt: skip
_DONE = b"data: [DONE]\n\n"
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # Proxies in front must not collect events.
    "X-Accel-Buffering": "no",
}
_FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
"""The engine's words -> the protocol's."""
_FAREWELL_SECONDS = 1.0
"""Seconds for which a client that does not read may hold up the last event."""
# Compact. Text that a tokenizer gave can always be written as UTF-8.
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _head(plan: Plan, chat_object: str) -> dict[str, Any]:
    """The fields with which an answer, or each of its chunks, begins."""
    return {
        "id": f"{'chatcmpl' if plan.chat else 'cmpl'}-{plan.id}",
        "object": chat_object if plan.chat else "text_completion",
        "created": plan.created,
        "model": plan.model.name,
    }


def _usage(plan: Plan, lasts: Sequence[Update]) -> dict[str, Any]:
    """The usage of an answer: tokens and forwards of all choices, the longest of their times."""
    results = [last.result for last in lasts if last.result is not None]
    tokens = sum(len(result.token_ids) for result in results)
    forwards = sum(result.num_forwards for result in results)
    return {
        "prompt_tokens": plan.num_prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": plan.num_prompt_tokens + tokens,
        "num_forwards": forwards,
        "tokens_per_forward": tokens / max(forwards, 1),
        "seconds": round(max(last.seconds for last in lasts), 6),
        "waited": round(max(last.waited for last in lasts), 6),
    }


def log_fields(plan: Plan, lasts: Sequence[Update]) -> dict[str, Any]:
    """The fields of an answer's line in the log, which has no text."""
    results = [last.result for last in lasts if last.result is not None]
    reasons = {_FINISH_REASONS[result.finish_reason] for result in results}
    fields = {**_usage(plan, lasts), "finish_reason": ",".join(sorted(reasons))}
    return {name: fields[name] for name in _LOGGED}


def whole_answer(plan: Plan, lasts: Sequence[Update], texts: TokenTexts) -> bytes:
    """The JSON answer to a request that is not streamed."""
    choices = [
        _Choice(plan, index, texts).shown(last, whole=True) for index, last in enumerate(lasts)
    ]
    head = _head(plan, "chat.completion")
    return _to_json({**head, "choices": choices, "usage": _usage(plan, lasts)}).encode()


def _logprobs(plan: Plan, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Tokens with their logarithms, in the form of the endpoint."""
    if plan.chat:
        content = [
            {
                **_chat_logprob(token.text, token.logprob),
                "top_logprobs": [_chat_logprob(*other) for other in token.alternatives],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}
    tops = [_top(token) for token in tokens]
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops if plan.requests[0].num_alternatives else None,
        "text_offset": [token.offset for token in tokens],
    }


def _chat_logprob(text: str, logprob: float) -> dict[str, Any]:
    # Half a character is no text; its bytes are known to its tokenizer only.
    known = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": known}


def _top(token: TokenLogprob) -> dict[str, float]:
    """The most probable tokens by their text, and the accepted one in any case."""
    top: dict[str, float] = {}
    for text, logprob in token.alternatives:
        # Of tokens that look alike the most probable one counts.
        top.setdefault(text, logprob)
    return top | {token.text: token.logprob}


class _Choice:
    """One response of an answer, and what the client was told of it."""

    def __init__(self, plan: Plan, index: int, texts: TokenTexts) -> None:
        self._plan, self._index, self._token_texts = plan, index, texts
        request = plan.requests[index]
        self._text = ResponseText(
            plan.model.tokenizer,
            eos_token_ids=plan.eos_token_ids,
            stop=request.stop,
            texts=texts if plan.logprobs else None,
        )
        self._begun = False
        self._known: list[int | None] = []
        """The tokens that a client who asked for provisional ones knows."""

    def shown(self, update: Update, *, whole: bool = False) -> dict[str, Any] | None:
        """The choice of an event, or of a `whole` answer; None if it tells nothing new."""
        plan, result = self._plan, update.result
        if result is None:
            text = self._text.grow(update.token_ids)
        else:
            text = self._text.end(result.token_ids)
        if not (text or result is not None or plan.options.include_provisional):
            return None
        content: dict[str, Any] = {"text": text}
        if plan.chat and whole:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        elif plan.chat and self._begun:
            content = {"delta": {"content": text} if text else {}}
        elif plan.chat:
            content, self._begun = {"delta": {"role": "assistant", "content": text}}, True
        tokens: Sequence[TokenLogprob] = ()
        if plan.logprobs and result is None:
            tokens = self._text.logprobs(*_block_facts(update), ended=False)
        elif plan.logprobs and result is not None:
            tokens = self._text.logprobs(result.probabilities, result.alternatives, ended=True)
        return {
            "index": self._index,
            **content,
            "logprobs": _logprobs(plan, tokens) if tokens or (plan.logprobs and whole) else None,
            "finish_reason": None if result is None else _FINISH_REASONS[result.finish_reason],
        }

    def provisional(self, update: Update) -> dict[str, Any]:
        """The field `d2f` of an event."""
        result = update.result
        committed = update.token_ids if result is None else result.token_ids
        lengths = [len(block.token_ids) for block in update.blocks]
        places = zip(itertools.accumulate(lengths, initial=0), lengths, update.blocks, strict=False)
        told: dict[str, Any] = {
            "seconds": round(update.seconds, 6),
            "waited": round(update.waited, 6),
            "num_forwards": update.num_forwards if result is None else result.num_forwards,
            "num_committed": len(committed),
            "tokens": self._fresh(update),
            "blocks": [
                {"start": start, "length": length, "state": block.state.value}
                for start, length, block in places
            ],
        }
        if result is not None:
            told |= {
                "done": True,
                "num_tokens": len(result.token_ids),
                "tokens_per_forward": result.tokens_per_forward,
            }
        return told

    def _fresh(self, update: Update) -> list[dict[str, Any]]:
        """The tokens that the client does not know yet."""
        tokens = [token for block in update.blocks for token in block.token_ids]
        probabilities, _ = _block_facts(update)
        if update.result is not None:
            # A last update may have no blocks any more; the response stands where they were.
            count = len(update.result.token_ids)
            tokens[:count] = update.result.token_ids
            probabilities[:count] = update.result.probabilities
        known = self._known
        known += [None] * (len(tokens) - len(known))
        fresh = []
        for position, token in enumerate(tokens):
            if token is not None and token != known[position]:
                known[position] = token
                probability = probabilities[position]
                fresh.append(
                    {
                        "position": position,
                        "token_id": token,
                        "text": self._token_texts[token],
                        "probability": None if probability is None else round(probability, 6),
                    }
                )
        return fresh


def _block_facts(update: Update) -> tuple[list[float | None], list[Any]]:
    """Probabilities and alternatives of the tokens of all blocks."""
    probabilities = [value for block in update.blocks for value in block.probabilities]
    return probabilities, [found for block in update.blocks for found in block.alternatives]


class EventStream(Response):
    """The server-sent events of one request, whose tickets end with it, however it ends.

    It ends at the `deadline`, a time on the event loop's clock, at the latest.
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
        # The length is not known beforehand.
        del self.headers["content-length"]
        self._plan, self._tickets = plan, tickets
        self._deadline, self._metrics = deadline, metrics
        # What all events share is written once.
        self._head = f"data: {_to_json(_head(plan, 'chat.completion.chunk'))[:-1]}"
        self._tail = ',"usage":null' if plan.options.include_usage else ""
        self._choices = [_Choice(plan, index, texts) for index in range(len(plan.requests))]
        self._lasts: dict[int, Update] = {}
        """The last update of each choice that has ended."""

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
            event = b"data: " + answer.body() + b"\n\n"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FAREWELL_SECONDS):
                    await send({"type": "http.response.body", "body": event})
        finally:
            for ticket in self._tickets:
                ticket.cancel()
            if self._lasts:
                scope["d2f.log"].update(log_fields(self._plan, self._ended()))

    async def _write(self, send: Send) -> None:
        async for index, update in _merged(self._tickets):
            if update.error is not None:
                raise update.error
            event = self._event(index, update)
            if event:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        if len(self._lasts) < len(self._tickets):
            raise Unavailable("the server ended this request; try again")
        last = _DONE
        if self._plan.options.include_usage:
            usage = _to_json(_usage(self._plan, self._ended()))
            last = f'{self._head},"choices":[],"usage":{usage}}}\n\n'.encode() + _DONE
        await send({"type": "http.response.body", "body": last})

    def _event(self, index: int, update: Update) -> bytes:
        if update.result is not None:
            self._lasts[index] = update
        choice, tail = self._choices[index], self._tail
        piece = choice.shown(update)
        if piece is None:
            return b""
        if self._plan.options.include_provisional:
            tail += f',"d2f":{_to_json(choice.provisional(update))}'
        return f'{self._head},"choices":[{_to_json(piece)}]{tail}}}\n\n'.encode()

    def _ended(self) -> list[Update]:
        """The last updates in the order of the choices."""
        return [self._lasts[index] for index in sorted(self._lasts)]


async def _merged(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Update]]:
    """The updates of all tickets as they come, each with the ticket's index."""
    if len(tickets) == 1:
        async for update in tickets[0]:
            yield 0, update
        return
    waiting: dict[asyncio.Task[Update | None], int] = {}
    try:
        for index, ticket in enumerate(tickets):
            waiting[asyncio.create_task(_next(ticket))] = index
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                index, news = waiting.pop(task), task.result()
                if news is not None:
                    yield index, news
                    waiting[asyncio.create_task(_next(tickets[index]))] = index
    finally:
        for task in waiting:
            task.cancel()


async def _next(ticket: Ticket) -> Update | None:
    return await anext(ticket, None)
