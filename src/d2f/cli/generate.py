"""`d2f generate`: text from a model."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2f.cli.console import log
from d2f.errors import ConfigError

if TYPE_CHECKING:
    from d2f.decoding.batch import GenerationResult
    from d2f.diffusion.policy import DecodingPolicy
    from d2f.engine.request import Request
    from d2f.models.spec import ModelSpec
    from d2f.models.transformer import Transformer
    from d2f.text import Tokenizer

PromptArgument = Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")]
ModelOption = Annotated[
    str | None, typer.Option(help="Folder or hub id. Default: the shipped student.")
]
AdapterOption = Annotated[str | None, typer.Option(help="LoRA adapter: folder or hub id.")]
StrategyOption = Annotated[
    str | None,
    typer.Option(
        help="pipelined, serial, autoregressive, vanilla, parallel, prefix-cache, dual-cache, "
        "dllm-cache or reference. Default: pipelined, or autoregressive for such a model."
    ),
]
LimitOption = Annotated[int, typer.Option(help="Most tokens of the response.")]
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
        help="vanilla: low_confidence (LLaDA's), maskgit_plus, topk_margin, entropy or origin "
        "(Dream's)."
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
SeedOption = Annotated[int, typer.Option(help="Seed of the sampling noise.")]
ChatOption = Annotated[
    bool | None, typer.Option("--chat/--no-chat", help="Apply the model's chat template.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, …")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32 or bfloat16. Default: the checkpoint's.")
]
StreamOption = Annotated[bool, typer.Option("--stream", help="Print text as it is certain.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def generate_command(
    prompt: PromptArgument,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    strategy: StrategyOption = None,
    max_new_tokens: LimitOption = 256,
    block_size: BlockSizeOption = None,
    add_threshold: AddOption = None,
    activate_threshold: ActivateOption = None,
    confidence_threshold: ThresholdOption = None,
    confidence: ConfidenceOption = None,
    max_live_blocks: LiveBlocksOption = None,
    num_steps: StepsOption = None,
    block_length: BlockLengthOption = None,
    algorithm: AlgorithmOption = None,
    eps: EpsOption = None,
    threshold: SureOption = None,
    factor: FactorOption = None,
    prompt_interval: PromptIntervalOption = None,
    response_interval: ResponseIntervalOption = None,
    refresh_share: RefreshShareOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    chat: ChatOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    stream: StreamOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer one prompt. The text goes to stdout, statistics to stderr.

    Example:  d2f generate "Tom has 5 apples. Ann has 3 times as many apples as Tom. How many
    apples does Ann have?"
    """
    if stream and as_json:
        raise typer.BadParameter("--stream and --json exclude each other")
    changed = _given(
        block_size=block_size,
        add_threshold=add_threshold,
        activate_threshold=activate_threshold,
        confidence_threshold=confidence_threshold,
        confidence=confidence,
        max_live_blocks=max_live_blocks,
    )
    options = _given(
        num_steps=num_steps,
        block_length=block_length,
        algorithm=algorithm,
        eps=eps,
        threshold=threshold,
        factor=factor,
        prompt_interval=prompt_interval,
        response_interval=response_interval,
        refresh_share=refresh_share,
    )
    _check_values(strategy, changed, options)
    loaded, tokenizer = _load(model, adapter, device, dtype)
    from d2f.engine.request import Request

    causal = loaded.spec.architecture.causal
    strategy = strategy or ("autoregressive" if causal else "pipelined")
    request = Request(
        prompt_ids=tokenizer.encode_prompt(_read(prompt), chat=chat),
        max_new_tokens=max_new_tokens,
        policy=_policy(loaded.spec, strategy, changed),
        strategy=strategy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        options=options,
    )
    start = time.perf_counter()
    result = _answer(loaded, tokenizer, request, stream)
    _report(tokenizer, result, time.perf_counter() - start, stream, as_json)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _read(prompt: str) -> str:
    # As a shell does with $(…), so that `echo … | d2f generate -` asks what was meant.
    return sys.stdin.read().rstrip("\n") if prompt == "-" else prompt


def _check_values(strategy: str | None, changed: dict[str, Any], options: dict[str, Any]) -> None:
    """Refuse what no model could be asked for before any is loaded, which may take minutes."""
    from d2f.diffusion.policy import DecodingPolicy
    from d2f.engine.policy import check_decoding

    DecodingPolicy.from_dict(changed)
    if strategy is not None:
        check_decoding(strategy, {}, options)


def _load(
    model: str | None, adapter: str | None, device: str | None, dtype: str | None
) -> tuple[Transformer, Tokenizer]:
    from d2f.cli.device import choose_device, fastest_dtype
    from d2f.hub import resolve_folder
    from d2f.models.checkpoint import load_model, read_spec
    from d2f.shipped import shipped_model
    from d2f.text import Tokenizer

    source: str | Path = model if model is not None else shipped_model("student")
    # What fails in milliseconds comes before the weights, which may take minutes.
    read_spec(resolve_folder(source, weights=False))
    tokenizer = Tokenizer.load(source)
    device = choose_device(device)
    if dtype is None and model is None:
        dtype = fastest_dtype(device)
    return load_model(source, adapter=adapter, device=device, dtype=dtype), tokenizer


def _policy(spec: ModelSpec, strategy: str, changed: dict[str, Any]) -> DecodingPolicy:
    from d2f.engine.policy import changed_policy, unheeded

    useless = unheeded(strategy, changed)
    if useless:
        options = ", ".join("--" + name.replace("_", "-") for name in useless)
        raise ConfigError(f"{options}: without effect on strategy {strategy}")
    return changed_policy(spec, changed)


def _answer(
    model: Transformer, tokenizer: Tokenizer, request: Request, stream: bool
) -> GenerationResult:
    from d2f.engine.engine import Engine

    engine = Engine(model)
    if not stream:
        return engine.generate([request])[0]
    decoder, shown, result = tokenizer.stream(), 0, None
    for output in engine.stream(request):
        typer.echo(decoder.push(output.token_ids[shown:]), nl=False)
        shown, result = len(output.token_ids), output.result
    typer.echo(decoder.close())
    assert result is not None
    return result


def _report(
    tokenizer: Tokenizer, result: GenerationResult, seconds: float, streamed: bool, as_json: bool
) -> None:
    text, count = tokenizer.decode(result.token_ids), len(result.token_ids)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "text": text,
                    "token_ids": result.token_ids,
                    "num_tokens": count,
                    "num_forwards": result.num_forwards,
                    "tokens_per_forward": result.tokens_per_forward,
                    "seconds": seconds,
                    "tokens_per_second": count / seconds,
                    "finish_reason": result.finish_reason,
                }
            )
        )
        return
    if not streamed:
        typer.echo(text)
    log.print(
        f"{count} tokens in {result.num_forwards} forwards "
        f"({result.tokens_per_forward:.1f} per forward), {seconds:.3f} s, "
        f"{count / seconds:.0f} tokens/s, ended by {result.finish_reason}",
        style="dim",
    )
