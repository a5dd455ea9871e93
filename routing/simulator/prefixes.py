"""The KV cache of one modelled worker: blocks that legs hold, and blocks that nobody holds, longest unused first out.

As vLLM's prefix cache does it: what a leg leaves behind stays until its memory is wanted, the end of a prompt goes
before its beginning. So what a resumed request computes again follows from what happened meanwhile, and is no set rate.
"""

from collections import OrderedDict
from collections.abc import Sequence

Key = tuple[int, ...]
"""Names a block by what it holds; equal keys, equal content."""

Block = tuple[Key, int]
"""A block's key and its number of tokens."""


class PrefixCache:
    """Blocks by key. ``num_tokens`` counts all, ``num_idle`` those that nobody holds; an operation costs its number of
    blocks."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_idle = 0
        self._held: dict[Key, list[int]] = {}  # tokens, number of holders
        self._idle: OrderedDict[Key, int] = OrderedDict()

    def hold_prefix(self, blocks: Sequence[Block]) -> tuple[int, int]:
        """Hold the longest leading run of blocks that is here; return the numbers of blocks and of tokens."""
        num = tokens = 0
        for key, size in blocks:
            if (held := self._held.get(key)) is not None:
                held[1] += 1
            elif (idle := self._idle.pop(key, None)) is not None:
                self._held[key] = [idle, 1]
                self.num_idle -= idle
            else:
                break
            num += 1
            tokens += size
        return num, tokens

    def add(self, blocks: Sequence[Block]) -> None:
        """Hold these blocks, whose tokens have just been computed; one that is here already is kept once."""
        for key, size in blocks:
            if (held := self._held.get(key)) is not None:
                held[1] += 1
                continue
            if self._idle.pop(key, None) is None:
                self.num_tokens += size
            else:
                self.num_idle -= size
            self._held[key] = [size, 1]

    def release(self, blocks: Sequence[Block]) -> None:
        """Let go of blocks held before; they stay until their memory is wanted, the last the shortest."""
        for key, _ in reversed(blocks):
            held = self._held[key]
            held[1] -= 1
            if not held[1]:
                self._idle[key] = held[0]
                self.num_idle += held[0]
                del self._held[key]

    def take(self, block: Block) -> None:
        """Take a block out that only the caller holds."""
        del self._held[block[0]]
        self.num_tokens -= block[1]

    def evict(self, num_tokens: int) -> int:
        """Forget blocks that nobody holds until so many tokens are free, or none is left; return the tokens freed."""
        freed = 0
        while freed < num_tokens and self._idle:
            _, size = self._idle.popitem(last=False)
            freed += size
        self.num_tokens -= freed
        self.num_idle -= freed
        return freed

    def clear(self) -> None:
        """Forget all, as a new process does."""
        self.num_tokens = self.num_idle = 0
        self._held.clear()
        self._idle.clear()
