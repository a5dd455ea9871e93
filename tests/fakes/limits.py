"""Claims, written as a test thinks of them: meters, each with an amount."""

from routing.limits import Claim, Meter

Want = tuple[Meter, int]


def claim(*wants: Want) -> Claim:
    """All of these amounts, each of its meter."""
    return Claim(tuple(meter for meter, _ in wants), tuple(amount for _, amount in wants))
