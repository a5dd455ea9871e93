"""The folder outside the checkout where compiled tools, rivals' environments and scratch of runs live."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Missing(RuntimeError):
    """Something that a measurement needs is not on this machine; the message says what, and what would bring it."""


def folder(*parts: str) -> Path:
    """A folder below the benchmarks' cache, made if it is not there."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(base, "forebay", "bench", *parts)
    path.mkdir(parents=True, exist_ok=True)
    return path
