"""The HTTP application: OpenAI's endpoints, the probes and the page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from d2f import __version__
from d2f.serving.answers import EventStream, log_fields, whole_answer
from d2f.serving.choice import TokenTexts
from d2f.serving.errors import ApiError, show_value
from d2f.serving.gateway import Gateway, read_json, unless_gone
from d2f.serving.metrics import Metrics
from d2f.serving.openapi import build_openapi
from d2f.serving.page import Page
from d2f.serving.plan import Plan, make_plan
from d2f.serving.protocol import ChatBody, CompletionBody, GenerationBody, parse_body
from d2f.serving.served_model import find_model
from d2f.serving.service import Service, ServiceState
from d2f.serving.settings import ServeSettings
from d2f.serving.ticket import Ticket, Update

Handler = Callable[[Request], Awaitable[Response]]


def create_app(service: Service, settings: ServeSettings, metrics: Metrics) -> FastAPI:
    """The application of a service. Its lifespan starts the service and drains it.

    Args:
        service: Not started yet.
        settings: Of access and limits; host and port are for whoever listens.
        metrics: The service's, too.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop(settings.drain_seconds)

    app = FastAPI(
        title="d2f",
        version=__version__,
        lifespan=lifespan,
        # Their pages come from other servers.
        docs_url=None,
        redoc_url=None,
        # A route of ours, so that it is counted under its name.
        openapi_url=None,
        redirect_slashes=False,
    )
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_middleware(Gateway, settings=settings, metrics=metrics)
    if settings.cors_origins:
        # Around the gateway: a browser asks first without the key, and pages may read refusals.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            # OpenAI's client sends a dozen of its own.
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    for path, name, handler, method in _routes(_Endpoints(service, settings, metrics)):
        methods = ["GET", "HEAD"] if method == "GET" else [method]
        app.add_api_route(path, handler, methods=methods, name=name, response_model=None)
    return app


def _routes(endpoints: _Endpoints) -> list[tuple[str, str, Handler, str]]:
    """Path, name in log and metrics, handler, method."""
    return [
        ("/v1/completions", "/v1/completions", endpoints.completions, "POST"),
        ("/v1/chat/completions", "/v1/chat/completions", endpoints.chat, "POST"),
        ("/v1/models", "/v1/models", endpoints.models, "GET"),
        ("/v1/models/{id:path}", "/v1/models/{id}", endpoints.model, "GET"),
        ("/health", "/health", endpoints.ready, "GET"),
        ("/health/ready", "/health/ready", endpoints.ready, "GET"),
        ("/health/live", "/health/live", endpoints.live, "GET"),
        ("/metrics", "/metrics", endpoints.metrics, "GET"),
        ("/openapi.json", "/openapi.json", endpoints.document, "GET"),
        ("/", "/page", endpoints.page, "GET"),
        ("/page/{name:path}", "/page", endpoints.page, "GET"),
    ]


async def _refuse_route(request: Request, error: Exception) -> Response:
    """404 and 405 in OpenAI's format."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    where = f"{request.method} {show_value(request.url.path)}"
    message = f"{where}: {str(error.detail).lower()}; /openapi.json lists what there is"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    answer = ApiError(error.status_code, message, code=code)
    return Response(answer.body(), error.status_code, headers, "application/json")


class _Endpoints:
    """What the routes do."""

    def __init__(self, service: Service, settings: ServeSettings, metrics: Metrics) -> None:
        self._service = service
        self._settings = settings
        self._metrics = metrics
        created = int(time.time())
        self._entries = {name: model.entry(created) for name, model in service.models.items()}
        self._texts = {name: TokenTexts(model.tokenizer) for name, model in service.models.items()}
        self._page = Page()
        self._document = build_openapi(service.models, settings)

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        return await self._generate(request, CompletionBody)

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._generate(request, ChatBody)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        return JSONResponse({"object": "list", "data": list(self._entries.values())})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{id}`."""
        model = find_model(self._service.models, request.path_params["id"])
        return JSONResponse(self._entries[model.name])

    async def ready(self, request: Request) -> Response:
        """`GET /health`: whether requests would be served."""
        state = self._service.state
        told: dict[str, Any] = {"status": state.value}
        if self._service.fault is not None:
            told["fault"] = self._service.fault
        return JSONResponse(told, 200 if state is ServiceState.READY else 503)

    async def live(self, request: Request) -> Response:
        """`GET /health/live`: the process answers."""
        return JSONResponse({"status": "live"})

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`."""
        content, kind = self._metrics.render()
        return Response(content, headers={"Content-Type": kind})

    async def document(self, request: Request) -> Response:
        """`GET /openapi.json`."""
        return JSONResponse(self._document)

    async def page(self, request: Request) -> Response:
        """`GET /` and the page's files."""
        found = self._page.file(request.path_params.get("name", "index.html"))
        if found is None:
            raise HTTPException(404)
        return found

    # ---------------------------------------------------------------------------------- inside

    async def _generate(self, request: Request, kind: type[GenerationBody]) -> Response:
        scope, settings = request.scope, self._settings
        deadline = asyncio.get_running_loop().time() + settings.request_timeout
        async with asyncio.timeout_at(deadline):
            value = await read_json(scope, request.receive, settings)
            if settings.log_prompts:
                scope["d2f.log"]["prompt"] = value.get("prompt", value.get("messages"))
            body = parse_body(kind, value)
            plan = await make_plan(body, self._service.models, settings)
            scope["d2f.log"]["model"] = plan.model.name
            scope["d2f.log"]["stream"] = plan.stream
            # Probabilities of a response that is not finished stand in its blocks only.
            watch = plan.stream and (plan.include_provisional or plan.logprobs)
            tickets = await self._service.submit(
                plan.model.name, plan.requests, follow=plan.stream, watch=watch
            )
            texts = self._texts[plan.model.name]
            if plan.stream:
                return EventStream(plan, tickets, texts, deadline, self._metrics)
            lasts = await self._results(request, tickets)
        return self._whole(request, plan, lasts, texts)

    async def _results(self, request: Request, tickets: list[Ticket]) -> list[Update]:
        async def gather() -> list[Update]:
            return await asyncio.gather(*(ticket.last() for ticket in tickets))

        try:
            return await unless_gone(request.receive, gather())
        finally:
            for ticket in tickets:
                ticket.cancel()

    def _whole(
        self, request: Request, plan: Plan, lasts: list[Update], texts: TokenTexts
    ) -> Response:
        request.scope["d2f.log"].update(log_fields(plan, lasts))
        return Response(whole_answer(plan, lasts, texts), media_type="application/json")
