"""`d2f serve`: an OpenAI-compatible server with a page to watch it decode."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2f.cli.decoding_options import DEFAULT_MODEL, ModelChoice, with_option_groups
from d2f.cli.usage import UsageError, usage
from d2f.errors import ConfigError
from d2f.shipped import PREFIX

if TYPE_CHECKING:
    from fastapi import FastAPI

    from d2f.problems import Problem
    from d2f.serving.served_model import ServedModel
    from d2f.serving.service import Service
    from d2f.serving.settings import ServeSettings

RACE_MODELS = ("autoregressive", "teacher")
"""The shipped models that the page races against the shipped student."""
RACE_BATCH_SIZE = 4
"""Most sequences of a race's model; people look on, so rows run one after the other."""
NUM_EXAMPLES = 6
EXAMPLES_SEED = 135
"""A seed whose problems the student solves, the first one with four blocks at work."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The options of `d2f serve` that are settings of the HTTP side under the same names."""

    host: Annotated[str, typer.Option(help="Address; one that others reach needs a key.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, typer.Option(help="Port; 0: any that is free.", min=0, max=65535)] = 8000
    api_key: Annotated[
        str | None,
        typer.Option(
            help="What clients must send as bearer token.",
            envvar="D2F_API_KEY",
            show_envvar=True,
        ),
    ] = None
    max_waiting: Annotated[
        int, typer.Option(help="Most requests that wait; others are refused.", min=1)
    ] = 256
    request_timeout: Annotated[
        float, typer.Option(help="Seconds a request may take, waiting included.", min=0)
    ] = 600.0
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a response. Default: all positions.", min=1)
    ] = None
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a prompt. Default: all positions.", min=1)
    ] = None
    drain_seconds: Annotated[
        float, typer.Option(help="Seconds that running requests have when it ends.", min=0)
    ] = 30.0
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what clients send.")] = (
        False
    )


@with_option_groups
def serve_command(
    *,
    choice: ModelChoice,
    options: ServeOptions,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: its folder's name.")
    ] = None,
    max_batch_size: Annotated[
        int, typer.Option(help="Most sequences that are decoded together.", min=1)
    ] = 64,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin whose web pages may use the server, such as https://app.example; *: all. "
            "Repeatable. Default: none."
        ),
    ] = None,
    race_model: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=DIR: another model, for the page's race; repeatable. Rows: autoregressive, "
            "teacher. Default: the shipped ones beside the shipped student."
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP, in OpenAI's protocol, with a page where one sees it decode.

    Prints one line once requests are answered; SIGTERM or Ctrl-C lets running requests end. The
    log goes to stderr, one JSON object for each request.

    Example:  d2f serve --port 8000
    """
    require_packages()
    from d2f.serving.log import LogWriter
    from d2f.serving.server import open_socket, run_server, url_of
    from d2f.serving.settings import ServeSettings

    with usage():
        settings = ServeSettings(**vars(options), cors_origins=tuple(cors_origin or ()))
    sources = _race_sources(race_model, shipped=choice.source == DEFAULT_MODEL)
    # What fails in milliseconds comes before the weights, which may take minutes.
    with open_socket(options.host, options.port) as bound, LogWriter(sys.stderr):
        served = [main_model(choice, name, max_batch_size)]
        for race_name, source in sources.items():
            rival = ModelChoice(model=source, device=choice.device, dtype=choice.dtype)
            served.append(_race_model(race_name, rival))
        url = url_of(bound)

        def welcome() -> None:
            names = ", ".join(one.name for one in served)
            typer.echo(f"serving {names} at {url}/v1; the page is at {url}/")
            sys.stdout.flush()

        with usage():
            app, service = build_app(served, settings)
        run_server(app, service, settings, bound, welcome)


def require_packages() -> None:
    """Refuse to go on without the packages of the extra `serve`."""
    needed = ("fastapi", "uvicorn", "prometheus-client")
    missing = [name for name in needed if find_spec(name.replace("-", "_")) is None]
    if missing:
        raise ConfigError(f"d2f serve needs {', '.join(missing)}: pip install 'd2f[serve]'")


def _race_sources(given: list[str] | None, *, shipped: bool) -> dict[str, str]:
    """The race's models: name -> folder, hub id, file or shipped name."""
    if not given:
        return {name: PREFIX + name for name in RACE_MODELS} if shipped else {}
    sources: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise UsageError(f"--race-model {text!r} is not of the form NAME=DIR")
        if name in sources:
            raise UsageError(f"--race-model {name} is given twice")
        sources[name] = source
    return sources


def main_model(choice: ModelChoice, name: str | None, max_batch_size: int) -> ServedModel:
    """Load the model of requests that name none."""
    from d2f.engine.engine import Engine, EngineConfig
    from d2f.serving.served_model import ServedModel

    loaded, tokenizer = choice.load()
    source, shipped = choice.source, choice.source.startswith(PREFIX)
    own_name = f"d2f-{source.removeprefix(PREFIX)}" if shipped else Path(source).resolve().name
    examples = example_problems() if source == DEFAULT_MODEL else []
    return ServedModel(
        name=name or own_name,
        engine=Engine(loaded, EngineConfig(max_batch_size=max_batch_size), tokenizer),
        tokenizer=tokenizer,
        examples=tuple(problem.prompt for problem in examples),
    )


def _race_model(name: str, choice: ModelChoice) -> ServedModel:
    from d2f.engine.engine import Engine, EngineConfig
    from d2f.serving.served_model import ServedModel

    loaded, tokenizer = choice.load()
    config = EngineConfig(max_batch_size=RACE_BATCH_SIZE)
    # Fitted, so that on a GPU it does not take the memory that is free.
    config = config.fitted(loaded, [loaded.spec.max_positions] * RACE_BATCH_SIZE)
    return ServedModel(name=name, engine=Engine(loaded, config, tokenizer), tokenizer=tokenizer)


def example_problems() -> list[Problem]:
    """Problems of different structures that the shipped student solves unseen."""
    from d2f.problems import ProblemConfig, generate_problems

    found: dict[str, Problem] = {}
    config = ProblemConfig(min_steps=6, shuffle_rate=1.0)
    for problem in generate_problems(50, seed=EXAMPLES_SEED, split="validation", config=config):
        if len(found) < NUM_EXAMPLES:
            found.setdefault(problem.structure, problem)
    return list(found.values())


def build_app(served: list[ServedModel], settings: ServeSettings) -> tuple[FastAPI, Service]:
    """The application that serves the models, and its service, not started yet."""
    from d2f.serving.app import create_app
    from d2f.serving.metrics import Metrics
    from d2f.serving.service import Service

    metrics = Metrics(model.name for model in served)
    service = Service(served, max_waiting=settings.max_waiting, metrics=metrics)
    return create_app(service, settings, metrics), service
