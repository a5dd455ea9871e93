"""Stop strings that lie across two legs: one has begun in what the first leg's engine made and held back."""

from collections.abc import Sequence


class Seam:
    """Text that was made and not delivered, and then what the next leg adds.

    An engine looks for stop strings in what it makes itself. Those that begin in ``held`` are found here, and text is
    given back once it can belong to none of them.
    """

    def __init__(self, held: str, stops: Sequence[str]) -> None:
        self._text = held
        self._num_held = len(held)
        self._stops = [stop for stop in stops if stop]

    def add(self, text: str) -> tuple[str, str | None]:
        """Return what can be delivered now, and the stop string that ends the answer behind it, if one does."""
        if not self._num_held:
            return text, None
        self._text += text
        found = [(at, stop) for stop in self._stops if 0 <= (at := self._text.find(stop)) < self._num_held]
        if found:
            at, stop = min(found)
            return self._text[:at], stop
        end = next((at for at in range(self._num_held) if self._may_begin(at)), len(self._text))
        given, self._text = self._text[:end], self._text[end:]
        self._num_held = max(0, self._num_held - end)
        return given, None

    def _may_begin(self, at: int) -> bool:
        rest = self._text[at:]
        return any(stop.startswith(rest) for stop in self._stops)

    def close(self) -> str:
        """Return the rest: the answer is over, and no stop string has come of it."""
        rest, self._text, self._num_held = self._text, "", 0
        return rest
