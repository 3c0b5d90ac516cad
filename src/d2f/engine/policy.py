"""The policy of a request: what the checkpoint recommends, with some fields changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2f.decoding.strategies import STRATEGIES, find_strategy
from d2f.decoding.strategies import default_strategy as default_strategy
from d2f.decoding.strategies import unheeded as unheeded
from d2f.diffusion.policy import DecodingPolicy
from d2f.errors import ConfigError
from d2f.models.spec import ModelSpec


def changed_policy(spec: ModelSpec, changes: Mapping[str, Any]) -> DecodingPolicy:
    """The policy that a checkpoint recommends, or the default one, with these fields changed.

    Raises:
        ConfigError: An unknown field, or a value out of its range.
    """
    base = spec.recommended_policy or DecodingPolicy()
    return DecodingPolicy.from_dict({**base.to_dict(), **changes})


def check_decoding(strategy: str, policy: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse what no model could be asked for, before one is loaded.

    Raises:
        ConfigError: An unknown strategy, option or field of the policy, a field without effect on
            the strategy, or a bad value.

    Example:
        >>> check_decoding("serial", {"block_size": 16}, {})
    """
    find_strategy(strategy).read_options(options)
    DecodingPolicy.from_dict(policy)
    useless = unheeded(strategy, policy)
    if useless:
        raise ConfigError(f"policy: {', '.join(useless)}: without effect on strategy {strategy}")


def heeds_policy(strategy: str) -> bool:
    """Whether a policy has any effect on a strategy.

    Example:
        >>> heeds_policy("serial"), heeds_policy("autoregressive")
        (True, False)
    """
    return bool(STRATEGIES[strategy].heeds)


def default_limit(spec: ModelSpec, prompt_length: int = 0) -> int:
    """Most new tokens unless somebody says otherwise: what the checkpoint names, or 256.

    Where the prompt leaves less room, that.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> default_limit(tiny_spec("llada")), default_limit(tiny_spec("llada"), 500)
        (256, 12)
    """
    wanted = spec.recommended_max_new_tokens or 256
    return max(min(wanted, spec.max_positions - prompt_length), 1)


def useful_strategies(spec: ModelSpec) -> list[str]:
    """The strategies that make sense on a model; the slow reference is for comparisons only.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> useful_strategies(tiny_spec("qwen2"))
        ['autoregressive']
        >>> useful_strategies(tiny_spec("llada"))[:2]
        ['pipelined', 'serial']
    """
    return [
        strategy.name
        for strategy in STRATEGIES.values()
        if strategy.causal == spec.architecture.causal and strategy.name != "reference"
    ]
