"""What one may choose of a model and of how it decodes, for all commands that decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2f.cli.usage import UsageError, usage
from d2f.errors import counted
from d2f.shipped import PREFIX

if TYPE_CHECKING:
    from d2f.diffusion.policy import DecodingPolicy
    from d2f.engine.request import Request
    from d2f.models.spec import ModelSpec
    from d2f.models.transformer import Transformer
    from d2f.text import Tokenizer

DEFAULT_MODEL = f"{PREFIX}student"

ModelOption = Annotated[
    str | None,
    typer.Option(help="Folder, hub id, GGUF file or shipped:NAME. Default: shipped:student."),
]
AdapterOption = Annotated[str | None, typer.Option(help="LoRA adapter: folder or hub id.")]
StrategyOption = Annotated[
    str | None,
    typer.Option(
        help="pipelined, serial, autoregressive, vanilla, parallel, prefix-cache, dual-cache, "
        "dllm-cache or reference. Default: pipelined; autoregressive for such a model; vanilla for "
        "a diffusion model that was not distilled."
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(help="Most tokens of the response. Default: what the model names, else 256."),
]
BlockSizeOption = Annotated[int | None, typer.Option(help="Tokens of a block.")]
AddOption = Annotated[
    float | None, typer.Option(help="Open a block at this decoded share of the last.")
]
ActivateOption = Annotated[
    float | None, typer.Option(help="Fully active at this share of the predecessor.")
]
ThresholdOption = Annotated[
    float | None, typer.Option(help="Accept tokens above this probability.")
]
ConfidenceOption = Annotated[
    str | None,
    typer.Option(
        help="What ranks the token that a block must accept: probability, margin or neg_entropy."
    ),
]
LiveBlocksOption = Annotated[int | None, typer.Option(help="Most blocks open and not cached.")]
StepsOption = Annotated[int | None, typer.Option(help="vanilla, dllm-cache: forwards in all.")]
BlockLengthOption = Annotated[
    int | None,
    typer.Option(
        help="vanilla, parallel, prefix-cache, dual-cache, dllm-cache: tokens of a block."
    ),
]
AlgorithmOption = Annotated[
    str | None,
    typer.Option(
        help="vanilla: low_confidence (LLaDA's own), maskgit_plus, topk_margin, entropy (Dream's "
        "own) or origin. Default: the model's own."
    ),
]
EpsOption = Annotated[float | None, typer.Option(help="vanilla: where Dream's time ends.")]
SureOption = Annotated[
    float | None,
    typer.Option(help="parallel, prefix-cache, dual-cache: keep tokens of this probability."),
]
FactorOption = Annotated[
    float | None,
    typer.Option(help="parallel, prefix-cache, dual-cache: keep as many as this factor allows."),
]
PromptIntervalOption = Annotated[
    int | None, typer.Option(help="dllm-cache: forwards between refreshes of the prompt.")
]
ResponseIntervalOption = Annotated[
    int | None, typer.Option(help="dllm-cache: forwards between refreshes of the response.")
]
RefreshShareOption = Annotated[
    float | None, typer.Option(help="dllm-cache: share of the response computed in between.")
]
TemperatureOption = Annotated[float, typer.Option(help="0: the most probable tokens.")]
TopKOption = Annotated[int, typer.Option(help="Sample among this many tokens; 0: among all.")]
TopPOption = Annotated[float, typer.Option(help="Sample among the top tokens of this mass.")]
MinPOption = Annotated[
    float,
    typer.Option(help="Sample among tokens of at least this share of the largest probability."),
]
SeedOption = Annotated[int, typer.Option(help="Seed of the sampling noise.")]
ChatOption = Annotated[
    bool | None, typer.Option("--chat/--no-chat", help="Apply the model's chat template.")
]
EosOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A token that ends an answer beside the model's own, by id or text; repeatable."
    ),
]
ReplaceEosOption = Annotated[
    bool, typer.Option("--replace-eos", help="Only --eos ends an answer, not the model's own ends.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, …")]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="float32 or bfloat16. Default: the checkpoint's; of a shipped model, the faster one."
    ),
]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: those that are not None.

    Example:
        >>> given(block_size=8, confidence=None)
        {'block_size': 8}
    """
    return {name: value for name, value in options.items() if value is not None}


