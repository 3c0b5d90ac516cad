"""`generate_ids`: token ids in, token ids out, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from d2f.decoding.batch import GenerationResult
from d2f.diffusion.policy import DecodingPolicy
from d2f.engine.engine import Engine, EngineConfig
from d2f.engine.request import Request, resolve
from d2f.models.transformer import Transformer


@overload
def generate_ids(
    model: Transformer,
    prompt_ids: Sequence[int],
    policy: DecodingPolicy | None = None,
    *,
    max_new_tokens: int = 256,
    eos_token_id: int | Sequence[int] | None = None,
    strategy: str | None = None,
    early_stop: bool = True,
    **strategy_options: Any,
) -> GenerationResult: ...


@overload
def generate_ids(
    model: Transformer,
    prompt_ids: Sequence[Sequence[int]],
    policy: DecodingPolicy | None = None,
    *,
    max_new_tokens: int = 256,
    eos_token_id: int | Sequence[int] | None = None,
    strategy: str | None = None,
    early_stop: bool = True,
    **strategy_options: Any,
) -> list[GenerationResult]: ...


def generate_ids(
    model: Transformer,
    prompt_ids: Sequence[int] | Sequence[Sequence[int]],
    policy: DecodingPolicy | None = None,
    *,
    max_new_tokens: int = 256,
    eos_token_id: int | Sequence[int] | None = None,
    strategy: str | None = None,
    early_stop: bool = True,
    **strategy_options: Any,
) -> GenerationResult | list[GenerationResult]:
    """Answer one prompt, or several at once.

    Args:
        model: From `load_model`.
        prompt_ids: One list of token ids, or a list of lists.
        policy: Thresholds of the pipeline; None: the checkpoint's recommended ones, else the
            defaults.
        max_new_tokens: Exact upper bound of each response.
        eos_token_id: One or several; None: the model's own, `()`: none.
        strategy: `pipelined`; `serial`, one block after the other; `autoregressive`; `vanilla`,
            LLaDA's and Dream's samplers; or another name in `d2f.decoding.strategies.STRATEGIES`.
            None: what suits the model (`d2f.engine.policy.default_strategy`).
        early_stop: End once everything before an accepted EOS is decoded; False decodes every
            block that was opened, as the original does. The tokens are the same.
        strategy_options: `temperature`, `top_k`, `top_p`, `min_p`, `seed` and `num_alternatives`
            for every strategy, as in `Request`; and the strategy's own, such as `num_steps` of
            `vanilla`, which are the fields of `VanillaOptions` and its like in
            `d2f.decoding.strategies`. An option without effect is refused by name.

    Returns:
        A result, or a list of results for a list of prompts.

    Raises:
        RequestError: The model cannot serve a prompt.
        ConfigError: An unknown strategy or option, or a bad value.

    Example:
        >>> from d2f.testing import tiny_model
        >>> result = generate_ids(tiny_model("llada"), [1, 2, 3], max_new_tokens=5)
        >>> result.num_forwards <= 5
        True
    """
    given: Any = prompt_ids.tolist() if hasattr(prompt_ids, "tolist") else prompt_ids
    several = _holds_lists(given)
    prompts = given if several else [given]
    settings = {
        "max_new_tokens": max_new_tokens,
        "policy": policy,
        "eos_token_id": eos_token_id,
        "strategy": strategy,
        "early_stop": early_stop,
    }
    requests = [_request(prompt, settings, strategy_options) for prompt in prompts]
    requests = [resolve(request, model.spec) for request in requests]
    lengths = [len(request.prompt_ids) + request.max_new_tokens for request in requests]
    engine = Engine(model, EngineConfig().fitted(model, lengths))
    try:
        results = engine.generate(requests)
    finally:
        # An error's traceback keeps the engine, which must not keep the cache.
        engine.close()
    return results if several else results[0]


def _holds_lists(given: object) -> bool:
    """Whether it is several prompts rather than one."""
    if not isinstance(given, Sequence) or len(given) == 0:
        return False
    first = given[0]
    return not hasattr(first, "__index__") and (
        isinstance(first, Sequence) or hasattr(first, "tolist")
    )


def _request(prompt: Sequence[int], settings: dict[str, Any], options: dict[str, Any]) -> Request:
    """A request; of the options it takes those that every strategy knows as its own fields."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "num_alternatives")
    own = {name: options[name] for name in names if name in options}
    rest = {name: value for name, value in options.items() if name not in own}
    return Request(prompt_ids=prompt, options=rest, **settings, **own)
