"""Smallest values that fit a JSON schema, for structured output and tool arguments."""

from collections.abc import Iterator
from typing import Any

_MAX_DEPTH = 16


def instance(schema: Any, words: Iterator[str]) -> Any:
    """Return a small value valid under a simple schema; its strings are the next `words`.

    Knows const, enum, $ref into the schema, anyOf/oneOf/allOf, and types with their lengths and bounds.
    """
    return _Filler(schema, words).value(schema, 0)


class _Filler:
    def __init__(self, root: Any, words: Iterator[str]) -> None:
        self._root = root
        self._words = words

    def value(self, schema: Any, depth: int) -> Any:
        if not isinstance(schema, dict) or depth > _MAX_DEPTH:
            return None
        schema = self._resolved(schema)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return schema["enum"][0]
        for union in ("anyOf", "oneOf"):
            if schema.get(union):
                return self.value(schema[union][0], depth + 1)
        return self._typed(schema, depth)

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/"):
            target = self._root
            for key in reference[2:].split("/"):
                target = target.get(key, {})
            schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
        merged = dict(schema)
        for part in schema.get("allOf", ()):
            merged |= self._resolved(part)
        return merged

    def _typed(self, schema: dict[str, Any], depth: int) -> Any:
        kind = schema.get("type", "object" if "properties" in schema else "string")
        if isinstance(kind, list):
            kind = kind[0]
        if kind == "object":
            properties = schema.get("properties", {})
            required = schema.get("required", list(properties))
            return {name: self.value(properties.get(name, {}), depth + 1) for name in required}
        if kind == "array":
            return [self.value(schema.get("items", {}), depth + 1) for _ in range(schema.get("minItems", 0))]
        if kind in ("integer", "number"):
            return _number(schema)
        if kind == "boolean":
            return True
        return None if kind == "null" else self._string(schema)

    def _string(self, schema: dict[str, Any]) -> str:
        text = next(self._words)
        while len(text) < schema.get("minLength", 0):
            text += " " + next(self._words)
        return text[: max(schema.get("maxLength", len(text)), 0)]


def _number(schema: dict[str, Any]) -> int | float:
    if "exclusiveMinimum" in schema:
        low: int | float = schema["exclusiveMinimum"] + 1
    else:
        low = schema.get("minimum", 0)
    return min(low, schema["maximum"]) if "maximum" in schema else low
