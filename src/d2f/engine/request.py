"""One request to the engine."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from d2f.decoding.batch import BlockView, GenerationResult
from d2f.decoding.strategies import check_strategy
from d2f.diffusion.policy import DecodingPolicy
from d2f.errors import RequestError
from d2f.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to answer it.

    Example:
        >>> Request(prompt_ids=[1, 2, 3], max_new_tokens=16).strategy
        'pipelined'
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int = 256
    """Exact upper bound of the response; the last block is shorter when it must be."""
    policy: DecodingPolicy | None = None
    """None: the one the checkpoint recommends, else the defaults."""
    eos_token_id: int | Sequence[int] | None = None
    """None: the model's own; `()`: none."""
    strategy: str = "pipelined"
    early_stop: bool = True
    """Stop once everything before an accepted EOS is decoded."""
    temperature: float = 0.0
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    """What only this strategy takes."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What the engine reports of one request."""

    request_id: int
    blocks: list[BlockView]
    """The response's blocks as they stand; of streamed requests only."""
    result: GenerationResult | None = None
    """Set when the request is done."""

    @property
    def token_ids(self) -> list[int]:
        """The response so far, up to its first gap."""
        if self.result is not None:
            return self.result.token_ids
        tokens = (token for block in self.blocks for token in block.token_ids)
        return [t for t in itertools.takewhile(lambda t: t is not None, tokens) if t is not None]


def resolve(request: Request, spec: ModelSpec) -> Request:
    """Fill in what the request leaves to the model, and check it against the model.

    Raises:
        RequestError: A prompt or length that this model cannot serve.
        ConfigError: An unknown strategy or option.
    """
    prompt = list(request.prompt_ids)
    eos = spec.eos_token_ids if request.eos_token_id is None else request.eos_token_id
    eos_ids = (eos,) if isinstance(eos, int) else tuple(eos)
    for kind, ids in (("prompt", prompt), ("EOS", eos_ids)):
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int):
                raise RequestError(f"{kind} token {token!r} is not a whole number")
            if not 0 <= token < spec.vocab_size:
                raise RequestError(
                    f"{kind} token {token} is outside the vocabulary of {spec.vocab_size}"
                )
    limit = request.max_new_tokens
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise RequestError(f"max_new_tokens is {limit!r}; it must be a whole number of at least 1")
    if len(prompt) + limit > spec.max_positions:
        raise RequestError(
            f"the prompt's {len(prompt)} tokens and max_new_tokens {limit} exceed the model's "
            f"{spec.max_positions} positions; shorten the prompt or lower max_new_tokens"
        )
    check_strategy(request.strategy, request.options, spec, len(prompt), limit)
    if not 0 <= request.temperature < float("inf"):
        raise RequestError(f"temperature is {request.temperature}; it must be 0 or more")
    policy = request.policy or spec.recommended_policy or DecodingPolicy()
    return Request(
        **(vars(request) | {"prompt_ids": prompt, "eos_token_id": eos_ids, "policy": policy})
    )
