"""Streamed answers: server-sent events with OpenAI's chunks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from d2f.engine.request import GenerationResult
from d2f.serving.answers import answer_id, logprobs_object, new_choice, to_json, usage
from d2f.serving.choice import TokenTexts, finish_reason
from d2f.serving.errors import ApiError
from d2f.serving.plan import Plan
from d2f.serving.ticket import Ticket, Update

DONE = b"data: [DONE]\n\n"


class Chunks:
    """Writes the events of one answer, each as the bytes to send.

    Args:
        plan: What was asked.
        texts: Texts of the model's tokens.
    """

    def __init__(self, plan: Plan, texts: TokenTexts) -> None:
        self._plan = plan
        self._texts = texts
        kind = "chat.completion.chunk" if plan.chat else "text_completion"
        head = {
            "id": answer_id(plan),
            "object": kind,
            "created": plan.created,
            "model": plan.model.name,
        }
        # What all chunks share is written once.
        self._head = f"data: {to_json(head)[:-1]}"
        self._null_usage = ',"usage":null' if plan.include_usage else ""
        self._choices = [new_choice(plan, texts) for _ in plan.requests]
        self._begun = [False] * len(plan.requests)
        self._decoded = [Decoded(texts) for _ in plan.requests]
        self.lasts: dict[int, Update] = {}
        """The last update of each choice that has ended."""

    def of(self, index: int, update: Update) -> bytes:
        """The event of an update; empty where it tells the client nothing new."""
        choice, result = self._choices[index], update.result
        if result is None:
            text, reason = choice.grow(update.token_ids), "null"
        else:
            text, reason = choice.end(result.token_ids), f'"{finish_reason(result.finish_reason)}"'
            self.lasts[index] = update
        if not (text or result is not None or self._plan.include_provisional):
            return b""
        logprobs = "null"
        if self._plan.logprobs:
            logprobs = self._logprobs(index, update)
        content = f'"text":{json.dumps(text, ensure_ascii=False)}'
        if self._plan.chat:
            content = f'"delta":{self._delta(index, text)}'
        extra = ""
        if self._plan.include_provisional:
            extra = f',"d2f":{to_json(self._decoded[index].news(update))}'
        return (
            f'{self._head},"choices":[{{"index":{index},{content},"logprobs":{logprobs},'
            f'"finish_reason":{reason}}}]{self._null_usage}{extra}}}\n\n'
        ).encode()

    def usage(self) -> bytes:
        """The event after all choices have ended."""
        lasts = [self.lasts[index] for index in sorted(self.lasts)]
        total = to_json(usage(self._plan, lasts))
        return f'{self._head},"choices":[],"usage":{total}}}\n\n'.encode()

    def _delta(self, index: int, text: str) -> str:
        content = f'"content":{json.dumps(text, ensure_ascii=False)}'
        if self._begun[index]:
            return f"{{{content}}}" if text else "{}"
        self._begun[index] = True
        return f'{{"role":"assistant",{content}}}'

    def _logprobs(self, index: int, update: Update) -> str:
        result = update.result
        if result is not None:
            probabilities: Sequence[float | None] = result.probabilities
            alternatives = result.alternatives
        else:
            probabilities = [value for block in update.blocks for value in block.probabilities]
            alternatives = [found for block in update.blocks for found in block.alternatives]
        tokens = self._choices[index].logprobs(
            probabilities, alternatives, ended=result is not None
        )
        return to_json(logprobs_object(self._plan, tokens)) if tokens else "null"


class Decoded:
    """Which tokens of a response a watching client knows of.

    Args:
        texts: Texts of the model's tokens.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._known: list[int | None] = []

    def news(self, update: Update) -> dict[str, Any]:
        """The field `d2f` of a chunk."""
        result = update.result
        committed = update.token_ids if result is None else result.token_ids
        news: dict[str, Any] = {
            "seconds": round(update.seconds, 6),
            "waited": round(update.waited, 6),
            "num_forwards": update.num_forwards if result is None else result.num_forwards,
            "num_committed": len(committed),
            "tokens": self._fresh(update),
        }
        start, blocks = 0, []
        for block in update.blocks:
            length = len(block.token_ids)
            blocks.append({"start": start, "length": length, "state": block.state.value})
            start += length
        news["blocks"] = blocks
        if result is not None:
            news |= {
                "done": True,
                "num_tokens": len(result.token_ids),
                "tokens_per_forward": result.tokens_per_forward,
            }
        return news

    def _fresh(self, update: Update) -> list[dict[str, Any]]:
        tokens: list[int | None] = []
        probabilities: list[float | None] = []
        for block in update.blocks:
            tokens += block.token_ids
            probabilities += block.probabilities
        if update.result is not None:
            _put_result(update.result, tokens, probabilities)
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
                        "text": self._texts[token],
                        "probability": None if probability is None else round(probability, 6),
                    }
                )
        return fresh


def _put_result(
    result: GenerationResult, tokens: list[int | None], probabilities: list[float | None]
) -> None:
    """The response stands where it was decoded; a last update may have no blocks any more."""
    count = len(result.token_ids)
    tokens[:count] = result.token_ids
    probabilities[:count] = result.probabilities


async def merged(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Update]]:
    """Updates of all tickets as they come, with the ticket's index."""
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


def error_event(error: ApiError) -> bytes:
    """A fault in the middle of a stream; nothing follows it."""
    return b"data: " + error.body() + b"\n\n"
