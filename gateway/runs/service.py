"""All runs of workflows: accepts them, keeps those alive that have not ended, and finds those that have."""

import asyncio
import hashlib
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

import msgspec
import structlog

from core.clock import Clock
from core.errors import Conflict, ConnectionLimit, DatabaseUnavailable, Draining, UnknownId
from core.ids import TenantId
from core.workflows import RunEvent, RunRecord, RunState
from gateway.auth import Principal
from gateway.looping import LoopingCall
from gateway.runs.following import Following
from gateway.runs.history import History
from gateway.runs.live import LiveRun
from gateway.runs.log import RunLog
from gateway.runs.work import Worker
from semantic_vars.calls import Workflow
from semantic_vars.executor import Executor, Fact
from semantic_vars.graph import USUAL, Bounds
from storage.sql.database import StorageUnavailable
from storage.sql.workflows import Workflows

_log = structlog.get_logger(__name__)

LEASE_S = 30.0
RENEW_S = 10.0
_POLL_S = 0.5  # a run of another gateway is followed in the database
MOST_OPEN = 1_000
"""Runs of one tenant that have not ended."""


class Runs:
    """The service. An async context manager: inside it, runs that were left are gone on with.

    ``owner`` names this gateway, the same after a restart: so it takes its runs up again at once, and those of another
    when that one's lease is over.
    """

    def __init__(self, store: Workflows, worker: Worker, clock: Clock, *, owner: str, bounds: Bounds = USUAL) -> None:
        self._store = store
        self._worker = worker
        self._clock = clock
        self._owner = owner
        self._bounds = bounds
        self._live: dict[str, LiveRun] = {}
        self._num_open: Counter[TenantId] = Counter()
        self._log = RunLog(store.write, clock)
        self._loop = LoopingCall("runs_claimed", self._claim, RENEW_S)
        self._is_draining = False
        self._is_away = False

    async def __aenter__(self) -> Self:
        await self._log.__aenter__()
        await self._claim()
        self._loop.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_draining = True
        await self._loop.stop()
        for run in self._live.values():
            run.leave()
        for run in list(self._live.values()):
            await run.left()
        await self._log.__aexit__(kind, error, trace)

    async def _claim(self) -> None:
        """Renew the lease of our runs, and go on with those that nobody has any more."""
        now = self._clock.wall()
        try:
            for record in await self._store.claim(self._owner, now, now + LEASE_S):
                if record.id not in self._live:
                    history, told = await self._history(record)
                    self._go_on(record, history, told)
                    _log.info("run_goes_on", run=record.id, num_events=history.number)
        except StorageUnavailable as error:
            if not self._is_away:
                _log.warning("runs_not_claimed", error=str(error))
            self._is_away = True
        else:
            self._is_away = False

    async def submit(
        self,
        principal: Principal,
        workflow: Workflow,
        *,
        end_user: str | None = None,
        idempotency: str | None = None,
        facts: Mapping[str, Fact] = {},
    ) -> RunRecord:
        """Accept a run, and return once it is durable; the same again for a key that was used before.

        ``facts``: what calls of another run came to, which need not be made again where their inputs are the same.
        Raises ``InvalidRequest`` for a graph that cannot run, ``Conflict`` for a key that was used for another one.
        """
        if self._is_draining:
            raise Draining("the server is shutting down; try another one", retry_after=1.0)
        Executor(workflow, self._worker, bounds=self._bounds)  # reads it, and refuses what cannot run
        if self._num_open[principal.tenant] >= MOST_OPEN:
            raise ConnectionLimit(f"{MOST_OPEN} runs of this tenant have not ended", retry_after=5.0)
        graph = msgspec.json.encode(workflow)
        now = self._clock.wall()
        record = RunRecord(
            id=f"run_{secrets.token_hex(16)}", tenant=principal.tenant, key=principal.key.id, graph=graph,
            created_at=now, updated_at=now, end_user=end_user, app=workflow.app, idempotency=idempotency,
            digest=hashlib.sha256(graph).hexdigest(), owner=self._owner, leased_until=now + LEASE_S,
        )  # fmt: skip
        try:
            accepted = await self._store.accept(record)
        except StorageUnavailable as error:
            raise DatabaseUnavailable(f"a run is accepted only where it is durable: {error}", retry_after=2.0) from None
        if accepted.digest != record.digest:
            raise Conflict("this Idempotency-Key was used for another workflow")
        if accepted is record:
            self._go_on(record, History(workflow), History(workflow), facts)
        return accepted

    def _go_on(self, record: RunRecord, history: History, told: History, facts: Mapping[str, Fact] = {}) -> None:
        following = Following(record.id, self._store_events, told.number)
        run = LiveRun(
            record, history, told, worker=self._worker, log=self._log, clock=self._clock, bounds=self._bounds,
            following=following, on_end=self._ended, facts=facts,
        )  # fmt: skip
        self._live[record.id] = run
        self._num_open[record.tenant] += 1
        run.begin()

    def _ended(self, run: LiveRun) -> None:
        if self._live.pop(run.id, None) is not None:
            self._num_open[run.record.tenant] -= 1
            run.leave()

    async def _history(self, record: RunRecord) -> tuple[History, History]:
        """Return what has happened to a run, twice: one to go on from, and one to show."""
        workflow = msgspec.json.decode(record.graph, type=Workflow)
        both = History(workflow), History(workflow)
        after = 0
        while events := await self._store.events(record.id, after):
            for history in both:
                history.read(event.body for event in events)
            after = events[-1].number
        return both

    async def _store_events(self, run: str, after: int) -> Sequence[RunEvent]:
        try:
            return await self._store.events(run, after)
        except StorageUnavailable as error:
            raise DatabaseUnavailable(str(error), retry_after=2.0) from None

    async def find(self, principal: Principal, run_id: str) -> LiveRun | tuple[RunRecord, History]:
        """Return a run of the tenant: alive, or as it ended. Raises ``UnknownId``."""
        live = self._live.get(run_id)
        if live is not None:
            if live.record.tenant != principal.tenant:
                raise _unknown(run_id)
            return live
        try:
            record = await self._store.run(run_id)
            if record is None or record.tenant != principal.tenant:
                raise _unknown(run_id)
            return record, (await self._history(record))[1]
        except StorageUnavailable as error:
            raise DatabaseUnavailable(str(error), retry_after=2.0) from None

    async def ask(self, principal: Principal, run_id: str, what: Callable[[LiveRun], None]) -> LiveRun:
        """Ask a run for something, and return it; one that has ended is gone on with for that.

        Raises ``UnknownId``, ``Conflict`` where another gateway has it, and what ``what`` raises.
        """
        found = await self.find(principal, run_id)
        if isinstance(found, LiveRun):
            what(found)
            return found
        record, told = found
        try:
            if not await self._store.reopen(run_id, self._owner, self._clock.wall() + LEASE_S):
                raise Conflict(f"the run {run_id} is under way at another gateway; ask there")
            history = (await self._history(record))[0]
        except StorageUnavailable as error:
            raise DatabaseUnavailable(str(error), retry_after=2.0) from None
        if run_id not in self._live:
            self._go_on(record, history, told)
        live = self._live[run_id]
        try:
            what(live)
        finally:
            live.settle_state()  # it was opened again, for nothing perhaps
        return live

    async def follow(
        self, found: LiveRun | tuple[RunRecord, History], after: int
    ) -> AsyncGenerator[RunEvent | bytes, None]:
        """Yield what has happened to a run behind a number, and what happens until it ends."""
        if isinstance(found, LiveRun):
            async for event in found.following.follow(after):
                yield event
            return
        record, _ = found
        while True:
            events = await self._store_events(record.id, after)
            for event in events:
                after = event.number
                yield event
            if events:
                continue
            if record.state != "running":
                return
            await asyncio.sleep(_POLL_S)
            record = await self._store.run(record.id) or record

    def forget(self, tenant: TenantId, end_user: str | None) -> None:
        """Let go of the runs of a tenant, or of one of its end users: they are about to be erased."""
        for run in list(self._live.values()):
            if run.record.tenant == tenant and end_user in {None, run.record.end_user}:
                self._ended(run)

    async def search(
        self, principal: Principal, *, state: RunState | None, after: tuple[float, str] | None, limit: int
    ) -> tuple[RunRecord, ...]:
        """Return the tenant's runs, newest first."""
        try:
            return await self._store.search(principal.tenant, state=state, after=after, limit=limit)
        except StorageUnavailable as error:
            raise DatabaseUnavailable(str(error), retry_after=2.0) from None


def _unknown(run_id: str) -> UnknownId:
    return UnknownId(f"there is no run {run_id[:64]!r}")
