"""The plan of an answer: the requests to the engine that a checked body asks for."""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, cast

from d2f.engine.policy import (
    changed_policy,
    check_decoding,
    default_limit,
    default_strategy,
    heeds_policy,
)
from d2f.engine.request import Request
from d2f.errors import ConfigError, counted
from d2f.serving.errors import ApiError, bad_field
from d2f.serving.protocol import Body, ChatBody, CompletionBody, StreamOptions
from d2f.serving.served_model import ServedModel, find_model
from d2f.serving.settings import ServeSettings
from d2f.text import Tokenizer

_MOST_CHARACTERS_PER_TOKEN = 64
"""No language has so many on average; a text of more is refused before it is cut into tokens."""
_LONG_TEXT = 20_000
"""Texts of more characters are encoded in a thread, so as not to hold up the event loop."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The requests to the engine of one POST. Choice i of prompt p is `requests[p * n + i]`."""

    model: ServedModel
    requests: list[Request]
    chat: bool
    logprobs: bool
    options: StreamOptions
    eos_token_ids: tuple[int, ...]
    """Tokens that end each response and are no part of its text."""
    num_prompt_tokens: int
    """The number of tokens of all prompts, each counted once."""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


async def make_plan(body: Body, models: dict[str, ServedModel], settings: ServeSettings) -> Plan:
    """Encode the prompts and fill in what the body leaves open.

    Raises:
        ApiError: The model is unknown, or a number is beyond what model and settings allow.
        RequestError: The prompt cannot be encoded.
    """
    default = next(iter(models))
    model = find_model(models, default if body.model is None else body.model)
    n, most = body.n or 1, settings.max_choices
    number = n if isinstance(body, ChatBody) else len(body.prompt) * n
    if number > most:
        raise _refused("n", f"{number} responses to one request; at most {most} are allowed")
    prompts = await _encode(body, model, settings)
    if body.stream_options is not None and not body.stream:
        raise _refused("stream_options", "only a stream has them; add stream: true")
    decoding = _decoding(body, model)
    ends = _ends(body, model)
    seed = body.seed
    if seed is None:
        seed = secrets.randbits(31) if body.temperature else 0
    told = body.top_logprobs if isinstance(body, ChatBody) else body.logprobs
    requests = [
        Request(
            prompt_ids=ids,
            max_new_tokens=_limit(body, len(ids), model, settings),
            # Within 64 bits.
            seed=(seed + index + 2**63) % 2**64 - 2**63,
            temperature=body.temperature or 0.0,
            top_k=body.top_k or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
            min_p=body.min_p or 0.0,
            num_alternatives=told or 0,
            stop=body.stops,
            eos_token_id=ends,
            early_stop=body.early_stop is not False,
            **decoding,
        )
        for ids in prompts
        for index in range(n)
    ]
    return Plan(
        model=model,
        requests=requests,
        chat=isinstance(body, ChatBody),
        logprobs=body.logprobs is not None and body.logprobs is not False,
        options=body.stream_options or StreamOptions(),
        eos_token_ids=ends,
        num_prompt_tokens=sum(map(len, prompts)),
    )


def _refused(param: str, words: str) -> ApiError:
    return bad_field(param, f"{param}: {words}")


def _decoding(body: Body, model: ServedModel) -> dict[str, Any]:
    changes = body.policy.changes() if body.policy is not None else {}
    strategy = body.strategy
    if strategy is None:
        # A client that sends a policy means a strategy that heeds one.
        heeded = not changes or heeds_policy(model.strategy)
        spec = model.engine.model.spec
        strategy = model.strategy if heeded else default_strategy(spec, policy=True)
    options = {name: value for name, value in (body.options or {}).items() if value is not None}
    try:
        check_decoding(strategy, changes, options)
        policy = changed_policy(model.engine.model.spec, changes) if changes else None
    except ConfigError as error:
        param = "options" if options else "policy" if changes else "strategy"
        raise bad_field(param, str(error)) from None
    return {"strategy": strategy, "policy": policy, "options": options}


