"""The application as a Ray Serve deployment: replicas, health and scaling by queue length."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from starlette.types import ASGIApp, Receive, Scope, Send

from d2f.serving.errors import ApiError
from d2f.serving.gateway import send_error
from d2f.serving.service import Service
from d2f.serving.settings import ServeSettings, is_loopback

if TYPE_CHECKING:
    from fastapi import FastAPI

NAME = "d2f"
KEY_VARIABLE = "D2F_API_KEY"
_HEALTH_SECONDS = 2.0
_FAREWELL_SECONDS = 10.0
"""Seconds beyond the time for draining, after which Ray ends a replica by force."""


Positive = Annotated[FiniteFloat, Field(gt=0)]
NotNegative = Annotated[FiniteFloat, Field(ge=0)]


class Scaling(BaseModel):
    """The number of replicas, and what Ray sets aside for each.

    Example:
        >>> Scaling(min_replicas=2, max_replicas=4).num_cpus
        1.0
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

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, less than min_replicas {self.min_replicas}"
            )
        return self


def deployment_options(
    scaling: Scaling, *, max_batch_size: int, max_waiting: int, drain_seconds: float
) -> dict[str, Any]:
    """The options of `ray.serve.deployment`; the numbers beside `scaling` are a replica's."""
    room, num_gpus = max_batch_size + max_waiting, scaling.num_gpus
    if num_gpus is None:
        import torch

        num_gpus = float(torch.cuda.is_available())
    return {
        "name": NAME,
        # More than a replica has room for: it refuses the rest itself, with 429 and Retry-After, as
        # a server without Ray does. Ray would let them wait without a word.
        "max_ongoing_requests": 2 * room,
        "max_queued_requests": room,
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "initial_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_ongoing_requests,
            "upscale_delay_s": scaling.upscale_delay_seconds,
            "downscale_delay_s": scaling.downscale_delay_seconds,
        },
        "health_check_period_s": _HEALTH_SECONDS,
        "graceful_shutdown_timeout_s": drain_seconds + _FAREWELL_SECONDS,
        "ray_actor_options": {"num_cpus": scaling.num_cpus, "num_gpus": num_gpus},
    }


class Replica:
    """A replica as Ray manages it; its HTTP side is the application itself.

    Ray replaces a replica whose check fails several times in a row, and one whose process ended.
    """

    app: FastAPI
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

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
    build: Callable[[ServeSettings], tuple[FastAPI, Service]],
    settings: ServeSettings,
    options: dict[str, Any],
) -> Any:  # ray.serve.Application, which is not there without Ray
    """The application of replicas that `serve.run` takes.

    Args:
        build: Makes a replica's application and service, in the replica's process. Ray sends it
            there, so it must be picklable.
        settings: The settings of each replica. The API key comes from the environment variable
            D2F_API_KEY of the replica's process: Ray shows an application's arguments to all who
            may look.
        options: The result of `deployment_options`.
    """
    from ray import serve

    def build_app() -> FastAPI:
        own = dataclasses.replace(settings, api_key=os.environ.get(KEY_VARIABLE))
        app, service = build(own)
        app.state.service = service
        if own.api_key is None:
            app.add_middleware(LocalClients)
        return app

    return serve.deployment(**options)(serve.ingress(build_app)(Replica)).bind()
