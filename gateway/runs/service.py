"""All runs of workflows: accepts them, keeps those alive that have not ended, and finds those that have."""

import asyncio
import hashlib
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Self

import msgspec
import structlog

from core.clock import Clock
from core.errors import Conflict, ConnectionLimit, DatabaseUnavailable, Draining, Unavailable, UnknownId
from core.ids import TenantId
from core.workflows import RunAnswer, RunEvent, RunRecord, RunState
from gateway.auth import Principal
from gateway.looping import LoopingCall
from gateway.runs.elsewhere import Elsewhere, Seen
from gateway.runs.following import Following
from gateway.runs.history import HAPPENING, Finished, History
from gateway.runs.letters import Askable, Letter, check
from gateway.runs.live import Doing, LiveRun
from gateway.runs.log import RunLog
from gateway.runs.telling import SILENT, Telling
from semantic_vars.calls import Workflow, within
from semantic_vars.executor import Executor, Fact
from semantic_vars.graph import USUAL, Bounds
from semantic_vars.variable import State
from storage.sql.database import Conflict as StorageConflict
from storage.sql.database import StorageUnavailable
from storage.sql.workflows import Change, Workflows

_log = structlog.get_logger(__name__)

LEASE_S = 30.0
RENEW_S = 10.0
LETTERS_S = 0.25
"""How often letters of other gateways are read, by one that has runs."""
ANSWERED_S = 5.0
"""How long another gateway may take to answer a letter."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.25
_LARGE = 200
"""Calls of a graph that is read beside the event loop."""
MOST_OPEN = 1_000
"""Runs of one tenant that have not ended."""


def is_large(workflow: Workflow) -> bool:
    """Return whether a graph takes so long to be read that others would wait for it."""
    every = (one for call in workflow.calls for one in within(call))
    return sum(1 for _ in islice(every, _LARGE + 1)) > _LARGE


class Runs:
    """The service. An async context manager: inside it, runs that were left are gone on with.

    ``owner`` names this gateway, the same after a restart: so it takes its runs up again at once, and those of another
    when that one's lease is over. What a run of another gateway is asked for is left for that one in the database.
    """

    def __init__(
        self,
        store: Workflows,
        worker: Doing,
        clock: Clock,
        *,
        owner: str,
        bounds: Bounds = USUAL,
        telling: Telling = SILENT,
    ) -> None:
        self._store = store
        self._worker = worker
        self._clock = clock
        self._owner = owner
        self._bounds = bounds
        self._telling = telling
        self._live: dict[str, LiveRun] = {}
        self._num_open: Counter[TenantId] = Counter()
        self._elsewhere = Elsewhere(store, self._store_events, clock)
        self._log = RunLog(telling.counting(partial(store.write, owner)), clock)
        self._loops = (
            LoopingCall("runs_claimed", self._claim, RENEW_S),
            LoopingCall("letters_read", self._read_letters, LETTERS_S),
        )
        self._is_draining = False
        self._is_away = False

    async def __aenter__(self) -> Self:
        await self._log.__aenter__()
        await self._claim()
        for loop in self._loops:
            loop.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_draining = True
        for loop in self._loops:
            await loop.stop()
        await self._elsewhere.close()
        for run in self._live.values():
            run.leave()
        for run in list(self._live.values()):
            await run.left()
        await self._log.__aexit__(kind, error, trace)

    @property
    def alive(self) -> Sequence[LiveRun]:
        """The runs that go on here."""
        return tuple(self._live.values())

    async def _claim(self) -> None:
        """Renew the lease of our runs, and go on with those that nobody has any more."""
        now = self._clock.wall()
        self._elsewhere.sweep()
        try:
            for record in await self._store.claim(self._owner, now, now + LEASE_S, self._live.keys()):
                await self._take_up(record)
        except StorageUnavailable as error:
            if not self._is_away:
                _log.warning("runs_not_claimed", error=str(error))
            self._is_away = True
        else:
            self._is_away = False

    async def _take_up(self, record: RunRecord) -> None:
        """Go on with a run that was left. One that cannot be gone on with ends as failed, and holds up no other."""
        history, told = await self._history(record)
        try:
            executor = await self._executor(history)
            if record.id not in self._live:
                self._go_on(record, history, told, executor)
                _log.info("run_goes_on", run=record.id, num_events=history.number)
        except StorageUnavailable:
            raise
        except Exception:  # noqa: BLE001 - whatever is wrong with one run, the others and the server have to live
            _log.exception("run_cannot_go_on", run=record.id, meaning="it ends as failed")
            ended = Finished(State.FAILED, history.spent, history.used, self._clock.wall())
            event = RunEvent(record.id, told.number + 1, msgspec.json.encode(ended))
            await self._store.write(self._owner, [Change(record.id, (event,), "failed", self._clock.wall())])

    async def _read_letters(self) -> None:
        """Do what other gateways ask for."""
        if not self._live:
            return
        try:
            ours = (await self._store.with_letters()) & self._live.keys()
            letters = await self._store.letters(ours) if ours else ()
        except StorageUnavailable:
            return  # whoever has sent one waits, or takes it back; claims tell of the database
        for letter in letters:
            if (live := self._live.get(letter.run)) is not None:
                live.answer(letter)

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
        history = History(workflow)
        executor = await self._executor(history, facts)
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
            self._go_on(record, history, History(workflow), executor)
        return accepted

    async def _executor(self, history: History, facts: Mapping[str, Fact] = {}) -> Executor:
        """Return an executor that begins, or goes on from what has happened. A large graph takes a second to be read:
        others are served meanwhile. Raises ``InvalidRequest`` for what cannot run."""
        make = partial(
            Executor, history.workflow, self._worker, bounds=self._bounds, spent=history.spent,
            facts={**facts, **history.facts_to_go_on()}, prefills=self._worker.prefills,
        )  # fmt: skip
        return await asyncio.to_thread(make) if is_large(history.workflow) else make()

    def _go_on(self, record: RunRecord, history: History, told: History, executor: Executor) -> None:
        following = Following(record.id, self._store_events, told.number)
        run = LiveRun(
            record, history, told, executor=executor, worker=self._worker, log=self._log, clock=self._clock,
            following=following, on_end=self._ended, telling=self._telling,
        )  # fmt: skip
        try:
            run.begin()
        except BaseException:
            run.leave()
            raise
        self._live[record.id] = run
        self._num_open[record.tenant] += 1

    def _ended(self, run: LiveRun) -> None:
        if self._live.get(run.id) is run:
            del self._live[run.id]
            self._num_open[run.record.tenant] -= 1
            run.leave()

    async def _history(self, record: RunRecord) -> tuple[History, History]:
        """Return what has happened to a run, twice: one to go on from, and one to show."""
        workflow = msgspec.json.decode(record.graph, type=Workflow)
        both = History(workflow), History(workflow)
        after = 0
        while events := await self._store.events(record.id, after):
            for event in events:
                happening = HAPPENING.decode(event.body)
                for history in both:
                    history.add(happening)
            after = events[-1].number
        return both

    async def _store_events(self, run: str, after: int) -> Sequence[RunEvent]:
        try:
            return await self._store.events(run, after)
        except StorageUnavailable as error:
            raise DatabaseUnavailable(str(error), retry_after=2.0) from None

    async def find(self, principal: Principal, run_id: str) -> LiveRun | Seen:
        """Return a run of the tenant: alive, or as the database tells of it. Raises ``UnknownId``."""
        live = self._live.get(run_id)
        if live is not None:
            if live.record.tenant != principal.tenant:
                raise _unknown(run_id)
            return live
        seen = await self._look(run_id)
        if seen is None or seen.record.tenant != principal.tenant:
            raise _unknown(run_id)
        return seen

    async def _look(self, run_id: str) -> Seen | None:
        try:
            return await self._elsewhere.look(run_id)
        except StorageUnavailable as error:
            raise DatabaseUnavailable(str(error), retry_after=2.0) from None

    async def ask(self, principal: Principal, run_id: str, what: Callable[[Askable], None]) -> LiveRun | Seen:
        """Ask a run for something, and return it. One that has ended is gone on with for that; one that another gateway
        has is asked there.

        Raises ``UnknownId``, what ``what`` raises, and ``Unavailable`` if the other gateway does not answer: then
        nothing has changed, nor will it.
        """
        until = self._clock.monotonic() + ANSWERED_S
        while True:
            found = await self.find(principal, run_id)
            if isinstance(found, LiveRun):
                what(found)
                return found
            try:
                if found.record.state == "running" and found.record.owner != self._owner:
                    letter = Letter()
                    what(letter)
                    if (answer := await self._send(found.record, letter, until)) is not None:
                        check(answer)
                        return await self.find(principal, run_id)
                elif (live := await self._reopen(run_id)) is not None:
                    try:
                        what(live)
                    finally:
                        live.settle_state()  # it was opened again, for nothing perhaps
                    return live
            except StorageUnavailable as error:
                raise DatabaseUnavailable(str(error), retry_after=2.0) from None
            if self._clock.monotonic() >= until:
                told = f"the gateway that has the run {run_id} has not answered in {ANSWERED_S:g} s: nothing was done"
                raise Unavailable(f"{told}. Try again: if it is gone, another goes on with the run", retry_after=5.0)

    async def _reopen(self, run_id: str) -> LiveRun | None:
        """Go on with a run that has ended; None if another gateway was first."""
        if not await self._store.reopen(run_id, self._owner, self._clock.wall() + LEASE_S):
            return None
        if (record := await self._store.run(run_id)) is None:
            return None
        history, told = await self._history(record)
        executor = await self._executor(history)
        if run_id not in self._live:
            self._go_on(record, history, told, executor)
        return self._live[run_id]

    async def _send(self, record: RunRecord, letter: Letter, until: float) -> RunAnswer | None:
        """Leave a letter for the gateway that has a run, and return its answer; None if it was not done: the run has
        ended, or there was no answer in time."""
        if record.leased_until < self._clock.wall():
            await self._claim()
            return None  # perhaps we have it now
        try:
            number = await self._store.send(record.id, letter.body)
        except StorageConflict:
            return None  # it is gone
        pause_s = _FIRST_PAUSE_S
        while (told := await self._store.answered(number)) is not None:
            state, is_answered = told
            if is_answered or state != "running" or self._clock.monotonic() >= until:
                break
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return await self._store.take_back(number)

    async def follow(
        self, found: LiveRun | tuple[RunRecord, History], after: int
    ) -> AsyncGenerator[RunEvent | bytes, None]:
        """Yield what has happened to a run behind a number, and what happens until it ends."""
        seen: Seen | None
        if not isinstance(found, LiveRun):
            seen = Seen(*found)
        else:
            async with aclosing(found.following.follow(after)) as events:
                async for event in events:
                    after = event.number if isinstance(event, RunEvent) else after
                    yield event
            if found.told.state != "running" or self._is_draining:
                return
            seen = await self._look(found.id)  # another gateway goes on with it
        if seen is not None:
            async with aclosing(self._elsewhere.follow(seen, after)) as events:
                async for event in events:
                    yield event

    async def forget(self, tenant: TenantId, end_user: str | None) -> None:
        """Let go of the runs of a tenant, or of one of its end users: they are about to be erased. What they were at is
        booked when this returns."""
        theirs = [one for one in self.alive if one.record.tenant == tenant and end_user in {None, one.record.end_user}]
        for run in theirs:
            self._ended(run)
        for run in theirs:
            await run.left()
        self._elsewhere.forget(tenant, end_user)

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
