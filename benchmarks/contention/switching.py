"""What it costs llama.cpp to put a request away and to take it up again: three ways, by the length of what it holds.

Asked of the engine alone. ``recompute``: the connection is closed, and the whole text is processed again.
``slot_file``: its cache is saved to a file after the cut and read back before the next leg. ``bounded``: the leg ends
by itself (``max_tokens``) and the next finds its cache where it was, which holds only while nobody else had the slot.
"""

import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from benchmarks.contention.llamacpp import LlamaCpp, llamacpp, pin
from engines.drivers.llamacpp_server import slot_files

LENGTHS = (128, 256, 512, 768)
_FIRST, _STRANGER = 1000, 3000  # token ids that texts begin with; any will do
_AFTER = 4  # tokens made before a cut


class Switch(msgspec.Struct, frozen=True):
    """Milliseconds, medians over repetitions, to the first token of the leg that follows a cut.

    ``abort``: from the closed connection to the idle slot, which each but ``bounded`` pays besides. ``kept``: the share
    of its cache that the slot still had right after the abort.
    """

    tokens: int
    abort: float
    recompute: float
    slot_file: float
    bounded: float
    kept: float
    file_mb: float


async def switches(lengths: Sequence[int], repeats: int, core: int) -> list[Switch]:
    """Measure every length on an engine of one slot that has a core to itself."""
    measured = []
    async with llamacpp(slots=1, context=1024) as engine, aiohttp.ClientSession() as http:
        pin([engine.pid], core)
        slot = _Slot(engine, http)
        await slot.first(_ids(64, _STRANGER))  # the first request of all is slower
        for length in lengths:
            rows = [await _once(slot, length, number) for number in range(repeats)]
            middle = [statistics.median(column) for column in zip(*rows, strict=True)]
            measured.append(Switch(length, *middle))
    return measured


async def _once(slot: "_Slot", length: int, number: int) -> tuple[float, ...]:
    ids = _ids(length, _FIRST + 17 * number + length)
    abort = await slot.cut(ids)
    _, kept = await slot.first(ids)
    await slot.forget()
    recompute, _ = await slot.first(ids)

    began = time.monotonic()
    size = (await slot.file("save"))["n_written"]
    saved = time.monotonic() - began
    await slot.forget()
    began = time.monotonic()
    await slot.file("restore")
    restored = time.monotonic() - began
    first, _ = await slot.first(ids)
    in_all = saved + restored + first

    await slot.forget()
    ended = await slot.leg(ids)
    bounded, _ = await slot.first(ended)
    return (1000 * abort, 1000 * recompute, 1000 * in_all, 1000 * bounded, kept / length, size / 1e6)


def _ids(length: int, first: int) -> list[int]:
    """Return a text of its own: plain words' ids, in an order that no other has."""
    return [first + (index * (first % 7 + 1)) % 500 for index in range(length)]


class _Slot:
    """The engine's only slot."""

    def __init__(self, engine: LlamaCpp, http: aiohttp.ClientSession) -> None:
        self._engine = engine
        self._http = http

    async def first(self, ids: list[int]) -> tuple[float, int]:
        """Return the seconds to one more token, and how many were still cached."""
        began = time.monotonic()
        answer = await self._complete(ids, 1)
        return time.monotonic() - began, int(answer["timings"]["cache_n"])

    async def leg(self, ids: list[int]) -> list[int]:
        """Run a leg that ends by itself; return its text."""
        return ids + list((await self._complete(ids, _AFTER, return_tokens=True))["tokens"])

    async def forget(self) -> None:
        """Have the slot serve somebody else, as it does between a cut and the next leg."""
        await self.first(_ids(48, _STRANGER))

    async def file(self, action: str) -> dict[str, int]:
        """Save the slot to its file, or read it back."""
        path, body = f"/slots/0?action={action}", {"filename": slot_files(1)[0]}
        told: dict[str, int] = await self._engine.ask(self._http, path, body)
        return told

    async def cut(self, ids: list[int]) -> float:
        """Close the connection in the middle of an answer; return the seconds until the slot is idle."""
        async with self._streamed(ids) as stream:
            for _ in range(_AFTER):
                await anext(stream)
        began = time.monotonic()
        while any(slot["is_processing"] for slot in await self._engine.ask(self._http, "/slots")):
            pass
        return time.monotonic() - began

    async def _complete(self, ids: list[int], num: int, **more: object) -> dict[str, Any]:
        body = {"prompt": ids, "n_predict": num, "id_slot": 0, "cache_prompt": True, "temperature": 0, **more}
        answer: dict[str, Any] = await self._engine.ask(self._http, "/completion", body)
        return answer

    @asynccontextmanager
    async def _streamed(self, ids: list[int]) -> AsyncIterator[AsyncIterator[bytes]]:
        body = {"prompt": ids, "n_predict": 500, "id_slot": 0, "stream": True, "temperature": 0, "ignore_eos": True}
        headers = {"authorization": f"Bearer {self._engine.key}"}
        async with self._http.post(self._engine.url + "/completion", json=body, headers=headers) as answer:

            async def events() -> AsyncIterator[bytes]:
                async for line in answer.content:
                    if line.startswith(b"data: "):
                        yield line

            yield events()
            answer.close()