def check_choices(request: Request, strategy: str | None, changed: dict[str, Any]) -> None:
    """Refuse what no model could be asked for before any is loaded, which may take minutes.

    Args:
        request: What is to be asked, as far as it is known without the model.
        strategy: The one that was named; the options of `request` belong to it.
        changed: Fields of the policy.

    Raises:
        UsageError: An unknown strategy, option or field of the policy, or a bad value.
    """
    from d2f.diffusion.policy import DecodingPolicy
    from d2f.engine.request import check_request

    with usage():
        DecodingPolicy.from_dict(changed)
        if strategy is None:
            check_request(replace(request, options={}))
            return
        check_request(replace(request, strategy=strategy))
    _check_heeded(strategy, changed)


def check_fit(spec: ModelSpec, request: Request) -> None:
    """Refuse a strategy, or options of it, that the model cannot be decoded with.

    Raises:
        UsageError: They do not fit.
    """
    from d2f.decoding.strategies import check_strategy

    assert request.strategy is not None
    if request.max_new_tokens > spec.max_positions:
        raise UsageError(
            f"--max-new-tokens {request.max_new_tokens} is more than the model's "
            f"{counted(spec.max_positions, 'position')}"
        )
    with usage():
        # An empty prompt is refused later, as a prompt.
        check_strategy(request.strategy, request.options, spec, 1, request.max_new_tokens)


def load_answerer(
    model: str | None,
    adapter: str | None,
    device: str | None,
    dtype: str | None,
    *,
    eos: Sequence[str] | None = None,
    replace_eos: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """The model asked for, the shipped student by default, and its tokenizer.

    The default dtype of a shipped model is the device's fastest. `eos` and `replace_eos` are the
    options of these names: the model's spec has the ends that they leave.

    Raises:
        CheckpointError: There is none, or it is broken.
        UsageError: The device or the dtype cannot be used, or `eos` names no token.
    """
    from d2f.cli.device import choose_device, choose_dtype, choose_threads
    from d2f.engine.ends import choose_ends
    from d2f.hub import resolve_folder
    from d2f.models.checkpoint import load_model, read_spec
    from d2f.models.lora import with_adapter
    from d2f.text import Tokenizer

    source = model or DEFAULT_MODEL
    # What fails in milliseconds comes before the weights, which may take minutes.
    device = choose_device(device)
    if dtype is not None:
        dtype = choose_dtype(dtype, device)
    spec = read_spec(resolve_folder(source, weights=False))
    if adapter is not None:
        spec = with_adapter(spec, resolve_folder(adapter))
    choose_threads(spec.num_parameters, device)
    if dtype is None and source.startswith(PREFIX):
        dtype = choose_dtype(None, device)  # measured with the threads that will compute
    tokenizer = Tokenizer.load(source)
    named = [int(one) if one.isascii() and one.isdigit() else one for one in eos or ()]
    with usage():
        ends = choose_ends(named, tokenizer, spec, replace=replace_eos)
    loaded = load_model(source, adapter=adapter, device=device, dtype=dtype)
    loaded.spec = replace(loaded.spec, eos_token_ids=ends)
    return loaded, tokenizer


def default_strategy(spec: ModelSpec, changed: dict[str, Any] | None = None) -> str:
    """What a model is decoded with unless somebody says otherwise; `changed` is of the policy."""
    from d2f.engine.policy import default_strategy as rule

    return rule(spec, policy=bool(changed))


def chosen_policy(spec: ModelSpec, strategy: str, changed: dict[str, Any]) -> DecodingPolicy:
    """The model's policy with the fields that were given as options.

    Raises:
        UsageError: One of them has no effect on the strategy.
    """
    from d2f.engine.policy import changed_policy

    _check_heeded(strategy, changed)
    return changed_policy(spec, changed)


def _check_heeded(strategy: str, changed: dict[str, Any]) -> None:
    from d2f.engine.policy import unheeded

    useless = unheeded(strategy, changed)
    if useless:
        options = ", ".join("--" + name.replace("_", "-") for name in useless)
        raise UsageError(f"{options}: without effect on strategy {strategy}")
