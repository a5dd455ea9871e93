"""Reading engines' Prometheus text, as far as load needs it."""

import math
import re

_SAMPLE = re.compile(r"(?P<name>[A-Za-z_:][\w:]*)(?:\{.*\})? +(?P<value>\S+)(?: +-?\d+)?\s*", re.ASCII)


def gauge(text: str, name: str) -> float | None:
    """Return the sum of a metric over its label sets; None if it does not occur, or not as a finite number."""
    total: float | None = None
    for line in text.splitlines():
        if not line.startswith(name):
            continue
        sample = _SAMPLE.fullmatch(line)
        if sample is not None and sample["name"] == name and (value := _number(sample["value"])) is not None:
            total = (total or 0.0) + value
    return total


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
