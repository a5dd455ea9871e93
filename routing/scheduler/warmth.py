"""Which beginnings of prompts a worker's prefix cache probably holds: those of what it ran last (Parrot, section 5.3).

Nothing is asked of the engine. A *root* is the shortest beginning of a prompt, and what was run under it is kept with
it: siblings share a root, and those roots are forgotten first that were used longest ago, when there are more of them
than the engine's caches keep apart, or have memory for.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence

from core.chat import Prefix

_BRANCHES = 64  # beginnings that are kept of one root


class Warmth:
    """The roots of one worker, and the beginnings under each. Both operations cost O(prefixes of the prompt)."""

    def __init__(self) -> None:
        self._roots: OrderedDict[int, OrderedDict[int, int]] = OrderedDict()
        self._longest: dict[int, int] = {}
        self._num_tokens = 0

    def note(self, prefixes: Sequence[Prefix], *, most_roots: int, most_tokens: int | None) -> None:
        """A prompt that begins like this is run. ``most_tokens``: what the engine's cache holds, if that is known, and
        then as many roots as it has room for; else ``most_roots``."""
        if not prefixes:
            return
        root = prefixes[0].digest
        branches = self._roots.pop(root, None) or OrderedDict()
        self._roots[root] = branches
        for prefix in prefixes:
            branches.pop(prefix.digest, None)
            branches[prefix.digest] = prefix.tokens
        while len(branches) > _BRANCHES:
            branches.popitem(last=False)
        longest = max(self._longest.get(root, 0), prefixes[-1].tokens)
        self._num_tokens += longest - self._longest.get(root, 0)
        self._longest[root] = longest
        while len(self._roots) > 1 and self._is_over(most_roots, most_tokens):
            oldest, _ = self._roots.popitem(last=False)
            self._num_tokens -= self._longest.pop(oldest)

    def _is_over(self, most_roots: int, most_tokens: int | None) -> bool:
        return len(self._roots) > most_roots if most_tokens is None else self._num_tokens > most_tokens

    def saved(self, prefixes: Sequence[Prefix]) -> int:
        """Return about how many tokens of a prompt that begins like this need not be computed."""
        branches = self._roots.get(prefixes[0].digest) if prefixes else None
        if branches is None:
            return 0
        return next((prefix.tokens for prefix in reversed(prefixes) if prefix.digest in branches), 0)

    def holds(self, prefixes: Sequence[Prefix], prefix: Prefix) -> bool:
        """Return whether it holds this one of the prompt's beginnings."""
        return prefix.digest in self._roots.get(prefixes[0].digest, ())

    def lose(self, prefixes: Sequence[Prefix], digests: Collection[int]) -> None:
        """These of the prompt's beginnings were not computed after all."""
        root = prefixes[0].digest if prefixes else 0
        if (branches := self._roots.get(root)) is None:
            return
        for digest in digests:
            branches.pop(digest, None)
        if not branches:
            del self._roots[root]
            self._num_tokens -= self._longest.pop(root)

    def clear(self) -> None:
        """The engine has started anew, with an empty cache."""
        self._roots.clear()
        self._longest.clear()
        self._num_tokens = 0
