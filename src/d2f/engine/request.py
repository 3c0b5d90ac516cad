"""One request to the engine."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from d2f.decoding.alternatives import MOST_ALTERNATIVES
from d2f.decoding.alternatives import Alternatives as Alternatives
from d2f.decoding.batch import BlockView, GenerationResult, cut_at_eos, decoded_prefix
from d2f.decoding.strategies import STRATEGIES, check_options, check_strategy
from d2f.diffusion.policy import DecodingPolicy
from d2f.engine.policy import default_strategy
from d2f.errors import RequestError, counted
from d2f.models.spec import ModelSpec

MOST_TEMPERATURE = 1e30
"""All tokens are as probable long before, and a little beyond it fp32 ends."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to answer it.

    Example:
        >>> Request(prompt_ids=[1, 2, 3], strategy="serial").max_new_tokens
        256
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int = 256
    """Exact upper bound of the response; the last block is shorter when it must be."""
    policy: DecodingPolicy | None = None
    """None: the one the checkpoint recommends, else the defaults."""
    eos_token_id: int | Sequence[int] | None = None
    """None: the model's own; `()`: none."""
    strategy: str | None = None
    """None: `autoregressive` for such a model; `pipelined`, but `vanilla` for a checkpoint that was
    not distilled, unless a policy is given."""
    early_stop: bool = True
    """Stop once everything before an accepted EOS, or a stop string, is decoded; False decodes what
    would be decoded without stop strings, every block that was opened. The response is the same."""
    temperature: float = 0.0
    """0: the most probable tokens; above, they are sampled."""
    top_k: int = 0
    """Sample among this many most probable tokens; 0: among all. Matters with a temperature."""
    top_p: float = 1.0
    """Sample among the fewest most probable tokens of this mass. Matters with a temperature."""
    min_p: float = 0.0
    """Sample among tokens that are at least this share as probable as the most probable one; 0:
    among all. Matters with a temperature."""
    seed: int = 0
    stop: Sequence[str] = ()
    """The response ends with the token that completes one, which may be a special token; needs the
    engine's tokenizer."""
    num_alternatives: int = 0
    """Report so many of the most probable tokens at each position, 20 at most: in the forward that
    decoded it, and among those that could be sampled. Steps take a little longer for all."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What only this strategy takes."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What the engine reports of one request."""

    request_id: int
    blocks: list[BlockView]
    """The response's blocks as they stand; of streamed requests only."""
    eos_token_ids: tuple[int, ...] = ()
    """Those of the request."""
    stop_at: int | None = None
    """Tokens that complete a stop string, where the request goes on behind it."""
    result: GenerationResult | None = None
    """Set when the request is done."""
    error: RequestError | None = None
    """Set when it failed."""

    @property
    def token_ids(self) -> list[int]:
        """The response so far, up to its first gap."""
        if self.result is not None:
            return self.result.token_ids
        tokens = (token for block in self.blocks for token in block.token_ids)
        return cut_at_eos(decoded_prefix(tokens), self.eos_token_ids)[0][: self.stop_at]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a request is, as far as the host knows.

    Example:
        >>> len(Progress(token_ids=[5, 6], num_forwards=1).token_ids)
        2
    """

    token_ids: list[int]
    """The response so far, up to its first gap, EOS or stop string; it only grows."""
    num_forwards: int
    """Model calls so far that refined it."""


def resolve(request: Request, spec: ModelSpec) -> Request:
    """Fill in what the request leaves to the model, and check it against the model.

    Raises:
        RequestError: A prompt or length that this model cannot serve.
        ConfigError: An unknown strategy or option.
    """
    prompt = _token_ids("prompt", request.prompt_ids, spec)
    eos = spec.eos_token_ids if request.eos_token_id is None else request.eos_token_id
    eos_ids = tuple(_token_ids("EOS", [eos] if isinstance(eos, int) else eos, spec))
    _check_limit(request.max_new_tokens)
    limit = request.max_new_tokens
    if len(prompt) + limit > spec.max_positions:
        raise RequestError(
            f"the prompt's {counted(len(prompt), 'token')} and max_new_tokens {limit} exceed the "
            f"model's {counted(spec.max_positions, 'position')}; shorten the prompt or lower "
            "max_new_tokens"
        )
    strategy = request.strategy
    if strategy is None:
        strategy = default_strategy(spec, policy=request.policy is not None)
    check_strategy(strategy, request.options, spec, len(prompt), limit)
    _check_sampling(request)
    stop = _stop_strings(request)
    if not isinstance(request.policy, DecodingPolicy | None):
        raise RequestError(f"policy is {request.policy!r}; it must be a DecodingPolicy")
    policy = request.policy or spec.recommended_policy or DecodingPolicy()
    fixed: dict[str, Any] = dict(STRATEGIES[strategy].policy)
    return dataclasses.replace(
        request,
        prompt_ids=prompt,
        strategy=strategy,
        eos_token_id=eos_ids,
        policy=dataclasses.replace(policy, **fixed),
        stop=stop,
        # Whole numbers of any size are none to torch.
        temperature=float(request.temperature),
        top_p=float(request.top_p),
        min_p=float(request.min_p),
    )


def check_request(request: Request) -> None:
    """Refuse what no model could be asked for, before one is loaded; the prompt may be missing.

    Raises:
        RequestError: A length, stop string or setting of the sampling is out of its range.
        ConfigError: An unknown strategy or option, or a bad value.

    Example:
        >>> check_request(Request(prompt_ids=(), top_p=0.9))
    """
    _check_limit(request.max_new_tokens)
    if request.strategy is not None:
        check_options(request.strategy, request.options)
    _check_sampling(request)
    _stop_strings(request)


def _check_limit(limit: object) -> None:
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise RequestError(f"max_new_tokens is {limit!r}; it must be a whole number of at least 1")


def _stop_strings(request: Request) -> tuple[str, ...]:
    if not isinstance(request.stop, Sequence):
        raise RequestError(f"stop is {request.stop!r}; it must be a list of texts, () for none")
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    for text in stop:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop string {text!r} is not a text of at least one character")
    return stop


def _check_sampling(request: Request) -> None:
    temperature, seed = request.temperature, request.seed
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not number or not 0 <= temperature <= MOST_TEMPERATURE:
        raise RequestError(
            f"temperature is {temperature!r}; it must be a number from 0 to {MOST_TEMPERATURE:g}"
        )
    top_k, top_p, min_p = request.top_k, request.top_p, request.min_p
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 <= top_k < 2**63:
        raise RequestError(f"top_k is {top_k!r}; it must be a whole number of 0 (all) or more")
    if isinstance(top_p, bool) or not isinstance(top_p, int | float) or not 0 < top_p <= 1:
        raise RequestError(f"top_p is {top_p!r}; it must be a number above 0 and at most 1")
    if isinstance(min_p, bool) or not isinstance(min_p, int | float) or not 0 <= min_p <= 1:
        raise RequestError(f"min_p is {min_p!r}; it must be a number from 0 (all) to 1")
    asked, most = request.num_alternatives, MOST_ALTERNATIVES
    if isinstance(asked, bool) or not isinstance(asked, int) or not 0 <= asked <= most:
        raise RequestError(
            f"num_alternatives is {asked!r}; it must be a whole number from 0 to {most}"
        )
    if not isinstance(request.early_stop, bool):
        raise RequestError(f"early_stop is {request.early_stop!r}; it must be True or False")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise RequestError(f"seed is {seed!r}; it must be a whole number of at most 63 bits")


def _token_ids(kind: str, ids: Any, spec: ModelSpec) -> list[int]:
    """Ids as plain numbers, from a list, a tensor or an array."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if not isinstance(ids, Sequence) or isinstance(ids, str):
        raise RequestError(f"{kind} {ids!r} is no list of token ids")
    numbers = []
    for token in ids:
        try:
            number = operator.index(token)
        except TypeError:
            number = None
        # True is 1 to Python, but a mask is no list of tokens.
        if number is None or isinstance(token, bool):
            raise RequestError(f"{kind} token {token!r} is not a whole number")
        if not 0 <= number < spec.vocab_size:
            raise RequestError(
                f"{kind} token {number} is outside the vocabulary of {spec.vocab_size}"
            )
        numbers.append(number)
    return numbers
