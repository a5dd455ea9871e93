"""Sends one answer at its pace, with the faults of its request."""

import asyncio
import os
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from engines.fake_server.answers import Job
from engines.fake_server.faults import Faults
from engines.fake_server.traffic import Served, Traffic
from engines.fake_server.wire import Wire

_DIED = 70
_YIELD_EVERY = 16
_FAULT_MESSAGE = "the engine failed, as it was told to"


class _CutError(Exception):
    """The connection was closed on purpose."""


class _FailedError(Exception):
    """An error was written in place of the rest."""


@dataclass(frozen=True, slots=True)
class Pace:
    """When tokens are ready: the first after `ttft_s`, each later one after `itl_s` more."""

    ttft_s: float
    itl_s: float


def refusal(faults: Faults, wire: Wire) -> web.Response | None:
    """Return the refusal that the faults ask for, if they do."""
    if faults.refuse_status is None:
        return None
    headers = {} if faults.retry_after is None else {"Retry-After": f"{faults.retry_after:g}"}
    body = wire.error_body(faults.refuse_status, _FAULT_MESSAGE, None, None)
    return json_response(body, faults.refuse_status, headers)


def json_response(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Return a JSON answer."""
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


async def before_headers(request: web.Request, faults: Faults) -> web.Response | None:
    """Apply the faults that strike before any byte; a returned response goes nowhere, the connection is closed."""
    if faults.silent:
        await _forever()
    if faults.die_after == 0:
        os._exit(_DIED)
    if faults.cut_after == 0:
        _close(request)
        return web.Response()
    return None


async def _forever() -> None:
    """Return never: the client goes away, and with it this task."""
    await asyncio.get_running_loop().create_future()


def _close(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.close()


async def send_whole(request: web.Request, wire: Wire, job: Job, pace: Pace, faults: Faults) -> web.StreamResponse:
    """Send a plain answer when its last token is ready."""
    await asyncio.sleep(pace.ttft_s + pace.itl_s * max(job.steps - 1, 0) + (faults.trickle_ms or 0.0) / 1e3)
    body = wire.body(job)
    if faults.stall_after is not None:
        await _forever()
    if faults.error_first or faults.error_after is not None:
        return json_response(wire.error_body(500, _FAULT_MESSAGE, None, None))
    if faults.malformed_after is not None:
        return json_response(body[: len(body) // 2])
    if faults.cut_after is None and faults.die_after is None:
        return json_response(body)
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(body))})
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    if faults.die_after is not None:
        os._exit(_DIED)
    _close(request)
    return response


class StreamSender:
    """Sends one stream; its caller owns the task it runs in."""

    def __init__(self, request: web.Request, wire: Wire, faults: Faults, served: Served) -> None:
        self._request = request
        self._wire = wire
        self._faults = faults
        self._served = served
        self._clock = asyncio.get_running_loop().time
        self._response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        )

    async def send(self, job: Job, pace: Pace, traffic: Traffic) -> web.StreamResponse:
        """Send headers at once, as vLLM does, then wait for a slot, then the frames."""
        await self._response.prepare(self._request)
        try:
            async with traffic.slot():
                await self._frames(job, pace, traffic)
        except (_CutError, _FailedError):
            pass
        return self._response

    async def _frames(self, job: Job, pace: Pace, traffic: Traffic) -> None:
        start = self._clock() + pace.ttft_s
        made = -1
        for step, frame in self._wire.frames(job):
            await self._until(start + step * pace.itl_s)
            if step != made:
                made = step
                traffic.generated_tokens += len(job.choices)
            await self._put(frame)
        await self._strike()
        if self._wire.done and not self._faults.no_done:
            await self._response.write(self._wire.done)
            if self._faults.duplicate_done:
                await self._response.write(self._wire.done)

    async def _put(self, frame: bytes) -> None:
        await self._strike()
        if self._faults.trickle_ms is not None:
            await self._until(self._clock() + self._faults.trickle_ms / 1e3)
        if self._served.frames == self._faults.malformed_after:
            frame = frame.rstrip()[: len(frame) // 2] + b"\n\n"
        await self._response.write(frame)
        self._served.frames += 1
        if self._served.frames % _YIELD_EVERY == 0:
            # A stream without delays would keep the loop from noticing that its client has gone.
            await asyncio.sleep(0)

    async def _strike(self) -> None:
        """Apply the fault that is due after the frames sent so far."""
        faults = self._faults
        sent = self._served.frames
        if sent == faults.die_after:
            os._exit(_DIED)
        if sent == faults.cut_after:
            _close(self._request)
            raise _CutError
        if sent == faults.error_after or (faults.error_first and sent == 0):
            await self._response.write(self._wire.error_frame(_FAULT_MESSAGE))
            if self._wire.done and not faults.no_done:
                await self._response.write(self._wire.done)
            raise _FailedError
        if sent == faults.stall_after:
            await self._until(None)

    async def _until(self, when: float | None) -> None:
        """Wait until `when`, or without end, pinging the client meanwhile if asked to."""
        beat = self._faults.ping_ms
        while when is None or when > self._clock():
            rest = 3600.0 if when is None else when - self._clock()
            if beat is None or rest <= beat / 1e3:
                await asyncio.sleep(rest)
                continue
            await asyncio.sleep(beat / 1e3)
            await self._response.write(b": ping\n\n")


def error_response(wire: Wire, error: Any) -> web.Response:
    """Return a BadRequestError on the wire."""
    return json_response(wire.error_body(error.status, str(error), error.code, error.param), error.status)
