"""Reading engines' Prometheus text, as far as load needs it."""


def gauge(text: str, name: str) -> float | None:
    """Return the sum of a metric over its label sets; None if it does not occur."""
    total: float | None = None
    for line in text.splitlines():
        if line.startswith(name) and line[len(name) : len(name) + 1] in {"{", " "}:
            total = (total or 0.0) + float(line.rsplit(" ", 1)[1])
    return total
