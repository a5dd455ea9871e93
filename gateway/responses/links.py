"""What a response has come to, set in the runs of those that refer to it: by its own events, not by asking again.

A link is not kept: it is in the graph of the run that waits, as an open variable of the response's id. So it is made
again for every run that a gateway goes on with.
"""

import asyncio

import structlog

from core.errors import Conflict, DatabaseUnavailable, InvalidRequest, Unavailable, UnknownId
from core.ids import TenantId
from core.tenancy import Key, Tenant
from gateway.auth import Principal
from gateway.responses.background import Background, background_of
from gateway.responses.ids import run_of
from gateway.runs.service import Runs
from semantic_vars.events import Put
from semantic_vars.variable import Outcome, State

_log = structlog.get_logger(__name__)

_RETRY_S = 0.5  # a database that is away, or a run that another gateway has

_Source = tuple[TenantId, str]
"""A response that is waited for, and the tenant of who waits: for another tenant it does not exist."""


class Links:
    """The links of the runs that are alive here. There is one task for each response that is waited for."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._waiting: dict[_Source, set[str]] = {}
        self._tasks: dict[_Source, asyncio.Task[None]] = {}

    def take(self, background: Background) -> None:
        """Link a response with those that it waits for; again is as well as once."""
        for response in background.waits_for:
            source = background.record.tenant, response
            self._waiting.setdefault(source, set()).add(background.record.id)
            if source not in self._tasks:
                self._tasks[source] = asyncio.create_task(self._carry(source), name="response_link")

    async def aclose(self) -> None:
        """Let go of all links."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry(self, source: _Source) -> None:
        """Wait for a response's end, and tell those who wait for it."""
        owner = _owner(source[0])
        try:
            put = _put_of(source[1], await self._outcome(owner, source[1]))
            while waiting := self._waiting[source]:
                await self._put(owner, waiting.pop(), put)
        except Exception:  # noqa: BLE001 - nobody waits for this task
            _log.exception("response_link_failed", response=source[1])
        finally:
            del self._tasks[source], self._waiting[source]

    async def _outcome(self, owner: Principal, response: str) -> Outcome | None:
        """Return what a response has come to; None where there is none of this id."""
        while True:
            try:
                background = background_of(await self._runs.find(owner, run_of(response)))
            except UnknownId:
                return None
            except DatabaseUnavailable:
                await asyncio.sleep(_RETRY_S)
                continue
            if background is None:
                return None
            live = background.live
            while live is not None and not live.is_gone and background.outcome is None:
                await live.following.changed()
            if background.outcome is not None:
                return background.outcome
            await asyncio.sleep(_RETRY_S)

    async def _put(self, owner: Principal, run: str, put: Put) -> None:
        while True:
            try:
                background = background_of(await self._runs.find(owner, run))
                if background is not None and put.variable in background.waits_for:
                    await self._set(owner, run, put)
            except Unavailable:
                await asyncio.sleep(_RETRY_S)
                continue
            except (Conflict, UnknownId):
                pass  # it is set, or erased
            return

    async def _set(self, owner: Principal, run: str, put: Put) -> None:
        try:
            await self._runs.ask(owner, run, lambda live: live.put(put))
        except (Conflict, UnknownId):
            raise
        except InvalidRequest as error:  # too large to be a value
            failure = Put(put.variable, failure=error.message)
            await self._runs.ask(owner, run, lambda live: live.put(failure))


def _put_of(response: str, outcome: Outcome | None) -> Put:
    if outcome is None:
        return Put(response, failure="there is no such response any more")
    if outcome.state is State.DONE:
        return Put(response, outcome.value)
    failure = outcome.failure
    return Put(response, failure=f"{failure.code}: {failure.message}" if failure is not None else "it was cancelled")


def _owner(tenant: TenantId) -> Principal:
    """Return who may see a tenant's runs, and nothing else: the key that a run is under may be revoked meanwhile."""
    key = Key(id="", name="", tenant=tenant, digest=b"")
    return Principal.of(key, Tenant(id=tenant))