def _ends(body: Body, model: ServedModel) -> tuple[int, ...]:
    """Tokens that end a response: the body's and, unless they replace these, the model's own."""
    spec = model.engine.model.spec
    own = () if body.replace_eos else spec.eos_token_ids
    for token in body.stop_token_ids or ():
        if token >= spec.vocab_size:
            raise _refused(
                "stop_token_ids", f"{token} is outside the vocabulary of {spec.vocab_size}"
            )
    return tuple(dict.fromkeys((*own, *(body.stop_token_ids or ()))))


def most_prompt_tokens(model: ServedModel, settings: ServeSettings) -> int:
    """Most tokens of a prompt; room for one token of the response is left."""
    room = model.engine.model.spec.max_positions - 1
    return room if settings.max_prompt_tokens is None else min(room, settings.max_prompt_tokens)


def most_tokens(model: ServedModel, settings: ServeSettings) -> int:
    """Most tokens that a request may ask for, whatever its prompt."""
    room = model.engine.model.spec.max_positions
    return room if settings.max_tokens is None else min(room, settings.max_tokens)


def _limit(body: Body, prompt_length: int, model: ServedModel, settings: ServeSettings) -> int:
    """Most tokens of a response."""
    given, other = body.max_tokens, body.max_completion_tokens
    if given is not None and other is not None and given != other:
        raise _refused("max_tokens", f"{given}, but max_completion_tokens is {other}; give one")
    wanted = other if given is None else given
    name = "max_completion_tokens" if given is None else "max_tokens"
    positions = model.engine.model.spec.max_positions
    room, most = positions - prompt_length, most_tokens(model, settings)
    if wanted is None:
        own = default_limit(model.engine.model.spec)
        return min(settings.default_max_tokens or own, room, most)
    if wanted > most:
        raise _refused(name, f"{wanted} is more than the {most} that this server allows")
    if wanted > room:
        message = (
            f"the prompt's {counted(prompt_length, 'token')} and {name} {wanted} exceed the "
            f"model's {counted(positions, 'position')}; shorten the prompt or lower {name}"
        )
        raise bad_field(name, message, "context_length_exceeded")
    return wanted


async def _encode(body: Body, model: ServedModel, settings: ServeSettings) -> list[list[int]]:
    """The token ids of all prompts."""
    most = most_prompt_tokens(model, settings)
    if isinstance(body, ChatBody):
        param, texts = "messages", ["".join(message.text for message in body.messages)]
    else:
        param, texts = "prompt", [prompt for prompt in body.prompt if isinstance(prompt, str)]
    for text in texts:
        if len(text) > most * _MOST_CHARACTERS_PER_TOKEN:
            raise _too_long(counted(len(text), "character"), most, param)
    encode = functools.partial(_prompt_ids, body, model.tokenizer)
    long = sum(map(len, texts)) > _LONG_TEXT
    prompts = await asyncio.to_thread(encode) if long else encode()
    for ids in prompts:
        if len(ids) > most:
            raise _too_long(counted(len(ids), "token"), most, param)
    return prompts


def _prompt_ids(body: Body, tokenizer: Tokenizer) -> list[list[int]]:
    if isinstance(body, CompletionBody):
        prompts = cast("list[str | list[int]]", body.prompt)
        return [
            tokenizer.encode_prompt(prompt, chat=False) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
    messages = body.messages
    if tokenizer.chat_template is not None:
        return [tokenizer.encode_chat([message.for_template() for message in messages])]
    if len(messages) > 1 or messages[0].role != "user":
        raise _refused(
            "messages",
            "this model has no chat template, so it takes one message of the user only; send that, "
            "or write the conversation as one prompt for /v1/completions",
        )
    return [tokenizer.encode_prompt(messages[0].text, chat=False)]


def _too_long(length: str, most: int, param: str) -> ApiError:
    message = f"the prompt has {length}; at most {counted(most, 'token')} are taken"
    return bad_field(param, message, "context_length_exceeded")
