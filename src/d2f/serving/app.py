"""The HTTP application: OpenAI's endpoints, the probes and the page."""

from __future__ import annotations

import asyncio
import mimetypes
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from d2f import __version__
from d2f.engine.response_text import TokenTexts
from d2f.serving.answers import EventStream, log_fields, whole_answer
from d2f.serving.document import (
    ModelEntry,
    ModelList,
    Status,
    complete_document,
    generation,
    refusals,
)
from d2f.serving.errors import ApiError, show_value
from d2f.serving.gateway import Gateway, read_json, unless_gone
from d2f.serving.metrics import Metrics
from d2f.serving.plan import make_plan
from d2f.serving.protocol import ChatBody, CompletionBody, parse_body
from d2f.serving.served_model import find_model
from d2f.serving.service import Service, ServiceState
from d2f.serving.settings import ServeSettings
from d2f.serving.ticket import Ticket, Update

Handler = Callable[[Request], Awaitable[Response]]

_PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # The browser asks each time: another version of the server has other files.
    "Cache-Control": "no-cache",
}


def create_app(service: Service, settings: ServeSettings, metrics: Metrics) -> FastAPI:
    """The application of a service. Its lifespan starts the service and drains it."""

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
        # A route of our own is counted under its name.
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
    _add_routes(app, _Endpoints(service, settings, metrics))
    complete_document(app, service.models, settings)
    for route in app.routes:
        methods: set[str] = getattr(route, "methods", set())
        if "GET" in methods:
            # Added after the document was made, where HEAD would be an operation of its own.
            methods.add("HEAD")
    return app


def _add_routes(app: FastAPI, endpoints: _Endpoints) -> None:
    """Add the routes. The name of a route is the label under which log and metrics count it."""

    def add(path: str, handler: Handler, operation: str, **shown: Any) -> None:
        name = path.replace(":path", "")
        shown["summary"] = (handler.__doc__ or "").rstrip(".")
        app.add_api_route(path, handler, name=name, operation_id=operation, **shown)

    def hide(path: str, handler: Handler, name: str) -> None:
        app.add_api_route(path, handler, name=name, include_in_schema=False)

    add("/v1/completions", endpoints.completions, "complete", **generation(CompletionBody))
    add("/v1/chat/completions", endpoints.chat, "chat", **generation(ChatBody))
    refused = refusals()
    add("/v1/models", endpoints.models, "models", response_model=ModelList, responses=refused)
    single = {"response_model": ModelEntry, "responses": refusals(404)}
    add("/v1/models/{id:path}", endpoints.model, "model", **single)
    status = {"response_model": Status, "responses": {**refused, 503: {"model": Status}}}
    add("/health", endpoints.ready, "health", **status)
    add("/health/ready", endpoints.ready, "ready", **status)
    add("/health/live", endpoints.live, "live", response_model=Status, responses=refused)
    text = {"response_class": PlainTextResponse, "responses": refused}
    add("/metrics", endpoints.metrics, "metrics", **text)
    hide("/openapi.json", endpoints.document, "/openapi.json")
    hide("/", endpoints.page, "/page")
    hide("/page/{name:path}", endpoints.page, "/page")


async def _refuse_route(request: Request, error: Exception) -> Response:
    """Answer 404 and 405 in OpenAI's format."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    where = f"{request.method} {show_value(request.url.path)}"
    message = f"{where}: {str(error.detail).lower()}; /openapi.json lists what there is"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    answer = ApiError(error.status_code, message, code=code)
    return Response(answer.body(), error.status_code, headers, "application/json")


class _Endpoints:
    """The handlers of the routes; their docstrings stand in the OpenAPI document."""

    def __init__(self, service: Service, settings: ServeSettings, metrics: Metrics) -> None:
        self._service, self._settings, self._metrics = service, settings, metrics
        models, created = service.models, int(time.time())
        self._entries = {name: model.entry(created) for name, model in models.items()}
        self._texts = {name: TokenTexts(model.tokenizer) for name, model in models.items()}
        self._files = {
            path.name: (path.read_bytes(), mimetypes.guess_type(path.name)[0])
            for path in _PAGE.iterdir()
        }

    async def completions(self, request: Request) -> Response:
        """Continue a prompt."""
        return await self._generate(request, CompletionBody)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._generate(request, ChatBody)

    async def models(self, request: Request) -> Response:
        """The served models, the default first."""
        return JSONResponse({"object": "list", "data": list(self._entries.values())})

    async def model(self, request: Request) -> Response:
        """One of the served models."""
        model = find_model(self._service.models, request.path_params["id"])
        return JSONResponse(self._entries[model.name])

    async def ready(self, request: Request) -> Response:
        """Whether requests would be served."""
        state = self._service.state
        told: dict[str, Any] = {"status": state.value}
        if self._service.fault is not None:
            told["fault"] = self._service.fault
        return JSONResponse(told, 200 if state is ServiceState.READY else 503)

    async def live(self, request: Request) -> Response:
        """Whether the process answers."""
        return JSONResponse({"status": "live"})

    async def metrics(self, request: Request) -> Response:
        """The metrics for Prometheus."""
        content, kind = self._metrics.render()
        return Response(content, headers={"Content-Type": kind})

    async def document(self, request: Request) -> Response:
        """The OpenAPI document."""
        return JSONResponse(request.app.openapi())

    async def page(self, request: Request) -> Response:
        """A file of the page; there are no others to ask for."""
        name = request.path_params.get("name", "index.html")
        if name not in self._files:
            raise HTTPException(404)
        content, kind = self._files[name]
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    # ------------------------------------------------------------------------ generation

    async def _generate(
        self, request: Request, kind: type[CompletionBody] | type[ChatBody]
    ) -> Response:
        scope, settings = request.scope, self._settings
        log = scope["d2f.log"]
        deadline = asyncio.get_running_loop().time() + settings.request_timeout
        async with asyncio.timeout_at(deadline):
            value = await read_json(scope, request.receive, settings)
            if settings.log_prompts:
                log["prompt"] = value.get("prompt", value.get("messages"))
            body = parse_body(kind, value)
            plan = await make_plan(body, self._service.models, settings)
            name = plan.model.name
            stream = bool(body.stream)
            log |= {"model": name, "stream": stream}
            # Probabilities of a response that is not finished stand in its blocks only.
            watch = stream and (plan.options.include_provisional or plan.logprobs)
            tickets = await self._service.submit(name, plan.requests, follow=stream, watch=watch)
            if stream:
                return EventStream(plan, tickets, self._texts[name], deadline, self._metrics)
            try:
                lasts = await unless_gone(request.receive, _lasts(tickets))
            finally:
                for ticket in tickets:
                    ticket.cancel()
        log |= log_fields(plan, lasts)
        content = whole_answer(plan, lasts, self._texts[name])
        return Response(content, media_type="application/json")


async def _lasts(tickets: list[Ticket]) -> list[Update]:
    return await asyncio.gather(*(ticket.last() for ticket in tickets))
