"""The application of `d2f serve` as replicas on a Ray cluster: `serve run d2f.cli.ray_app:app`.

Ray Serve imports this module and calls `app` with the arguments of its own command line or of a
config file. The module itself imports without Ray.
"""

# Annotations are not postponed here: Ray reads that of `app` to build the arguments.
import functools
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from d2f.cli.decoding_options import ModelChoice
from d2f.cli.serve import build_app, main_model, require_packages
from d2f.errors import ConfigError
from d2f.serving.ray_app import Scaling, deployment_options, ray_application
from d2f.serving.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from d2f.serving.service import Service


class RayArguments(Scaling):
    """Arguments of the application: those of `d2f serve`, and the number and size of replicas.

    The API key is no argument but the environment variable D2F_API_KEY of the replicas.

    Example:
        >>> RayArguments(max_replicas="2").max_replicas
        2
    """

    model: str | None = None
    """Folder or hub id that every replica can read; None: the shipped student."""
    adapter: str | None = None
    eos: list[str] | None = None
    """Tokens that end an answer beside the model's own ends; in a config file only."""
    replace_eos: bool = False
    name: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_batch_size: int = 64
    max_waiting: int = 256
    """Most requests that wait in each replica; others are refused with 429."""
    request_timeout: float = 600.0
    max_tokens: int | None = None
    max_prompt_tokens: int | None = None
    drain_seconds: float = 30.0
    log_prompts: bool = False
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may use the server; in a config file only."""


def app(args: RayArguments) -> Any:
    """Build the application for `serve run d2f.cli.ray_app:app NAME=VALUE …` or a config file."""
    require_packages()
    if find_spec("ray") is None:
        raise ConfigError("d2f on Ray needs Ray Serve: pip install 'd2f[ray]'")
    names = ServeSettings.__dataclass_fields__.keys() & RayArguments.model_fields.keys()
    settings = ServeSettings(**{name: getattr(args, name) for name in names})
    options = deployment_options(
        args,
        max_batch_size=args.max_batch_size,
        max_waiting=settings.max_waiting,
        drain_seconds=settings.drain_seconds,
    )
    return ray_application(functools.partial(_build_replica, args), settings, options)


def _build_replica(args: RayArguments, settings: ServeSettings) -> "tuple[FastAPI, Service]":
    """Load the model and build its application, in the process of a replica."""
    names = ModelChoice.__dataclass_fields__.keys() & RayArguments.model_fields.keys()
    choice = ModelChoice(**{name: getattr(args, name) for name in names})
    served = main_model(choice, args.name, args.max_batch_size)
    return build_app([served], settings)
