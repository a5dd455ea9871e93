"""The admin port's OpenAPI document: exact about every status, and free of what the framework makes up."""

from typing import Any

from fastapi import FastAPI

_ERRORS = {
    400: "Something in the request is wrong; the message says what.",
    401: "No key, or none that is known.",
    403: "The key's role does not cover this, or the request's `Host` or `Origin` is not this port's.",
    404: "There is no such thing.",
    409: "The change does not fit what is there.",
    412: "It has been changed since it was read.",
    413: "The body is too large.",
    428: "`If-Match` is missing.",
    503: "The database cannot be reached, or the server is shutting down.",
}
_OF_EVERY_ROUTE = (400, 401, 403, 503)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what a route's document says of these statuses and of those that every route may answer with."""
    return {status: {"description": _ERRORS[status]} for status in sorted({*_OF_EVERY_ROUTE, *statuses})}


def tagged(status: int) -> dict[int | str, dict[str, Any]]:
    """Return what a route's document says of an answer that carries the `ETag` of what it shows."""
    header = {"description": "Names this state of it.", "schema": {"type": "string"}}
    return {status: {"headers": {"ETag": header}}}


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the document."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for path in document["paths"].values():
            for operation in path.values():
                _correct(operation)
        components = document["components"]
        for name in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(name, None)
        components["schemas"]["Error"] = _ERROR
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = document
    return app.openapi_schema


def _correct(operation: dict[str, Any]) -> None:
    """Leave the framework's 422 out, which is never sent, and give every error our envelope."""
    responses = operation["responses"]
    responses.pop("422", None)
    responses.setdefault("403", {"description": _ERRORS[403]})
    if "requestBody" in operation:
        responses.setdefault("413", {"description": _ERRORS[413]})
    for status, response in responses.items():
        if int(status) >= 400 and "content" not in response:
            response["content"] = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}


_ERROR = {
    "title": "Error",
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
        }
    },
}
