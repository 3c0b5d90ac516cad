"""`d2f generate`: text from a model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2f.cli.console import log
from d2f.errors import ConfigError

if TYPE_CHECKING:
    from d2f.decoding.batch import GenerationResult
    from d2f.engine.request import Request
    from d2f.models.spec import ModelSpec
    from d2f.models.transformer import Transformer
    from d2f.text import Tokenizer


def generate_command(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id. Default: the shipped student.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter: folder or hub id.")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="pipelined, serial, vanilla, reference or autoregressive. Default: pipelined, "
            "or autoregressive for such a model."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of the response.")] = 256,
    block_size: Annotated[int | None, typer.Option(help="Tokens of a block.")] = None,
    add_threshold: Annotated[
        float | None, typer.Option(help="Open a block at this decoded share of the last.")
    ] = None,
    activate_threshold: Annotated[
        float | None, typer.Option(help="Fully active at this share of the predecessor.")
    ] = None,
    confidence_threshold: Annotated[
        float | None, typer.Option(help="Accept tokens above this probability.")
    ] = None,
    max_live_blocks: Annotated[
        int | None, typer.Option(help="Most blocks open and not cached.")
    ] = None,
    num_steps: Annotated[int | None, typer.Option(help="vanilla: forwards in all.")] = None,
    block_length: Annotated[int | None, typer.Option(help="vanilla: tokens of a block.")] = None,
    temperature: Annotated[float, typer.Option(help="0: the most probable tokens.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling noise.")] = 0,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Apply the model's chat template.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16. Default: the checkpoint's.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it is certain.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer one prompt. The text goes to stdout, statistics to stderr.

    Example:  d2f generate "Tom has 5 apples. Ann has 3 times as many apples as Tom. How many
    apples does Ann have?"
    """
    import sys

    # Usage errors first: before seconds of imports.
    thresholds = {
        "block_size": block_size,
        "add_threshold": add_threshold,
        "activate_threshold": activate_threshold,
        "confidence_threshold": confidence_threshold,
        "max_live_blocks": max_live_blocks,
    }
    options = {"num_steps": num_steps, "block_length": block_length}
    if stream and as_json:
        raise ConfigError("--stream and --json exclude each other")
    if prompt == "-":
        prompt = sys.stdin.read()

    from d2f.engine.request import Request
    from d2f.text import Tokenizer

    source, loaded = _load(model, adapter, device, dtype)
    tokenizer = Tokenizer.load(source)
    causal = loaded.spec.architecture.causal
    strategy = strategy or ("autoregressive" if causal else "pipelined")
    changed = {name: value for name, value in thresholds.items() if value is not None}
    if changed and strategy not in ("pipelined", "serial", "reference"):
        raise ConfigError(f"strategy {strategy} takes no {', '.join(sorted(changed))}")
    request = Request(
        prompt_ids=tokenizer.encode_prompt(prompt, chat=chat),
        max_new_tokens=max_new_tokens,
        policy=_policy(loaded.spec, changed),
        strategy=strategy,
        temperature=temperature,
        seed=seed,
        options={name: value for name, value in options.items() if value is not None},
    )
    start = time.perf_counter()
    if stream:
        for piece in _stream(loaded, tokenizer, request, results := []):
            typer.echo(piece, nl=False)
        typer.echo()
        [result] = results
    else:
        from d2f.engine.engine import Engine

        [result] = Engine(loaded).generate([request])
    seconds = time.perf_counter() - start
    text = tokenizer.decode(result.token_ids)
    if as_json:
        typer.echo(json.dumps(_record(text, result, seconds)))
    elif not stream:
        typer.echo(text)
    if not as_json:
        log.print(
            f"{len(result.token_ids)} tokens in {result.num_forwards} forwards "
            f"({result.tokens_per_forward:.1f} per forward), {seconds:.3f} s, "
            f"{len(result.token_ids) / seconds:.0f} tokens/s, ended by {result.finish_reason}",
            style="dim",
        )


def _load(
    model: str | None, adapter: str | None, device: str | None, dtype: str | None
) -> tuple[str | Path, Transformer]:
    from d2f.cli.device import choose_device, fastest_dtype
    from d2f.models.checkpoint import load_model
    from d2f.shipped import shipped_model

    source = model if model is not None else shipped_model("student")
    device = choose_device(device)
    if dtype is None and model is None:
        dtype = fastest_dtype(device)
    return source, load_model(source, adapter=adapter, device=device, dtype=dtype)


def _policy(spec: ModelSpec, changed: dict[str, Any]) -> Any:
    from d2f.diffusion.policy import DecodingPolicy

    base = spec.recommended_policy or DecodingPolicy()
    return DecodingPolicy.from_dict(base.to_dict() | changed)


def _stream(
    model: Transformer, tokenizer: Tokenizer, request: Request, results: list[GenerationResult]
) -> Iterator[str]:
    from d2f.engine.engine import Engine

    decoder, shown = tokenizer.stream(), 0
    for output in Engine(model).stream(request):
        yield decoder.push(output.token_ids[shown:])
        shown = len(output.token_ids)
        if output.result is not None:
            results.append(output.result)
    yield decoder.close()


def _record(text: str, result: GenerationResult, seconds: float) -> dict[str, Any]:
    return {
        "text": text,
        "token_ids": result.token_ids,
        "num_tokens": len(result.token_ids),
        "num_forwards": result.num_forwards,
        "tokens_per_forward": result.tokens_per_forward,
        "seconds": seconds,
        "tokens_per_second": len(result.token_ids) / seconds,
        "finish_reason": result.finish_reason,
    }
