"""The decoding strategies: one record for each, with the options that it takes.

This module imports no torch, so that the command line can read the options before a model is
loaded. A strategy's code is imported when a request needs it.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from d2f.errors import ConfigError, RequestError, counted, unknown_name

if TYPE_CHECKING:
    from d2f.models.spec import Architecture, ModelSpec

ALGORITHMS = ("low_confidence", "maskgit_plus", "topk_margin", "entropy", "origin")
BLOCK_LENGTH = 32
"""Default block length of all strategies whose options have one."""
MOST_STEPS = 2**16
"""More steps, far more than any response has tokens, would only take memory."""
_WORDS = {int: "a whole number", float: "a number", str: "a name"}


def _option(help: str, default: Any = None) -> Any:
    """A field of a strategy's options; `help` is what the command line says about it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a strategy that has none; the base of the others.

    An instance checks its values. Each raises `ConfigError` for a value that no response, however
    short, could be decoded with.
    """

    def for_model(self, architecture: Architecture) -> Options:
        """The options with what they leave to the model."""
        return self

    def check_length(self, max_new_tokens: int) -> None:
        """Refuse options that do not fit a response of this length.

        Raises:
            ConfigError: They do not.
        """


def _check_blocks(num_steps: int | None, block_length: int | None) -> None:
    if num_steps is not None and num_steps < 1:
        raise ConfigError(f"num_steps is {num_steps}; it must be at least 1")
    if num_steps is not None and num_steps > MOST_STEPS:
        raise ConfigError(f"num_steps is {num_steps}; it must be at most {MOST_STEPS}")
    if block_length is not None and block_length < 1:
        raise ConfigError(f"block_length is {block_length}; it must be at least 1")


def _check_steps(max_new_tokens: int, num_steps: int | None, block_length: int | None) -> None:
    block_length = block_length or BLOCK_LENGTH
    least = -(-max_new_tokens // block_length)
    if num_steps is not None and num_steps < least:
        raise ConfigError(
            f"num_steps is {num_steps}; {counted(max_new_tokens, 'token')} in blocks of "
            f"{block_length} need at least {least}"
        )


@dataclass(frozen=True, kw_only=True)
class VanillaOptions(Options):
    """Options of LLaDA's and Dream's own samplers.

    `low_confidence` alone has blocks, of 32 tokens unless said otherwise. `eps` (0.001), where the
    time of the last step ends, belongs to the other algorithms.

    Example:
        >>> VanillaOptions(num_steps=8).sampler
        'low_confidence'
    """

    num_steps: int | None = _option("forwards in all; None: one for each token")
    block_length: int | None = _option("tokens of a block")
    algorithm: str | None = _option(
        "low_confidence (LLaDA's own), maskgit_plus, topk_margin, entropy (Dream's own) or "
        "origin. Default: the model's own"
    )
    eps: float | None = _option("where Dream's time ends")

    def __post_init__(self) -> None:
        if self.algorithm is not None and self.algorithm not in ALGORITHMS:
            raise ConfigError(unknown_name("algorithm", self.algorithm, ALGORITHMS))
        useless = "eps" if self.sampler == "low_confidence" else "block_length"
        value = getattr(self, useless)
        if value is not None:
            words = f"without effect on algorithm {self.sampler}"
            raise ConfigError(f"{useless} is {value}; it is {words}")
        _check_blocks(self.num_steps, self.block_length)
        if self.eps is not None and not 0 < self.eps < 1:
            raise ConfigError(f"eps is {self.eps}; it must lie between 0 and 1")

    @property
    def sampler(self) -> str:
        """The algorithm; of options that name none, the one that their other fields belong to."""
        if self.algorithm is not None:
            return self.algorithm
        return "low_confidence" if self.eps is None or self.block_length is not None else "entropy"

    def for_model(self, architecture: Architecture) -> VanillaOptions:
        """The options with an algorithm, which is that of the model's authors if none is named.

        A block length alone means `low_confidence`, the only algorithm that has blocks.
        """
        own = architecture.sampler if self.block_length is None else "low_confidence"
        return replace(self, algorithm=self.algorithm or own)

    def check_length(self, max_new_tokens: int) -> None:
        """Refuse fewer steps than blocks."""
        if self.sampler == "low_confidence":
            _check_steps(max_new_tokens, self.num_steps, self.block_length)


@dataclass(frozen=True, kw_only=True)
class FastOptions(Options):
    """Options of Fast-dLLM's samplers.

    Tokens are kept whose probability is at least the threshold, 0.9 unless a factor is given: then
    the n surest are, for the largest n with (n + 1) (1 - the n-th probability) < factor.

    Example:
        >>> FastOptions(block_length=16, factor=1.5).threshold is None
        True
    """

    block_length: int = _option("tokens of a block", BLOCK_LENGTH)
    threshold: float | None = _option("keep tokens of this probability. Default: 0.9")
    factor: float | None = _option("keep as many as this factor allows")

    def __post_init__(self) -> None:
        _check_blocks(None, self.block_length)
        threshold, factor = self.threshold, self.factor
        if threshold is not None and factor is not None:
            both = f"threshold is {threshold} and factor is {factor}"
            raise ConfigError(f"{both}; they are two rules, give one of them")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ConfigError(f"threshold is {threshold}; it must lie between 0 and 1")
        if factor is not None and not 0 < factor < float("inf"):
            raise ConfigError(f"factor is {factor}; it must be a number above 0")


@dataclass(frozen=True, kw_only=True)
class RefreshOptions(Options):
    """Options of dLLM-Cache.

    Example:
        >>> RefreshOptions(prompt_interval=8).response_interval
        7
    """

    num_steps: int | None = _option("forwards in all; None: one for each token")
    block_length: int = _option("tokens of a block", BLOCK_LENGTH)
    prompt_interval: int = _option("forwards between refreshes of the prompt", 50)
    response_interval: int = _option("forwards between refreshes of the response", 7)
    refresh_share: float = _option("share of the response computed in between", 0.25)

    def __post_init__(self) -> None:
        _check_blocks(self.num_steps, self.block_length)
        for name in ("prompt_interval", "response_interval"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be a whole number of at least 1")
        share = self.refresh_share
        if not 0 <= share <= 1:
            raise ConfigError(f"refresh_share is {share}; it must be a number from 0 to 1")

    def num_tokens(self, response_length: int) -> int:
        """The share of a response in tokens, rounded down; at least 1 unless the share is 0.

        Example:
            >>> RefreshOptions(refresh_share=0.29).num_tokens(100)
            29
        """
        # 0.29 * 100 is a little below 29.
        tokens = math.floor(round(self.refresh_share * response_length, 9))
        return max(tokens, 1) if self.refresh_share > 0 else 0

    def check_length(self, max_new_tokens: int) -> None:
        """Refuse fewer steps than blocks."""
        _check_steps(max_new_tokens, self.num_steps, self.block_length)


@dataclass(frozen=True, kw_only=True)
class EntropyOptions(Options):
    """Options of entropy acceptance.

    Example:
        >>> EntropyOptions().threshold
        0.5
    """

    threshold: float = _option(
        "accept tokens whose distribution has an entropy (nats) below this. Default: 0.5", 0.5
    )

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < float("inf"):
            raise ConfigError(f"threshold is {self.threshold}; it must be a number of at least 0")


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Facts about a strategy that are known before a model is loaded."""

    name: str
    decoder: str
    """`module:class` in `d2f.decoding`: a `PagedDecoder`, which runs on the engine's paged cache,
    or a `DecodingBatch`, which keeps what it needs itself."""
    options: type[Options] = Options
    heeds: tuple[str, ...] = ()
    """Fields of the policy that have an effect."""
    fixes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the policy that it sets, and their values."""
    causal: bool = False
    """Whether the strategy decodes autoregressive models, and no others."""
    max_rows: int | None = None
    """Most sequences of a `DecodingBatch`; None: as many as the engine takes."""

    @functools.cached_property
    def option_kinds(self) -> dict[str, type]:
        """Type that the value of each option must have: `int`, `float` or `str`."""
        hints = get_type_hints(self.options)
        names = [one.name for one in fields(self.options)]
        return {name: (get_args(hints[name]) or (hints[name],))[0] for name in names}

    @functools.cached_property
    def decoder_class(self) -> Any:
        """The class that decodes, imported."""
        module, _, name = self.decoder.partition(":")
        return getattr(importlib.import_module(f"d2f.decoding.{module}"), name)

    def read_options(self, table: Mapping[str, Any]) -> Options:
        """The options of a table, as Python, HTTP and recipes give them; None is a default.

        Raises:
            ConfigError: An unknown option, or a bad value.

        Example:
            >>> STRATEGIES["parallel"].read_options({"factor": 2}).factor
            2
        """
        if not isinstance(table, Mapping):
            raise ConfigError(f"options is {table!r}; it must be a table of names and values")
        for name, value in table.items():
            self._check_kind(name, value)
        return self.options(**{name: value for name, value in table.items() if value is not None})

    def _check_kind(self, name: str, value: object) -> None:
        if name not in self.option_kinds:
            takers = [other.name for other in STRATEGIES.values() if name in other.option_kinds]
            hint = f"; {name} belongs to {', '.join(takers)}" if takers else ""
            known = unknown_name("option", name, self.option_kinds)
            raise ConfigError(f"strategy {self.name}: {known}{hint}")
        kind = self.option_kinds[name]
        # A whole number is a number, too.
        fits = isinstance(value, (int, float) if kind is float else kind)
        if kind is float and isinstance(value, int):
            # What is beyond the largest number compares, but does not compute.
            fits = abs(value) <= sys.float_info.max
        if value is not None and (isinstance(value, bool) or not fits):
            raise ConfigError(
                f"strategy {self.name}: {name} is {value!r}; it must be {_WORDS[kind]}"
            )


_WINDOW = ("block_size", "max_live_blocks")
_SHARES = ("add_threshold", "activate_threshold")
_TOKENS = ("confidence_threshold", "confidence")
_PIPELINE = (*_WINDOW, *_SHARES, *_TOKENS)


def _alone(name: str, decoder: str, options: type[Options]) -> Strategy:
    return Strategy(name=name, decoder=decoder, options=options, max_rows=1)


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(name="pipelined", decoder="paged:PipelinedDecoder", heeds=_PIPELINE),
        # One block after the other.
        Strategy(
            name="serial",
            decoder="paged:PipelinedDecoder",
            heeds=(*_WINDOW, *_TOKENS),
            fixes={"add_threshold": 1.0, "activate_threshold": 1.0},
        ),
        Strategy(
            name="entropy",
            decoder="paged:EntropyDecoder",
            options=EntropyOptions,
            heeds=(*_WINDOW, *_SHARES),
            fixes={"confidence": "neg_entropy"},
        ),
        Strategy(
            name="autoregressive", decoder="autoregressive:AutoregressiveDecoder", causal=True
        ),
        _alone("parallel", "fast_dllm:FastBatch", FastOptions),
        _alone("prefix-cache", "fast_dllm:PrefixCacheBatch", FastOptions),
        _alone("dual-cache", "fast_dllm:DualCacheBatch", FastOptions),
        _alone("dllm-cache", "dllm_cache:DLLMCacheBatch", RefreshOptions),
        Strategy(name="vanilla", decoder="vanilla:VanillaBatch", options=VanillaOptions),
        Strategy(
            name="reference", decoder="reference:ReferenceSequence", heeds=_PIPELINE, max_rows=1
        ),
    )
}


def find_strategy(name: object) -> Strategy:
    """The record of a strategy.

    Raises:
        ConfigError: There is none of this name.

    Example:
        >>> find_strategy("serial").fixes["add_threshold"]
        1.0
    """
    if not isinstance(name, str) or name not in STRATEGIES:
        raise ConfigError(unknown_name("strategy", name, STRATEGIES))
    return STRATEGIES[name]


def check_strategy(
    strategy: str,
    options: Mapping[str, Any],
    spec: ModelSpec,
    prompt_length: int,
    max_new_tokens: int,
) -> Options:
    """The options of a strategy for a model, once all is refused that it cannot do.

    Raises:
        ConfigError: An unknown strategy or option, or a bad value.
        RequestError: The strategy does not fit the model or the prompt.
    """
    record = find_strategy(strategy)
    read = record.read_options(options)
    architecture = spec.architecture
    if record.causal != architecture.causal:
        fit = ", ".join(one.name for one in STRATEGIES.values() if one.causal != record.causal)
        words = (
            "not autoregressive; decode it with one of"
            if record.causal
            else ("autoregressive; decode it with strategy")
        )
        raise RequestError(f"a {architecture.name} model is {words} {fit}")
    if record.causal and prompt_length == 0:
        raise RequestError("the prompt is empty; autoregression needs a token to start from")
    if not record.causal and spec.mask_token_id is None:
        raise RequestError(f"this {architecture.name} checkpoint names no mask_token_id")
    read = read.for_model(architecture)
    read.check_length(max_new_tokens)
    return read


def unheeded(strategy: str, names: Iterable[str]) -> list[str]:
    """Return those fields of a policy that have no effect on a strategy; none if it is unknown.

    Example:
        >>> unheeded("serial", ["block_size", "add_threshold"])
        ['add_threshold']
    """
    if strategy not in STRATEGIES:
        return []
    return [name for name in names if name not in STRATEGIES[strategy].heeds]


def default_strategy(spec: ModelSpec, *, policy: bool = False) -> str:
    """Return the strategy that decodes a model unless somebody asks for another.

    The pipeline takes for granted that a diffusion model was distilled for it; on another one it
    gives poor answers, so that gets `vanilla`.

    Args:
        spec: The model's.
        policy: Whether a decoding policy was asked for, which only the pipeline heeds.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> default_strategy(tiny_spec("qwen2")), default_strategy(tiny_spec("llada"))
        ('autoregressive', 'pipelined')
    """
    if spec.architecture.causal:
        return "autoregressive"
    return "pipelined" if spec.distilled or policy else "vanilla"
