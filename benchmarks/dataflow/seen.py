"""What one cell came to, as it is kept in files."""

import hashlib
from typing import Any

import msgspec


class Done(msgspec.Struct):
    """What became of one application; times are seconds from the start. ``text``: a digest of its output."""

    app: str
    began: float
    ended: float | None = None
    text: str = ""
    problem: str = ""

    @property
    def took(self) -> float:
        """Seconds from its beginning to its end; of one that has none, without end."""
        return self.ended - self.began if self.ended is not None else float("inf")


class Said(msgspec.Struct):
    """What became of one chat: when its first and its last token came."""

    asked: float
    first: float | None = None
    ended: float | None = None
    problem: str = ""


class Seen(msgspec.Struct):
    """One cell. ``computed``: prompt tokens that the engines computed, None where they do not tell; ``told``: whatever
    else the client told, for the raw figures."""

    apps: list[Done]
    chats: list[Said] = []
    computed: float | None = None
    told: dict[str, Any] = {}

    @property
    def problems(self) -> list[str]:
        """What went wrong, in words."""
        wrong = [f"{one.app}: {one.problem}" for one in self.apps if one.problem]
        return wrong + [f"chat: {one.problem}" for one in self.chats if one.problem]

    @property
    def jct(self) -> float:
        """The applications' mean time from beginning to end, in seconds."""
        return sum(one.took for one in self.apps) / len(self.apps)

    @property
    def makespan(self) -> float:
        """Seconds from the first beginning to the last end."""
        ends = [one.ended for one in self.apps if one.ended is not None]
        return max(ends, default=float("inf")) - min(one.began for one in self.apps)


def digest(text: str) -> str:
    """Return what a text is known by afterwards."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
