"""The server's OpenAPI document: FastAPI makes it of the routes and of the models in this file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, Field

from d2f.engine.policy import useful_strategies
from d2f.serving.plan import most_tokens
from d2f.serving.protocol import ChatBody, CompletionBody, GenerationBody
from d2f.serving.served_model import ServedModel
from d2f.serving.settings import ServeSettings

_REFUSALS = {
    400: "A value is wrong; the message says which and why.",
    401: "The API key is missing or wrong.",
    403: "Asked for under a name that is not this machine's.",
    404: "There is no such model.",
    408: "The body came too slowly.",
    413: "The body is too long.",
    415: "The body is not application/json.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "An error of the server, of which its log has more.",
    503: "The server is about to stop, or has failed.",
    504: "The request took too long.",
}
_OF_GENERATION = (400, 404, 408, 413, 415, 429, 503, 504)
_SCHEMAS = "#/components/schemas/"

Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(ge=0)]


class ErrorFields(BaseModel):
    """The error of a request."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """The answer to a request that failed."""

    error: ErrorFields


class Usage(BaseModel):
    """The tokens, forwards and seconds of an answer."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    num_forwards: Count
    tokens_per_forward: Number
    seconds: Number
    waited: Number


class Answer(BaseModel):
    """The answer to a request that is not streamed."""

    id: str
    object: Literal["text_completion", "chat.completion"]
    created: int
    model: str
    choices: Annotated[list[dict[str, Any]], Field(min_length=1)]
    usage: Usage


class Event(BaseModel):
    """An event of a stream; its data is a chunk in JSON."""

    data: str


class ModelEntry(BaseModel):
    """A served model."""

    id: str
    object: str
    created: int
    owned_by: str
    d2f: dict[str, Any]


class ModelList(BaseModel):
    """The served models."""

    object: str
    data: list[ModelEntry]


class Status(BaseModel):
    """The state of the service."""

    status: str
    fault: str | None = None


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route with these statuses, and of all routes, as FastAPI documents them.

    Example:
        >>> sorted(refusals(404))
        [401, 403, 404, 500]
    """
    content = {"application/json": {"schema": {"$ref": _SCHEMAS + Error.__name__}}}
    found: dict[int | str, dict[str, Any]] = {
        status: {"description": _REFUSALS[status], "content": content}
        for status in (*statuses, 401, 403, 500)
    }
    if 429 in found:
        found[429]["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
    return found


def generation(body: type[GenerationBody]) -> dict[str, Any]:
    """The options of a route that generates, whose handler reads the body by itself."""
    content = {"application/json": {"schema": {"$ref": _SCHEMAS + body.__name__}}}
    stream = {"text/event-stream": {"schema": Event.model_json_schema()}}
    return {
        "response_model": Answer,
        "responses": {200: {"content": stream}, **refusals(*_OF_GENERATION)},
        "methods": ["POST"],
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }


def complete_document(
    app: FastAPI, models: Mapping[str, ServedModel], settings: ServeSettings
) -> None:
    """Add to the application's document what depends on the models and the settings."""
    document = app.openapi()
    schemas = document["components"]["schemas"]
    for kind in (Error, CompletionBody, ChatBody):
        schema = kind.model_json_schema(ref_template=_SCHEMAS + "{model}")
        schemas |= {**schema.pop("$defs"), kind.__name__: schema}
        if kind is not Error:
            _narrow(schema["properties"], models, settings)
    document["paths"]["/v1/models/{id}"]["get"]["parameters"] = [
        {
            "name": "id",
            "in": "path",
            "required": True,
            "schema": {"type": "string", "minLength": 1},
            "examples": {name: {"value": name} for name in models},
        }
    ]
    if settings.api_key is not None:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]


def _narrow(
    properties: dict[str, Any], models: Mapping[str, ServedModel], settings: ServeSettings
) -> None:
    """Put the served models and their limits into the schema of a body."""
    properties["model"] = {"enum": [*models, None]}
    most = max(most_tokens(model, settings) for model in models.values())
    for name in ("max_tokens", "max_completion_tokens"):
        properties[name]["anyOf"][0] = {"type": "integer", "minimum": 1, "maximum": most}
    properties["n"]["anyOf"][0]["maximum"] = settings.max_choices
    strategies = useful_strategies(next(iter(models.values())).engine.model.spec)
    properties["strategy"] = {"type": ["string", "null"], "examples": strategies}
