"""An engine's settings, and its requests, from what they ask to what they get."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from d2f.decoding.alternatives import MOST_ALTERNATIVES
from d2f.decoding.batch import (
    BlockView,
    GenerationResult,
    cut_at_eos,
    decoded_prefix,
)
from d2f.decoding.rows import HostRow, RowRequest
from d2f.decoding.step import RowRecord
from d2f.decoding.strategies import Strategy, check_strategy, default_strategy, find_strategy
from d2f.diffusion.policy import DecodingPolicy
from d2f.engine.stops import StopStrings
from d2f.errors import ConfigError, RequestError, counted
from d2f.models.cache import enough_bytes, free_bytes
from d2f.models.spec import ModelSpec
from d2f.models.transformer import Transformer

MOST_TEMPERATURE = 1e30
"""All tokens are as probable long before, and a little beyond it fp32 ends."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine.

    Raises:
        ConfigError: A value is out of its range.

    Example:
        >>> EngineConfig(max_batch_size=4, page_size=8).backend
        'auto'
    """

    max_batch_size: int = 64
    """Most sequences that one decoder decodes together; each decoder has so many of its own."""
    page_size: int = 16
    """Positions of a page of the key/value cache."""
    kv_cache_bytes: int | None = None
    """Size of the key/value cache; None: of the memory that is free."""
    prefill_tokens: int = 2048
    """Most tokens that joining requests add to a step; one alone may have more."""
    backend: str = "auto"
    """`torch`, `triton`, or `auto`: Triton's kernels on a GPU."""
    cuda_graphs: bool = True
    """Capture steps as CUDA graphs; has no meaning on a CPU."""
    overlap: bool | None = None
    """Run the host one step behind the device; None: on a GPU. Elsewhere it only serves tests."""
    imposed_acceptance: tuple[int, ...] | None = None
    """Tokens that each request accepts in its first, second, … forward, whatever the model says;
    the last number holds on. For measuring speed with random weights."""

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "page_size", "prefill_tokens", "kv_cache_bytes"):
            value = getattr(self, name)
            if name == "kv_cache_bytes" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        imposed = self.imposed_acceptance
        if imposed is not None and (not imposed or any(number < 0 for number in imposed)):
            raise ConfigError(
                f"imposed_acceptance is {imposed!r}; it must be numbers of at least 0, one or more"
            )

    def fitted(
        self, model: Transformer, lengths: Iterable[int], *, memory_share: float = 1.0
    ) -> EngineConfig:
        """Return these settings, with no larger a cache than sequences of these lengths can fill.

        It takes at most `memory_share` of the memory that is free; another engine may come.
        """
        most = sorted(lengths, reverse=True)[: self.max_batch_size]
        enough = enough_bytes(model.spec, most, page_size=self.page_size, dtype=model.dtype)
        room = int(memory_share * free_bytes(model.device))
        return dataclasses.replace(self, kv_cache_bytes=max(min(enough, room), 1))


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
    """Decoding policy; None: the one the checkpoint recommends, else the defaults."""
    eos_token_id: int | Sequence[int] | None = None
    """Tokens that end a response; None: the model's own; `()`: none."""
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
    """Options that only this strategy takes."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """The report of an engine on one request."""

    request_id: int
    blocks: list[BlockView]
    """The response's blocks as they stand; of streamed requests only."""
    token_ids: list[int] = field(default_factory=list)
    """The response so far, up to its first gap, EOS or stop string; empty if the request failed."""
    result: GenerationResult | None = None
    """Result of the request, once it is done."""
    error: RequestError | None = None
    """Error of the request, if it failed."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The tokens and forwards of a request so far, as far as the host knows.

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
    _check_numbers(request)
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
    stop = _stop_strings(request)
    if not isinstance(request.policy, DecodingPolicy | None):
        raise RequestError(f"policy is {request.policy!r}; it must be a DecodingPolicy")
    policy = request.policy or spec.recommended_policy or DecodingPolicy()
    fixes = find_strategy(strategy).fixes
    return dataclasses.replace(
        request,
        prompt_ids=prompt,
        strategy=strategy,
        eos_token_id=eos_ids,
        policy=dataclasses.replace(policy, **fixes) if fixes else policy,
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
    _check_numbers(request)
    if request.strategy is not None:
        find_strategy(request.strategy).read_options(request.options)
    _stop_strings(request)


_RANGES: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "max_new_tokens": (int, lambda n: n >= 1, "a whole number of at least 1"),
    "temperature": (
        int | float,
        lambda x: 0 <= x <= MOST_TEMPERATURE,
        f"a number from 0 to {MOST_TEMPERATURE:g}",
    ),
    "top_k": (int, lambda n: 0 <= n < 2**63, "a whole number of 0 (all) or more"),
    "top_p": (int | float, lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
    "min_p": (int | float, lambda x: 0 <= x <= 1, "a number from 0 (all) to 1"),
    "num_alternatives": (
        int, lambda n: 0 <= n <= MOST_ALTERNATIVES, f"a whole number from 0 to {MOST_ALTERNATIVES}"
    ),
    "seed": (int, lambda n: -(2**63) <= n < 2**63, "a whole number of at most 63 bits"),
}  # fmt: skip
"""Type and range of each number of a request, and both in words."""


def _check_numbers(request: Request) -> None:
    for name, (kind, fits, words) in _RANGES.items():
        value = getattr(request, name)
        if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
            raise RequestError(f"{name} is {value!r}; it must be {words}")
    if not isinstance(request.early_stop, bool):
        raise RequestError(f"early_stop is {request.early_stop!r}; it must be True or False")


def _stop_strings(request: Request) -> tuple[str, ...]:
    if not isinstance(request.stop, Sequence):
        raise RequestError(f"stop is {request.stop!r}; it must be a list of texts, () for none")
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    for text in stop:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop string {text!r} is not a text of at least one character")
    return stop


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


@dataclass(kw_only=True, eq=False)
class Task(HostRow):
    """A request on its way through the engine: its progress, and what it holds."""

    number: int
    strategy: Strategy
    stops: StopStrings | None = None
    """Stop strings of the request, if it has any."""
    row: int | None = None
    """Row of the request on the device; None while it waits."""
    pages: list[int] = field(default_factory=list)
    num_in_flight: int = 0
    """Steps that were started with it and not reported yet."""
    stalled: bool = False
    """Whether the request sat out the step last reported."""
    fresh_prompt: bool = False
    """Whether the prompt is being computed and may be kept for others."""
    finished: bool = False
    error: RequestError | None = None
    final_blocks: list[BlockView] = field(default_factory=list)
    """Blocks as they were at the end, for strategies without pages."""

    @classmethod
    def of(cls, number: int, request: Request, spec: ModelSpec, stops: StopStrings | None) -> Task:
        """The task of a resolved request."""
        strategy = find_strategy(request.strategy)
        eos = request.eos_token_id
        assert request.policy is not None and isinstance(eos, tuple)
        asked = RowRequest(
            prompt=request.prompt_ids,
            max_new_tokens=request.max_new_tokens,
            policy=request.policy,
            options=strategy.read_options(request.options).for_model(spec.architecture),
            eos_token_ids=eos,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            seed=request.seed,
            early_stop=request.early_stop,
            num_alternatives=request.num_alternatives,
        )
        return cls(number=number, strategy=strategy, stops=stops, asked=asked)

    def clear(self) -> None:
        """Make room for the response, of which nothing is decoded yet."""
        length = self.asked.max_new_tokens
        self.tokens, self.probabilities = [None] * length, [None] * length
        self.alternatives = [()] * length if self.asked.num_alternatives else []

    def report(self, record: RowRecord) -> None:
        """Take over what a step that ran it reports."""
        self.stalled, self.state = False, record.state
        for place, token, probability, alternatives in record.tokens:
            self.tokens[place] = token
            self.probabilities[place] = probability
            if self.alternatives:
                self.alternatives[place] = alternatives[: self.asked.num_alternatives]

    def decoded(self) -> list[int]:
        """The response up to its first gap."""
        return decoded_prefix(self.tokens)

    @property
    def ends_at_stop(self) -> bool:
        """A stop string ends it; without `early_stop` it only cuts the finished response."""
        return self.stops is not None and self.asked.early_stop

    def reaches_stop(self) -> bool:
        """Whether the response up to its first gap holds a stop string that ends it.

        Raises:
            RequestError: The tokenizer cannot decode it.
        """
        return self.stops is not None and self.ends_at_stop and self.stops.found(self.decoded())

    def up_to_end(self, tokens: Iterable[int | None]) -> list[int]:
        """Cut a running request's tokens before the first gap that its result will have."""
        token_ids, _ = cut_at_eos(decoded_prefix(tokens), self.asked.eos_token_ids)
        if self.ends_at_stop:
            return token_ids
        try:
            return token_ids[: self._num_until_stop(token_ids)]
        except RequestError:  # its result will fail with the same
            return token_ids

    def cut_at_stop(self, result: GenerationResult) -> GenerationResult:
        """A response up to the token that completes a stop string, if there is one.

        Raises:
            RequestError: The tokenizer cannot decode it.
        """
        fewest = self._num_until_stop(result.token_ids)
        if fewest is None:
            return result
        return dataclasses.replace(
            result,
            token_ids=result.token_ids[:fewest],
            probabilities=result.probabilities[:fewest],
            alternatives=result.alternatives[:fewest],
            finish_reason="stop",
        )

    def _num_until_stop(self, token_ids: Sequence[int]) -> int | None:
        return None if self.stops is None else self.stops.num_tokens(token_ids)

    def final(self) -> GenerationResult | None:
        """The finished response, up to the first EOS or the token that completes a stop string.

        None if the request failed, at the latest here.
        """
        if self.error is None:
            try:
                return self.cut_at_stop(
                    self.result(
                        self.asked.eos_token_ids,
                        finite=True,
                        num_forwards=self.state.forwards,
                        num_query_tokens=self.state.queries,
                    )
                )
            except RequestError as error:
                self.error = error
        return None
