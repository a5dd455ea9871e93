"""What this engine is doing and has done: running slots, counters, the last requests, the prefix cache."""

import asyncio
import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web

_KEPT_REQUESTS = 64
_BLOCK = 16
_CACHED_BLOCKS = 65536


class Served:
    """One request as /fake/stats shows it."""

    __slots__ = ("_request", "body", "frames", "state")

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.body = b""
        self.frames = 0
        self.state = "in_flight"

    def report(self) -> dict[str, Any]:
        """Return endpoint, lower-case headers, decoded body, frames sent and how it stands."""
        try:
            body = msgspec.json.decode(self.body)
        except msgspec.DecodeError:
            body = self.body.decode("utf-8", "replace")
        headers = {name.lower(): value for name, value in self._request.headers.items()}
        return {
            "endpoint": self._request.path,
            "headers": headers,
            "body": body,
            "frames": self.frames,
            "state": self.state,
        }


class Traffic:
    """Counts requests; at every moment started == in_flight + finished + aborted."""

    def __init__(self, slots: int | None) -> None:
        self._slots = slots
        self._free = asyncio.Semaphore(slots) if slots is not None else None
        self.running = 0
        self.waiting = 0
        self.in_flight = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.reset()

    def reset(self) -> None:
        """Forget the past; requests in flight stay counted."""
        self.started = self.in_flight
        self.finished = 0
        self.aborted = 0
        self.max_in_flight = self.in_flight
        self._recent: deque[Served] = deque(maxlen=_KEPT_REQUESTS)

    def begin(self, request: web.Request) -> Served:
        """Count a request in."""
        served = Served(request)
        self.started += 1
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        self._recent.append(served)
        return served

    def finish(self, served: Served) -> None:
        """Count out a request that this engine ended."""
        served.state = "finished"
        self.in_flight -= 1
        self.finished += 1

    def abort(self, served: Served) -> None:
        """Count out a request that its client gave up."""
        served.state = "aborted"
        self.in_flight -= 1
        self.aborted += 1

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold one of the running slots, after waiting for it in order of arrival."""
        if self._free is not None:
            self.waiting += 1
            try:
                await self._free.acquire()
            finally:
                self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            if self._free is not None:
                self._free.release()

    def report(self) -> dict[str, Any]:
        """Return all counters and the last requests, oldest first."""
        return {
            "in_flight": self.in_flight,
            "running": self.running,
            "waiting": self.waiting,
            "started": self.started,
            "finished": self.finished,
            "aborted": self.aborted,
            "max_in_flight": self.max_in_flight,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "requests": [served.report() for served in self._recent],
        }

    def metrics(self, model: str) -> str:
        """Return the Prometheus text with vLLM's names."""
        labels = f'{{engine="0",model_name="{model}"}}'
        usage = min(self.running / (self._slots or 256), 1.0)
        rows = (
            ("num_requests_running", "gauge", float(self.running)),
            ("num_requests_waiting", "gauge", float(self.waiting)),
            ("kv_cache_usage_perc", "gauge", usage),
            ("prompt_tokens_total", "counter", float(self.prompt_tokens)),
            ("generation_tokens_total", "counter", float(self.generated_tokens)),
        )
        return "".join(
            f"# HELP vllm:{name} {name}\n# TYPE vllm:{name} {kind}\nvllm:{name}{labels} {value}\n"
            for name, kind, value in rows
        )


class PrefixCache:
    """Remembers which blocks of 16 tokens were seen behind which prefix, the least used forgotten first."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()

    def admit(self, ids: Sequence[int], salt: str) -> int:
        """Remember `ids` and return how many of their first tokens were known; never all of them."""
        state = hashlib.blake2b(salt.encode(), digest_size=16)
        octets = memoryview(array("I", ids).tobytes())
        width = _BLOCK * 4
        known = 0
        all_known = True
        for start in range(0, len(octets) - width + 1, width):
            state.update(octets[start : start + width])
            key = state.digest()
            all_known = all_known and key in self._blocks
            if all_known:
                known += _BLOCK
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > _CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        # An engine computes at least the last token anew, to have its logits.
        return min(known, (len(ids) - 1) // _BLOCK * _BLOCK) if ids else 0
