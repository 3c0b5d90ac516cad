"""Options of the command line that choose a model and how it decodes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from d2f.cli.usage import UsageError, usage
from d2f.decoding.strategies import STRATEGIES, check_strategy, default_strategy, unheeded
from d2f.diffusion.policy import DecodingPolicy
from d2f.errors import counted
from d2f.shipped import PREFIX

if TYPE_CHECKING:
    from d2f.engine.request import Request
    from d2f.models.spec import ModelSpec
    from d2f.models.transformer import Transformer
    from d2f.text import Tokenizer

T = TypeVar("T")

DEFAULT_MODEL = f"{PREFIX}student"

_POLICY_HELP = {
    "block_size": "Tokens of a block.",
    "add_threshold": "Open a block at this decoded share of the last.",
    "activate_threshold": "Fully active at this share of the predecessor.",
    "confidence_threshold": "Accept tokens above this probability.",
    "confidence": "What ranks the token that a block must accept: probability, margin or "
    "neg_entropy.",
    "max_live_blocks": "Most blocks open and not cached.",
}


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """The options that choose a model, where it computes, and what ends its answers."""

    model: Annotated[
        str | None,
        typer.Option(help="Folder, hub id, GGUF file or shipped:NAME. Default: shipped:student."),
    ] = None
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter: folder or hub id.")] = None
    eos: Annotated[
        list[str] | None,
        typer.Option(
            help="A token that ends an answer beside the model's own, by id or text; repeatable."
        ),
    ] = None
    replace_eos: Annotated[
        bool,
        typer.Option("--replace-eos", help="Only --eos ends an answer, not the model's own ends."),
    ] = False
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32 or bfloat16. Default: the checkpoint's; of a shipped model, the faster "
            "one."
        ),
    ] = None

    @property
    def source(self) -> str:
        """The model that was named, or the shipped student."""
        return self.model or DEFAULT_MODEL

    def load(self) -> tuple[Transformer, Tokenizer]:
        """Load the model, with the chosen ends of an answer in its spec, and its tokenizer.

        The default dtype of a shipped model is the device's fastest.
        """
        from d2f.cli.device import choose_device, choose_dtype, choose_threads
        from d2f.engine.ends import choose_ends
        from d2f.hub import resolve_folder
        from d2f.models.checkpoint import load_model, read_spec
        from d2f.models.lora import with_adapter
        from d2f.text import Tokenizer

        # What fails in milliseconds comes before the weights, which may take minutes.
        device, dtype = choose_device(self.device), self.dtype
        if dtype is not None:
            dtype = choose_dtype(dtype, device)
        spec = read_spec(resolve_folder(self.source, weights=False))
        if self.adapter is not None:
            spec = with_adapter(spec, resolve_folder(self.adapter))
        choose_threads(spec.num_parameters, device)
        if dtype is None and self.source.startswith(PREFIX):
            dtype = choose_dtype(None, device)  # measured with the threads that will compute
        tokenizer = Tokenizer.load(self.source)
        named = [int(one) if one.isascii() and one.isdigit() else one for one in self.eos or ()]
        with usage():
            ends = choose_ends(named, tokenizer, spec, replace=self.replace_eos)
        loaded = load_model(self.source, adapter=self.adapter, device=device, dtype=dtype)
        loaded.spec = replace(loaded.spec, eos_token_ids=ends)
        return loaded, tokenizer


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The options that choose a model, and the strategy, policy, length and noise of answers."""

    choice: ModelChoice
    strategy: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(STRATEGIES)}. Default: pipelined; autoregressive for such a model; "
            "vanilla for a diffusion model that was not distilled."
        ),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens of the response. Default: what the model names, else 256."),
    ] = None
    changed: dict[str, Any]
    """Fields of the decoding policy that options set."""
    temperature: Annotated[float, typer.Option(help="0: the most probable tokens.")] = 0.0
    seed: Annotated[int, typer.Option(help="Seed of the sampling noise.")] = 0

    def request(self, **more: Any) -> Request:
        """The request without a prompt and without what depends on the model."""
        from d2f.engine.request import Request

        more |= given(max_new_tokens=self.max_new_tokens)
        return Request(prompt_ids=(), temperature=self.temperature, seed=self.seed, **more)

    def check(self, request: Request) -> None:
        """Refuse what no model could be asked for before any is loaded, which may take minutes."""
        from d2f.engine.request import check_request

        with usage():
            DecodingPolicy.from_dict(self.changed)
            if self.strategy is None:
                check_request(replace(request, options={}))
                return
            check_request(replace(request, strategy=self.strategy))
        self._check_heeded(self.strategy)

    def load(
        self, request: Request, dtype: str | None = None
    ) -> tuple[Transformer, Tokenizer, Request]:
        """Load the model and its tokenizer; return them and the request with the model's defaults.

        `dtype` is what to load if the user named none; None: the model's own.
        """
        from d2f.engine.policy import changed_policy

        choice = self.choice
        model, tokenizer = replace(choice, dtype=choice.dtype or dtype).load()
        strategy = self.strategy or default_strategy(model.spec, policy=bool(self.changed))
        self._check_heeded(strategy)
        policy = changed_policy(model.spec, self.changed)
        request = replace(request, strategy=strategy, policy=policy)
        return model, tokenizer, self.limited(request, model.spec)

    def limited(self, request: Request, spec: ModelSpec, prompt_ids: Sequence[int] = ()) -> Request:
        """Return the request with a prompt and, if the user named none, the default length."""
        from d2f.engine.policy import default_limit

        if self.max_new_tokens is None:
            request = replace(request, max_new_tokens=default_limit(spec, len(prompt_ids)))
        strategy, limit = request.strategy, request.max_new_tokens
        assert strategy is not None
        if limit > spec.max_positions:
            positions = counted(spec.max_positions, "position")
            raise UsageError(f"--max-new-tokens {limit} is more than the model's {positions}")
        with usage():
            # An empty prompt is refused later, as a prompt.
            check_strategy(strategy, request.options, spec, 1, limit)
        return replace(request, prompt_ids=prompt_ids)

    def _check_heeded(self, strategy: str) -> None:
        useless = unheeded(strategy, self.changed)
        if useless:
            options = ", ".join("--" + name.replace("_", "-") for name in useless)
            raise UsageError(f"{options}: without effect on strategy {strategy}")


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given, which are those that are not None.

    Example:
        >>> given(block_size=8, confidence=None)
        {'block_size': 8}
    """
    return {name: value for name, value in options.items() if value is not None}


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes groups of options, each as one parameter.

    A parameter that is a dataclass gets an option for each of its fields, which may be groups
    themselves. Dicts named `changed` and `options` get one for each field of a policy and each
    option of a strategy, and hold those that were given.
    """
    parameters, run = _spread(command)
    run = functools.wraps(command)(run)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _spread(target: Callable[..., T]) -> tuple[list[inspect.Parameter], Callable[..., T]]:
    """The options of a callable with groups, and a function that takes these and calls it."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[list[inspect.Parameter], Callable[..., Any]]] = {}
    for name, parameter in inspect.signature(target, eval_str=True).parameters.items():
        kind = parameter.annotation
        if isinstance(kind, type) and is_dataclass(kind):
            groups[name] = _spread(kind)
        elif name == "changed":
            groups[name] = _policy_options(), given
        elif name == "options":
            groups[name] = _strategy_options(), given
        parameters += groups[name][0] if name in groups else [parameter]

    def run(**values: Any) -> T:
        for name, (options, make) in groups.items():
            values[name] = make(**{one.name: values.pop(one.name) for one in options})
        return target(**values)

    return parameters, run


def _option(name: str, kind: Any, help: str) -> inspect.Parameter:
    kind = Annotated[kind | None, typer.Option(help=help)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def _policy_options() -> list[inspect.Parameter]:
    kinds = get_type_hints(DecodingPolicy)
    return [_option(name, kinds[name], help) for name, help in _POLICY_HELP.items()]


def _strategy_options() -> list[inspect.Parameter]:
    """One for each name; strategies that take the same one share it."""
    kinds: dict[str, type] = {}
    takers: dict[str, dict[str, list[str]]] = {}
    for strategy in STRATEGIES.values():
        kinds |= strategy.option_kinds
        for one in fields(strategy.options):
            helps = takers.setdefault(one.name, {})
            helps.setdefault(one.metadata["help"], []).append(strategy.name)
    return [
        _option(
            name, kinds[name], " ".join(f"{', '.join(who)}: {help}." for help, who in of.items())
        )
        for name, of in takers.items()
    ]
