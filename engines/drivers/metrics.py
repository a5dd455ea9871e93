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


def labelled(text: str, name: str, *labels: str) -> float | None:
    """Return the product of labels that are numbers, summed over a metric's label sets; None if one is missing.

    For metrics that say what they have to say in their labels, as vLLM's ``*_info`` do.
    """
    total: float | None = None
    for line in text.splitlines():
        if not line.startswith(name + "{"):
            continue
        values = [_label(line, label) for label in labels]
        if any(value is None for value in values):
            return None
        total = (total or 0.0) + math.prod(value for value in values if value is not None)
    return total


def _label(line: str, label: str) -> float | None:
    found = re.search(rf'[{{,]{label}="([^"]*)"', line)
    return _number(found[1]) if found is not None else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
