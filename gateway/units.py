"""Durations and sizes as people write them in a settings file."""

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_COUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def _scaled(value: object, units: dict[str, float], example: str) -> object:
    if not isinstance(value, str):
        return value
    match = _QUANTITY.fullmatch(value)
    if match is None or match[2] not in units:
        raise ValueError(f"{value!r} is not a quantity such as {example}; units are {', '.join(filter(None, units))}")
    return float(match[1]) * units[match[2]]


def seconds(value: object) -> object:
    """Return seconds for text such as ``500ms`` or ``2m``; a number is taken as seconds."""
    return _scaled(value, _SECONDS, "'30s' or '500ms'")


def num_bytes(value: object) -> object:
    """Return bytes for text such as ``32MiB``; a number is taken as bytes."""
    scaled = _scaled(value, {unit: float(factor) for unit, factor in _BYTES.items()}, "'32MiB'")
    return int(scaled) if isinstance(scaled, float) else scaled


def count(value: object) -> object:
    """Return a number for text such as ``200k``."""
    scaled = _scaled(value, _COUNTS, "'200k' or '1M'")
    return int(scaled) if isinstance(scaled, float) and isinstance(value, str) else scaled


_WRITTEN = WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}]})

Seconds = Annotated[float, BeforeValidator(seconds), Field(gt=0), _WRITTEN]
Bytes = Annotated[int, BeforeValidator(num_bytes), Field(gt=0), _WRITTEN]
_OR_ZERO = WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}]})
SecondsOrZero = Annotated[float, BeforeValidator(seconds), Field(ge=0), _OR_ZERO]
CountOrZero = Annotated[int, BeforeValidator(count), Field(ge=0), _OR_ZERO]
Count = Annotated[int, BeforeValidator(count), Field(gt=0), _WRITTEN]
