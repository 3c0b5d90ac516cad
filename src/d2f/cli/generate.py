"""`d2f generate`: text from a model."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from d2f.cli.console import log
from d2f.cli.decoding_options import (
    ActivateOption,
    AdapterOption,
    AddOption,
    AlgorithmOption,
    BlockLengthOption,
    BlockSizeOption,
    ChatOption,
    ConfidenceOption,
    DeviceOption,
    DtypeOption,
    EosOption,
    EpsOption,
    FactorOption,
    LimitOption,
    LiveBlocksOption,
    MinPOption,
    ModelOption,
    PromptIntervalOption,
    RefreshShareOption,
    ReplaceEosOption,
    ResponseIntervalOption,
    SeedOption,
    StepsOption,
    StrategyOption,
    SureOption,
    TemperatureOption,
    ThresholdOption,
    TopKOption,
    TopPOption,
    check_choices,
    chosen_policy,
    default_strategy,
    given,
    load_answerer,
)

if TYPE_CHECKING:
    from d2f.decoding.batch import GenerationResult
    from d2f.engine.request import Request
    from d2f.models.transformer import Transformer
    from d2f.text import Tokenizer

PromptArgument = Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")]
StreamOption = Annotated[bool, typer.Option("--stream", help="Print text as it is certain.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def generate_command(
    prompt: PromptArgument,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    strategy: StrategyOption = None,
    max_new_tokens: LimitOption = None,
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
    min_p: MinPOption = 0.0,
    seed: SeedOption = 0,
    chat: ChatOption = None,
    eos: EosOption = None,
    replace_eos: ReplaceEosOption = False,
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
    changed = given(
        block_size=block_size,
        add_threshold=add_threshold,
        activate_threshold=activate_threshold,
        confidence_threshold=confidence_threshold,
        confidence=confidence,
        max_live_blocks=max_live_blocks,
    )
    options = given(
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
    check_choices(strategy, changed, options)
    loaded, tokenizer = load_answerer(
        model, adapter, device, dtype, eos=eos, replace_eos=replace_eos
    )
    from d2f.engine.policy import default_limit
    from d2f.engine.request import Request

    strategy = strategy or default_strategy(loaded.spec, changed)
    prompt_ids = tokenizer.encode_prompt(_read(prompt), chat=chat)
    if max_new_tokens is None:
        max_new_tokens = default_limit(loaded.spec, len(prompt_ids))
    request = Request(
        prompt_ids=prompt_ids,
        max_new_tokens=max_new_tokens,
        policy=chosen_policy(loaded.spec, strategy, changed),
        strategy=strategy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        options=options,
    )
    start = time.perf_counter()
    result = _answer(loaded, tokenizer, request, stream)
    text = tokenizer.decode(_seen(result.token_ids, loaded.spec.eos_token_ids))
    _report(text, result, time.perf_counter() - start, stream, as_json)


def _read(prompt: str) -> str:
    # As a shell does with $(…), so that `echo … | d2f generate -` asks what was meant.
    return sys.stdin.read().rstrip("\n") if prompt == "-" else prompt


def _answer(
    model: Transformer, tokenizer: Tokenizer, request: Request, stream: bool
) -> GenerationResult:
    from d2f.engine.engine import Engine

    engine = Engine(model)
    if not stream:
        return engine.generate([request])[0]
    decoder, shown, result = tokenizer.stream(), 0, None
    for output in engine.stream(request):
        seen = _seen(output.token_ids, model.spec.eos_token_ids)
        typer.echo(decoder.push(seen[shown:]), nl=False)
        shown, result = len(seen), output.result
    typer.echo(decoder.close())
    assert result is not None
    return result


def _seen(token_ids: list[int], ends: tuple[int, ...]) -> list[int]:
    """The tokens of the text: an end is none of them, even one that is an ordinary word."""
    return token_ids[:-1] if token_ids and token_ids[-1] in ends else token_ids


def _report(
    text: str, result: GenerationResult, seconds: float, streamed: bool, as_json: bool
) -> None:
    count = len(result.token_ids)
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
