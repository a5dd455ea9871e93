"""What is said of settings that cannot be used."""

import difflib
from collections.abc import Iterable


class SettingsError(Exception):
    """The settings cannot be used; the message lists every fault with its place and what would be right."""


def hint(name: str, known: Iterable[str]) -> str:
    """Return an ending for a message about an unknown name: the one that was meant, or all there are."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean `{near[0]}`?"
    return f"; known here: {', '.join(names)}" if names else ""
