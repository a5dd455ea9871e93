"""The data port's OpenAPI document. The raw routes are described loosely: their bodies are the engines' own."""

from typing import Any

from fastapi import FastAPI

from core.chat import CLASSES, Endpoint

_SUMMARIES = {
    Endpoint.CHAT: "Create a chat completion",
    Endpoint.COMPLETIONS: "Create a completion",
    Endpoint.EMBEDDINGS: "Create embeddings",
    Endpoint.RESPONSES: "Create a response (engines that serve it; with `background`, any)",
    Endpoint.MESSAGES: "Create a message, Anthropic's form (engines that serve it)",
}
_OWN: dict[str, Any] = {
    "type": "object",
    "description": "Forebay's own options; removed before the engine sees the request. Unknown keys are refused.",
    "additionalProperties": False,
    "properties": {
        "end_user": {"type": "string", "maxLength": 128},
        "session": {"type": "string", "maxLength": 128},
        "program": {"type": "string", "maxLength": 128},
        "run": {"type": "string", "maxLength": 128},
        "stage": {"type": "string", "maxLength": 128},
        "class": {"type": "string", "enum": list(CLASSES)},
        "objective": {"type": "string", "enum": ["latency", "throughput"]},
        "deadline_ms": {"type": "number", "exclusiveMinimum": 0, "description": "from its arrival"},
        "fallbacks": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
        "timeouts": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                name: {"type": "number", "exclusiveMinimum": 0, "description": "seconds"}
                for name in ("connect", "queue", "first_token", "idle", "total")
            },
        },
    },
}
_TWINS = ("end_user", "session", "program", "run", "stage", "class", "objective", "deadline_ms")
_HEADERS = [
    {
        "name": f"x-forebay-{name.replace('_', '-')}",
        "in": "header",
        "required": False,
        "description": f"As `forebay.{name}`, which wins.",
        "schema": _OWN["properties"][name],
    }
    for name in _TWINS
]
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


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the document of the app's own routes with the raw ones added."""
    document = FastAPI.openapi(app)
    for endpoint, summary in _SUMMARIES.items():
        document["paths"][endpoint.value] = {"post": _operation(endpoint, summary)}
    schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
    schemes["key"] = {"type": "http", "scheme": "bearer"}
    return document


def _operation(endpoint: Endpoint, summary: str) -> dict[str, Any]:
    body = {
        "type": "object",
        "required": ["model"],
        "additionalProperties": True,
        "properties": {"model": {"type": "string"}, "stream": {"type": "boolean"}, "forebay": _OWN},
    }
    error = {"description": "Error", "content": {"application/json": {"schema": _ERROR}}}
    return {
        "summary": summary,
        "operationId": endpoint.name.lower(),
        "security": [{"key": []}],
        "parameters": _HEADERS,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": {
                "description": "The engine's answer: one JSON object, or server-sent events if `stream` is true.",
                "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
            },
            **{str(status): error for status in (400, 401, 403, 404, 413, 429, 500, 502, 503, 504)},
        },
    }
