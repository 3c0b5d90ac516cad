"""The decoding strategies by name, with the options that each takes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from d2f.decoding import fast_dllm
from d2f.decoding.autoregressive import AutoregressiveDecoder
from d2f.decoding.batch import DecodingBatch, Sequences
from d2f.decoding.dllm_cache import DLLMCacheBatch, dllm_cache_plan
from d2f.decoding.fast_dllm import FastBatch
from d2f.decoding.paged import PagedDecoder
from d2f.decoding.pipelined import PipelinedDecoder
from d2f.decoding.reference import ReferenceBatch
from d2f.decoding.vanilla import VanillaBatch, own_algorithm, vanilla_plan
from d2f.decoding.workspace import Workspace
from d2f.errors import ConfigError, RequestError, unknown_name
from d2f.models.cache import PagedCache
from d2f.models.spec import ModelSpec
from d2f.models.transformer import Transformer
from d2f.ops.backend import Backend


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a strategy runs."""

    batch: Callable[..., DecodingBatch] | None = None
    """(model, sequences, *, workspace, **options) starts a batch without the engine's paged cache;
    None: it runs on that."""
    options: tuple[str, ...] = ()
    """What only it takes."""
    check: Callable[..., object] | None = None
    """(max_new_tokens, **options) refuses options that make no sense."""
    max_rows: int | None = None
    """Most sequences of a batch; None: as many as the engine takes."""
    policy: Mapping[str, float] = field(default_factory=dict)
    """Fields of the policy that it fixes."""

    @property
    def paged(self) -> bool:
        """It runs on the engine's paged cache."""
        return self.batch is None


def _fast(cache: str | None) -> Strategy:
    return Strategy(
        batch=functools.partial(FastBatch, cache=cache),
        options=("block_length", "threshold", "factor"),
        check=fast_dllm.check_options,
        max_rows=1,
    )


STRATEGIES: dict[str, Strategy] = {
    "pipelined": Strategy(),
    # One block after the other.
    "serial": Strategy(policy={"add_threshold": 1.0, "activate_threshold": 1.0}),
    "autoregressive": Strategy(),
    "vanilla": Strategy(
        batch=VanillaBatch,
        options=("num_steps", "block_length", "algorithm", "eps"),
        check=vanilla_plan,
    ),
    "parallel": _fast(None),
    "prefix-cache": _fast("prefix"),
    "dual-cache": _fast("dual"),
    "dllm-cache": Strategy(
        batch=DLLMCacheBatch,
        options=(
            "num_steps",
            "block_length",
            "prompt_interval",
            "response_interval",
            "refresh_share",
        ),
        check=dllm_cache_plan,
        max_rows=1,
    ),
    "reference": Strategy(
        batch=lambda model, sequences, workspace: ReferenceBatch(model, sequences)
    ),
}

OPTION_KINDS: dict[str, tuple[type, str]] = {
    "num_steps": (int, "a whole number"),
    "block_length": (int, "a whole number"),
    "algorithm": (str, "a name"),
    "eps": (float, "a number"),
    "threshold": (float, "a number"),
    "factor": (float, "a number"),
    "prompt_interval": (int, "a whole number"),
    "response_interval": (int, "a whole number"),
    "refresh_share": (float, "a number"),
}
"""What an option's value must be. Whole numbers are numbers too; None is the default."""


def _check_option(strategy: str, name: str, value: object) -> None:
    known = STRATEGIES[strategy].options
    if name not in known:
        takers = [other for other, its in STRATEGIES.items() if name in its.options]
        hint = f"; {name} belongs to {', '.join(takers)}" if takers else ""
        raise ConfigError(f"strategy {strategy}: {unknown_name('option', name, known)}{hint}")
    kind, words = OPTION_KINDS[name]
    fits = isinstance(value, (int, float) if kind is float else kind)
    if kind is float and isinstance(value, int):
        # What is beyond the largest number compares, but does not compute.
        fits = abs(value) <= sys.float_info.max
    if value is not None and (isinstance(value, bool) or not fits):
        raise ConfigError(f"strategy {strategy}: {name} is {value!r}; it must be {words}")


def check_options(strategy: str, options: Mapping[str, Any]) -> None:
    """Refuse options that fit no response, however short, of any model.

    Raises:
        ConfigError: An unknown strategy or option, or a bad value.

    Example:
        >>> check_options("vanilla", {"num_steps": 8})
    """
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise ConfigError(unknown_name("strategy", strategy, STRATEGIES))
    if not isinstance(options, Mapping):
        raise ConfigError(f"options is {options!r}; it must be a table of names and values")
    for name, value in options.items():
        _check_option(strategy, name, value)
    check = STRATEGIES[strategy].check
    if check is not None:
        check(1, **options)


def check_strategy(
    strategy: str,
    options: Mapping[str, Any],
    spec: ModelSpec,
    prompt_length: int,
    max_new_tokens: int,
) -> None:
    """Refuse what a strategy cannot do, before a batch is built from it.

    Raises:
        ConfigError: An unknown strategy or option, or a bad value.
        RequestError: The strategy does not fit the model or the prompt.
    """
    check_options(strategy, options)
    architecture = spec.architecture
    if strategy == "autoregressive":
        if not architecture.causal:
            raise RequestError(
                f"a {architecture.name} model is not autoregressive; decode it with one of "
                f"{', '.join(name for name in STRATEGIES if name != strategy)}"
            )
        if prompt_length == 0:
            raise RequestError("the prompt is empty; autoregression needs a token to start from")
    elif architecture.causal:
        raise RequestError(
            f"a {architecture.name} model is autoregressive; decode it with strategy autoregressive"
        )
    elif spec.mask_token_id is None:
        raise RequestError(f"this {architecture.name} checkpoint names no mask_token_id")
    check = STRATEGIES[strategy].check
    if check is not None:
        own = own_algorithm(architecture, options) if strategy == "vanilla" else options
        check(max_new_tokens, **own)


def start_batch(
    strategy: str,
    model: Transformer,
    sequences: Sequences,
    options: Mapping[str, Any],
    workspace: Workspace,
) -> DecodingBatch:
    """Begin to decode a batch that `check_strategy` has passed, without the paged cache."""
    start = STRATEGIES[strategy].batch
    assert start is not None, "this strategy runs on the paged cache"
    return start(model, sequences, workspace=workspace, **options)


def paged_decoder(
    model: Transformer,
    cache: PagedCache,
    backend: Backend,
    imposed_acceptance: tuple[int, ...] | None = None,
) -> PagedDecoder:
    """The decoder of all strategies that run on the paged cache and fit the model.

    Raises:
        ConfigError: Acceptance is imposed on an autoregressive model.
    """
    if model.spec.architecture.causal:
        if imposed_acceptance is not None:
            raise ConfigError("an autoregressive model accepts one token per forward; impose none")
        return AutoregressiveDecoder(model, cache, backend)
    imposed_F = None
    if imposed_acceptance is not None:
        imposed_F = torch.tensor(imposed_acceptance, device=model.device)
    return PipelinedDecoder(model, cache, backend, imposed_F)
