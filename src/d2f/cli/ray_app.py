"""`serve run d2f.cli.ray_app:app`: what `d2f serve` serves, as replicas on a Ray cluster.

Ray Serve imports this module and calls `app` with the arguments of its own command line or of a
config file; only then is there a need for Ray.
"""

# No postponed annotations here: Ray looks at that of `app` to know what to make of the arguments.
import functools
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from d2f.cli.serve import build_app, main_model, require_packages
from d2f.errors import ConfigError
from d2f.serving.ray_app import Scaling, deployment_options, ray_application
from d2f.serving.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from d2f.serving.service import Service


class RayArguments(BaseModel):
    """Arguments of the application: those of `d2f serve`, then of its replicas.

    The API key is none of them; it is the environment variable D2F_API_KEY of the replicas.

    Example:
        >>> RayArguments(min_replicas="2").min_replicas
        2
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = None
    """Folder or hub id, which every replica must be able to read. None: the shipped student."""
    adapter: str | None = None
    eos: list[str] = []
    """In a config file: tokens that end an answer beside the model's own ends."""
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
    """In a config file only."""
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float = 16.0
    """Requests that a replica should have on average, running and waiting."""
    upscale_delay_seconds: float = 10.0
    downscale_delay_seconds: float = 300.0
    num_cpus: float = 1.0
    num_gpus: float | None = None
    """Of each replica. None: 1 if there is a GPU where the application is built, else 0."""


def app(args: RayArguments) -> Any:
    """The application, for `serve run d2f.cli.ray_app:app NAME=VALUE …` or a config file.

    Raises:
        ConfigError: A package is missing, or a value is out of its range.
    """
    require_packages()
    if find_spec("ray") is None:
        raise ConfigError("d2f on Ray needs Ray Serve: pip install 'd2f[ray]'")
    settings = _part(ServeSettings, args)
    num_gpus = _num_gpus() if args.num_gpus is None else args.num_gpus
    scaling = _part(Scaling, args.model_copy(update={"num_gpus": num_gpus}))
    options = deployment_options(
        scaling,
        max_batch_size=args.max_batch_size,
        max_waiting=settings.max_waiting,
        drain_seconds=settings.drain_seconds,
    )
    return ray_application(functools.partial(_build_replica, args), settings, options)


def _part(cls: Any, args: RayArguments) -> Any:
    """The config of a class from those of the arguments that are its fields."""
    names = cls.__dataclass_fields__.keys() & RayArguments.model_fields.keys()
    return cls(**{name: getattr(args, name) for name in names})


def _num_gpus() -> float:
    import torch

    return float(torch.cuda.is_available())


def _build_replica(args: RayArguments, settings: ServeSettings) -> "tuple[FastAPI, Service]":
    """Load the model and make its application, in a replica's process."""
    served = main_model(
        args.model,
        args.adapter,
        args.name,
        args.device,
        args.dtype,
        args.max_batch_size,
        eos=args.eos,
        replace_eos=args.replace_eos,
    )
    return build_app([served], settings)
