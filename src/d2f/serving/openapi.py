"""The document that says what the server takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from d2f import __version__
from d2f.engine.policy import useful_strategies
from d2f.serving.plan import most_tokens
from d2f.serving.protocol import ChatBody, CompletionBody, Message, StreamOptions
from d2f.serving.served_model import ServedModel
from d2f.serving.settings import ServeSettings

_STATUSES = {
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
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_COUNT = {"type": "integer", "minimum": 0}
_NUMBER = {"type": "number", "minimum": 0}
_USAGE = {
    "type": "object",
    "properties": {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "num_forwards": _COUNT,
        "tokens_per_forward": _NUMBER,
        "seconds": _NUMBER,
        "waited": _NUMBER,
    },
}
_ANSWER = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"enum": ["text_completion", "chat.completion"]},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {"type": "array", "items": {"type": "object"}, "minItems": 1},
        "usage": _USAGE,
    },
}
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}},
}
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "d2f"],
    "properties": {"id": {"type": "string"}, "d2f": {"type": "object"}},
}
_MODELS = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"data": {"type": "array", "items": _MODEL}},
}
_STATUS = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"type": "string"}, "fault": {"type": "string"}},
}


def build_openapi(models: Mapping[str, ServedModel], settings: ServeSettings) -> dict[str, Any]:
    """The OpenAPI document of a server with these models: their names and limits stand in it."""
    kinds = [(kind, "validation") for kind in (CompletionBody, ChatBody)]
    _, defined = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas = defined["$defs"]
    for kind in (CompletionBody, ChatBody, Message, StreamOptions):
        _add_neutral(schemas[kind.__name__]["properties"], kind.neutral)
    for kind in (CompletionBody, ChatBody):
        _narrow(schemas[kind.__name__]["properties"], models, settings)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "d2f", "version": __version__},
        "paths": _paths(list(models)),
        "components": {"schemas": {**schemas, "Error": _ERROR}},
    }
    if settings.api_key is not None:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _add_neutral(properties: dict[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    for name, accepted in neutral.items():
        properties[name] = {"enum": list(accepted), "description": "Not supported; accepted so."}


def _narrow(
    properties: dict[str, Any], models: Mapping[str, ServedModel], settings: ServeSettings
) -> None:
    """What depends on the models and the settings."""
    properties["model"] = {"enum": [*models, None]}
    most = max(most_tokens(model, settings) for model in models.values())
    for name in ("max_tokens", "max_completion_tokens"):
        properties[name]["anyOf"][0] = {"type": "integer", "minimum": 1, "maximum": most}
    properties["n"]["anyOf"][0]["maximum"] = settings.max_choices
    strategies = useful_strategies(next(iter(models.values())).engine.model.spec)
    properties["strategy"] = {"type": ["string", "null"], "examples": strategies}


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _responses(schema: Mapping[str, Any], *statuses: int) -> dict[str, Any]:
    error = {"$ref": "#/components/schemas/Error"}
    refusals = {
        str(status): {"description": _STATUSES[status], "content": _json(error)}
        for status in (*statuses, 401, 403, 500)
    }
    if "429" in refusals:
        refusals["429"]["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
    return {"200": {"description": "Done.", "content": _json(schema)}, **refusals}


def _generation(operation: str, summary: str, body: str) -> dict[str, Any]:
    responses = _responses(_ANSWER, 400, 404, 408, 413, 415, 429, 503, 504)
    # Of each event; its data is a chunk in JSON.
    responses["200"]["content"]["text/event-stream"] = {"schema": _EVENT}
    schema = {"$ref": f"#/components/schemas/{body}"}
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "requestBody": {"required": True, "content": _json(schema)},
            "responses": responses,
        }
    }


def _get(operation: str, summary: str, responses: Mapping[str, Any]) -> dict[str, Any]:
    return {"get": {"operationId": operation, "summary": summary, "responses": responses}}


def _paths(names: list[str]) -> dict[str, Any]:
    ready = _responses(_STATUS)
    ready["503"] = {"description": "Not ready.", "content": _json(_STATUS)}
    text = _responses({})
    text["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    one = _get("model", "A model", _responses(_MODEL, 404))
    one["parameters"] = [
        {
            "name": "id",
            "in": "path",
            "required": True,
            "schema": {"type": "string", "minLength": 1},
            "examples": {name: {"value": name} for name in names},
        }
    ]
    return {
        "/v1/completions": _generation("complete", "Continue a prompt", "CompletionBody"),
        "/v1/chat/completions": _generation("chat", "Answer a conversation", "ChatBody"),
        "/v1/models": _get("models", "The served models", _responses(_MODELS)),
        "/v1/models/{id}": one,
        "/health": _get("health", "Whether requests would be served", ready),
        "/health/ready": _get("ready", "The same", ready),
        "/health/live": _get("live", "Whether the process answers", _responses(_STATUS)),
        "/metrics": _get("metrics", "For Prometheus", text),
    }
