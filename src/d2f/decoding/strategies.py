"""The decoding strategies by name, with the options that each takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from d2f.decoding.autoregressive import AutoregressiveBatch
from d2f.decoding.batch import DecodingBatch, Sequences
from d2f.decoding.pipelined import PipelinedBatch
from d2f.decoding.reference import ReferenceBatch
from d2f.decoding.vanilla import VanillaBatch, transfer_plan
from d2f.errors import ConfigError, RequestError, unknown_name
from d2f.models.spec import ModelSpec
from d2f.models.transformer import Transformer


def _serial(model: Transformer, sequences: Sequences) -> PipelinedBatch:
    """One block after the other: the pipeline with both block thresholds at 1."""
    policy = dataclasses.replace(sequences.policy, add_threshold=1.0, activate_threshold=1.0)
    return PipelinedBatch(model, dataclasses.replace(sequences, policy=policy))


STRATEGIES: dict[str, tuple[Callable[..., DecodingBatch], tuple[str, ...]]] = {
    "pipelined": (PipelinedBatch, ()),
    "serial": (_serial, ()),
    "autoregressive": (AutoregressiveBatch, ()),
    "vanilla": (VanillaBatch, ("num_steps", "block_length")),
    "reference": (ReferenceBatch, ()),
}


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
    if strategy not in STRATEGIES:
        raise ConfigError(unknown_name("strategy", strategy, STRATEGIES))
    known = STRATEGIES[strategy][1]
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"strategy {strategy}: {unknown_name('option', name, known)}")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(
                f"strategy {strategy}: {name} is {value!r}; it must be a whole number"
            )
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
    if strategy == "vanilla":
        transfer_plan(max_new_tokens, **options)


def start_batch(
    strategy: str, model: Transformer, sequences: Sequences, options: Mapping[str, Any]
) -> DecodingBatch:
    """Begin to decode a batch that `check_strategy` has passed."""
    return STRATEGIES[strategy][0](model, sequences, **options)
