"""`d2f train`: run a recipe of one of the three stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2f.cli.console import log, out

if TYPE_CHECKING:
    from d2f.models.transformer import Transformer
    from d2f.text import Tokenizer
    from d2f.training.config import TrainConfig
    from d2f.training.trainer import Sampler

# How a stage's model answers during training. Vanilla takes two tokens a step, to be done soon.
_STRATEGIES: dict[str, str] = {
    "autoregressive": "autoregressive",
    "masked-diffusion": "vanilla",
    "d2f": "pipelined",
}


def train_command(
    recipe: Annotated[Path, typer.Argument(help="A TOML file, as those in recipes/.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to; the recipe names one.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting, as optimizer.lr=1e-4."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON to stdout.")
    ] = False,
) -> None:
    """Train a model: autoregressive, masked-diffusion or d2f (distillation).

    The model is written to OUTPUT/final, the log to OUTPUT/log.jsonl. Ctrl-C saves a checkpoint.

    Example:  d2f train recipes/tiny_cpu_autoregressive.toml --set steps=100
    """
    import json
    import os
    from dataclasses import asdict

    from d2f.errors import ConfigError
    from d2f.training.config import load_recipe
    from d2f.training.progress import Silent, Terminal
    from d2f.training.run import train

    overrides = list(settings or [])
    if output is not None:
        overrides.append(f"output={json.dumps(str(output))}")
    try:
        config = load_recipe(recipe, overrides)
    except ConfigError:
        # Of the processes on a machine, all of which read the same file, one says so.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise typer.Exit(1) from None
        raise
    # Of several processes one speaks.
    is_main = os.environ.get("RANK", "0") == "0"
    reporter = Terminal() if is_main else Silent()
    try:
        summary = train(
            config, device=device, resume=resume, make_sampler=_make_sampler, reporter=reporter
        )
    finally:
        reporter.close()
    if as_json and is_main:
        out.print_json(json.dumps(asdict(summary)))
    if not summary.finished:
        if is_main:
            log.print(
                f"stopped at step {summary.steps}; saved in {summary.folder}; "
                "go on with the same command and --resume",
                markup=False,
                soft_wrap=True,
            )
        raise typer.Exit(1)
    if not as_json and is_main:
        out.print(f"{summary.folder}  ({summary.steps} steps, {summary.seconds:.0f} s)")


def _make_sampler(config: TrainConfig, tokenizer: Tokenizer) -> Sampler:
    """What answers a few prompts with the model: held-out problems, or the first rows."""
    from d2f.engine.generate import generate_ids
    from d2f.training.pairs import encode_prompt
    from d2f.training.sources import read_held_out

    assert config.sample is not None
    count, most = config.sample.num_prompts, config.sample.max_new_tokens
    pairs = read_held_out(config.data, count)
    chat = config.data.chat_template
    prompts = [encode_prompt(tokenizer, prompt, chat) for prompt, _ in pairs]
    strategy = _STRATEGIES[config.stage]
    options: dict[str, Any] = {}
    if strategy == "vanilla":
        options = {"num_steps": max(most // 2, 1), "block_length": most}

    def sample(model: Transformer) -> Sequence[Mapping[str, Any]]:
        results = generate_ids(
            model, prompts, config.policy, max_new_tokens=most, strategy=strategy, **options
        )
        return [
            {
                "prompt": "\n\n".join(pair.texts(response=False)),
                "answer": tokenizer.decode(result.token_ids),
                "expected": pair.response,
                "num_forwards": result.num_forwards,
            }
            for pair, result in zip(pairs, results, strict=True)
        ]

    return sample
