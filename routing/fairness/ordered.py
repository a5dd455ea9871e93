"""The first of many by a key that mostly grows."""

import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Key = tuple[float, int]
Item = TypeVar("Item")


class Ordered(Generic[Item]):
    """Items in the order of their keys; equal ones in the order in which they came.

    An item's key is asked again when it comes to the top: one that has grown costs nothing before that. One that has
    become smaller must be ``put`` again. All operations cost O(log n), ``first`` amortised.
    """

    def __init__(self, key: Callable[[Item], Key]) -> None:
        self._key = key
        self._heap: list[tuple[Key, int, Item]] = []
        self._entries: dict[Item, tuple[Key, int]] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: Item) -> bool:
        return item in self._entries

    def __iter__(self) -> Iterator[Item]:
        return iter(self._entries)

    def put(self, item: Item) -> None:
        """Add the item, or tell that its key has changed."""
        key = self._key(item)
        entry = self._entries.get(item)
        if entry is None or key < entry[0]:
            self._push(key, next(self._numbers), item)

    def discard(self, item: Item) -> None:
        """Take the item out, if it is there."""
        if self._entries.pop(item, None) is not None and len(self._heap) > 2 * len(self._entries) + 16:
            self._heap = [(key, number, item) for item, (key, number) in self._entries.items()]
            heapq.heapify(self._heap)

    def first(self) -> Item | None:
        """Return the item with the smallest key, or None if there is none."""
        heap, entries = self._heap, self._entries
        while heap:
            key, number, item = heap[0]
            if entries.get(item) != (key, number):
                heapq.heappop(heap)
                continue
            now = self._key(item)
            if now <= key:
                return item
            entries[item] = (now, number)
            heapq.heapreplace(heap, (now, number, item))
        return None

    def _push(self, key: Key, number: int, item: Item) -> None:
        self._entries[item] = (key, number)
        heapq.heappush(self._heap, (key, number, item))
