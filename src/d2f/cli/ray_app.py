"""The application of `d2f serve` as replicas on a Ray cluster: `serve run d2f.cli.ray_app:app`.

Ray Serve imports this module and calls `app` with the arguments of its own command line or of a
config file. The module itself imports without Ray.
"""

# Annotations are not postponed here: Ray reads that of `app` to build the arguments.
import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from d2f.cli.decoding_options import ModelChoice
from d2f.cli.serve import build_app, main_model, require_packages
from d2f.errors import ConfigError
from d2f.serving.errors import ApiError
from d2f.serving.gateway import send_error
from d2f.serving.settings import ServeSettings, is_loopback

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

    from d2f.serving.service import Service

KEY_VARIABLE = "D2F_API_KEY"
_HEALTH_SECONDS = 2.0
_FAREWELL_SECONDS = 10.0
"""Seconds beyond the time for draining, after which Ray ends a replica by force."""

Positive = Annotated[FiniteFloat, Field(gt=0)]
NotNegative = Annotated[FiniteFloat, Field(ge=0)]


class RayArguments(BaseModel):
    """Arguments of the application: those of `d2f serve`, and the number and size of replicas.

    The API key is no argument but the environment variable D2F_API_KEY of the replicas.

    Example:
        >>> RayArguments(max_replicas="2").max_replicas
        2
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: int = 1
    target_ongoing_requests: Positive = 16.0
    """Requests, running and waiting, that a replica should have on average; with more of them
    replicas are added, with fewer taken away."""
    upscale_delay_seconds: NotNegative = 10.0
    """Seconds for which there must be more before replicas are added."""
    downscale_delay_seconds: NotNegative = 300.0
    """Seconds for which there must be fewer before replicas are taken away."""
    num_cpus: Positive = 1.0
    num_gpus: NotNegative | None = None
    """GPUs of a replica. None: 1 if there is a GPU where the application is built, else 0."""

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

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, less than min_replicas {self.min_replicas}"
            )
        return self

    def for_dataclass(self, kind: type[Any]) -> dict[str, Any]:
        """The arguments that are fields of a dataclass."""
        names = kind.__dataclass_fields__.keys() & type(self).model_fields.keys()
        return {name: getattr(self, name) for name in names}


def app(args: RayArguments) -> Any:
    """Build the application for `serve run d2f.cli.ray_app:app NAME=VALUE …` or a config file."""
    require_packages()
    if find_spec("ray") is None:
        raise ConfigError("d2f on Ray needs Ray Serve: pip install 'd2f[ray]'")
    settings = ServeSettings(**args.for_dataclass(ServeSettings))
    build = functools.partial(_build_replica, args)
    return ray_application(build, settings, deployment_options(args))


def _build_replica(args: RayArguments, settings: ServeSettings) -> "tuple[FastAPI, Service]":
    """Load the model and build its application, in the process of a replica."""
    choice = ModelChoice(**args.for_dataclass(ModelChoice))
    return build_app([main_model(choice, args.name, args.max_batch_size)], settings)


def deployment_options(args: RayArguments) -> dict[str, Any]:
    """The options of `ray.serve.deployment`."""
    room, num_gpus = args.max_batch_size + args.max_waiting, args.num_gpus
    if num_gpus is None:
        import torch

        num_gpus = float(torch.cuda.is_available())
    return {
        "name": "d2f",
        # More than a replica has room for: it refuses the rest itself, with 429 and Retry-After, as
        # a server without Ray does. Ray would let them wait without a word.
        "max_ongoing_requests": 2 * room,
        "max_queued_requests": room,
        "autoscaling_config": {
            "min_replicas": args.min_replicas,
            "initial_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": args.target_ongoing_requests,
            "upscale_delay_s": args.upscale_delay_seconds,
            "downscale_delay_s": args.downscale_delay_seconds,
        },
        "health_check_period_s": _HEALTH_SECONDS,
        "graceful_shutdown_timeout_s": args.drain_seconds + _FAREWELL_SECONDS,
        "ray_actor_options": {"num_cpus": args.num_cpus, "num_gpus": num_gpus},
    }


class Replica:
    """A replica as Ray manages it; its HTTP side is the application itself.

    Ray replaces a replica whose check fails several times in a row, and one whose process ended.
    """

    app: "FastAPI"
    """Set by Ray, from the function handed to `serve.ingress`."""

    def __init__(self) -> None:
        from d2f.serving.log import LogWriter

        # To the replica's log file. It ends with the process.
        LogWriter(sys.stderr).__enter__()

    async def check_health(self) -> None:
        """Wait until requests are answered; Ray sends no traffic before.

        Raises:
            Unavailable: The service has failed, so another replica must take its place.
        """
        service: Service = self.app.state.service
        await service.ready()


class LocalClients:
    """ASGI middleware that refuses clients from other machines, for applications without a key.

    A replica does not know what address Ray's proxy listens on, so it looks at who asks.
    """

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Pass a request on or refuse it."""
        client = scope.get("client")
        if scope["type"] == "http" and (client is None or not is_loopback(client[0])):
            message = (
                "without an API key only this machine is served; set D2F_API_KEY in the "
                "environment of the replicas"
            )
            await send_error(ApiError(403, message, code="host_not_allowed"), send)
            return
        await self._app(scope, receive, send)


def ray_application(
    build: "Callable[[ServeSettings], tuple[FastAPI, Service]]",
    settings: ServeSettings,
    options: dict[str, Any],
) -> Any:  # ray.serve.Application, which is not there without Ray
    """The application of replicas that `serve.run` takes.

    Ray sends `build` to each replica's process, so it must be picklable. The API key comes from
    that process's environment: Ray shows an application's arguments to all who may look.
    """
    from ray import serve

    def build_app() -> "FastAPI":
        own = dataclasses.replace(settings, api_key=os.environ.get(KEY_VARIABLE))
        app, service = build(own)
        app.state.service = service
        if own.api_key is None:
            app.add_middleware(LocalClients)
        return app

    return serve.deployment(**options)(serve.ingress(build_app)(Replica)).bind()
