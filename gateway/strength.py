"""Whether a secret is one that somebody could guess."""

MIN_LENGTH = 20
_MIN_VARIETY = 8


def weakness_of(secret: str) -> str | None:
    """Return what makes the secret too weak for a key, as the end of a sentence; None if nothing does."""
    if len(secret) < MIN_LENGTH:
        return f"is shorter than {MIN_LENGTH} characters"
    if len(set(secret)) < _MIN_VARIETY:
        return f"has fewer than {_MIN_VARIETY} different characters"
    return None
