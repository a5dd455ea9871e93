"""Several gateways on one database, SQLite's or PostgreSQL's: each can be asked for the runs of all of them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from core.clock import SystemClock
from core.errors import Conflict, InvalidRequest, Unavailable, UnknownId
from core.ids import TenantId
from core.tenancy import Key, Tenant
from core.workflows import RunEvent, RunRecord
from gateway.auth import Principal
from gateway.runs import service
from gateway.runs.history import HAPPENING, Appended, Settled
from gateway.runs.live import LiveRun
from gateway.runs.service import Runs
from semantic_vars.calls import Given
from semantic_vars.events import Put
from semantic_vars.variable import Outcome, State
from storage.sql.database import Database, StorageUnavailable
from storage.sql.workflows import Change, Workflows
from tests.fakes.doing import Hands
from tests.unit.semantic_vars.runs import llm, workflow

PATIENCE_S = 20.0
PAUSE_S = 0.01


def principal_of(tenant: str) -> Principal:
    name = TenantId(tenant)
    return Principal.of(Key("k", "key", name, tenant.encode()), Tenant(id=name))


ME, STRANGER = principal_of("me"), principal_of("stranger")


class Cut(Workflows):
    """A database that does not take what one gateway writes, as long as that is cut off."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.is_cut = False
        self.num_refused = 0

    async def write(self, owner: str, changes: Sequence[Change]) -> None:
        if self.is_cut and any(change.events or change.answers for change in changes):
            self.num_refused += 1
            raise StorageUnavailable("it is cut off")
        await super().write(owner, changes)

    async def claim(self, *rest: Any, **more: Any) -> tuple[RunRecord, ...]:
        if self.is_cut:
            raise StorageUnavailable("it is cut off")
        return await super().claim(*rest, **more)


class Gateway:
    """A gateway without HTTP and engines."""

    def __init__(self, name: str, database: Database, *held: str) -> None:
        self.store = Cut(database)
        self.hands = Hands(*held)
        self.runs = Runs(self.store, self.hands, SystemClock(), owner=name)


@asynccontextmanager
async def gateways(database: Database, *held: str) -> AsyncIterator[tuple[Gateway, Gateway]]:
    """Two of them, in which calls of these names are held."""
    one, other = (Gateway(name, database, *held) for name in ("one", "other"))
    async with AsyncExitStack() as stack:
        for gateway in (one, other):
            await stack.enter_async_context(gateway.runs)
        yield one, other


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "LETTERS_S", 0.02)
    monkeypatch.setattr("gateway.runs.elsewhere._POLL_S", 0.02)
    monkeypatch.setattr("gateway.runs.log.RETRY_S", 0.02)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(int(PATIENCE_S / PAUSE_S)):
        if await holds():
            return
        await asyncio.sleep(PAUSE_S)
    raise AssertionError("it has not come about")


async def ended(gateway: Gateway, run: str, name: str) -> Outcome:
    """Wait at a gateway for what becomes of a variable."""
    found = await gateway.runs.find(ME, run)

    async def is_there() -> bool:
        nonlocal found
        found = await gateway.runs.find(ME, run)
        return found.told.outcome(name) is not None

    await until(is_there)
    outcome = found.told.outcome(name)
    assert outcome is not None
    return outcome


async def events_of(gateway: Gateway, run: str) -> list[RunEvent]:
    events: list[RunEvent] = []
    while page := await gateway.store.events(run, after=len(events)):
        events += page
    return events


async def settled(gateway: Gateway, run: str) -> list[str]:
    happenings = [HAPPENING.decode(event.body) for event in await events_of(gateway, run)]
    return [one.variable for one in happenings if isinstance(one, Settled)]


async def test_an_open_variable_is_set_at_a_gateway_that_does_not_have_the_run(database: Database) -> None:
    async with gateways(database) as (one, other):
        given = workflow(llm("a", "{{v}}"), variables={"v": {"open": True}})
        run = (await one.runs.submit(ME, given)).id
        seen = await other.runs.ask(ME, run, lambda live: live.put(Put("v", "yes")))
        assert seen.told.outcome("v") == Outcome(State.DONE, "yes"), "durable, and seen by who has asked"
        assert (await ended(other, run, "a")).value == "<yes>"
        assert (one.hands.begun, other.hands.begun) == (["a"], [])
        assert await one.store.with_letters() == frozenset()


async def test_calls_are_appended_and_wanted_and_given_up_from_elsewhere(database: Database) -> None:
    async with gateways(database, "a", "b") as (one, other):
        given = workflow(llm("a", "x"), llm("spare", "y"), outputs=["a"])
        run = (await one.runs.submit(ME, given)).id
        more = Appended(workflow(llm("b", "after {{a}}")).calls, {"w": Given(value=1)}, ("b",), "once")
        for _ in range(2):
            seen = await other.runs.ask(ME, run, lambda live: live.append(more))
            assert seen.told.names() == ("w", "a", "spare", "b"), "once, whoever asks again under the same key"
        await other.runs.ask(ME, run, lambda live: live.want("spare", "throughput"))
        assert (await ended(other, run, "spare")).value == "<y>"
        one.hands.let_go("a")
        await other.runs.ask(ME, run, lambda live: live.cancel(("b",)))
        assert (await ended(other, run, "b")).state is State.CANCELLED
        assert (await ended(other, run, "a")).state is State.DONE
        assert other.hands.begun == []


async def test_who_is_refused_elsewhere_is_told_why(database: Database) -> None:
    async with gateways(database, "a") as (one, other):
        given = workflow(llm("a", "x"), variables={"v": {"open": True}, "w": {"open": True}}, outputs=["a", "v", "w"])
        run = (await one.runs.submit(ME, given)).id
        await other.runs.ask(ME, run, lambda live: live.put(Put("v", 1)))
        with pytest.raises(Conflict, match="'v' is not open"):
            await other.runs.ask(ME, run, lambda live: live.put(Put("v", 2)))
        with pytest.raises(UnknownId, match="no variable 'nothing'"):
            await other.runs.ask(ME, run, lambda live: live.want("nothing", "latency"))
        wrong = Appended(workflow(llm("b", "{{nothing}}")).calls)
        with pytest.raises(InvalidRequest, match="'nothing'"):
            await other.runs.ask(ME, run, lambda live: live.append(wrong))
        with pytest.raises(UnknownId, match="no run"):
            await other.runs.ask(STRANGER, run, lambda live: live.put(Put("w", 1)))
        assert await settled(one, run) == ["v"]


async def test_of_many_who_set_a_variable_everywhere_at_once_one_is_told_that_it_did(database: Database) -> None:
    async with gateways(database) as (one, other):
        given = workflow(llm("a", "{{v}}"), variables={"v": {"open": True}})
        run = (await one.runs.submit(ME, given)).id

        async def put(gateway: Gateway, value: int) -> int | None:
            try:
                await gateway.runs.ask(ME, run, lambda live: live.put(Put("v", value)))
            except Conflict:
                return None
            return value

        told = await asyncio.gather(*(put(gateway, value) for value in range(4) for gateway in (one, other)))
        (winner,) = {value for value in told if value is not None}
        assert sum(value is not None for value in told) == 1
        assert (await ended(other, run, "v")).value == winner
        assert (await settled(one, run)).count("v") == 1


async def test_a_run_that_ends_while_a_letter_is_on_its_way_is_gone_on_with_by_who_has_sent_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "LETTERS_S", 3600.0)  # the letter is not read
    async with gateways(database, "a") as (one, other):
        run = (await one.runs.submit(ME, workflow(llm("a", "x")))).id
        more = Appended(workflow(llm("b", "after {{a}}")).calls)
        asking = asyncio.create_task(other.runs.ask(ME, run, lambda live: live.append(more)))

        async def is_sent() -> bool:
            return bool(await one.store.with_letters())

        await until(is_sent)
        one.hands.let_go("a")
        await asking
        assert (await ended(one, run, "b")).value == "<after <x>>"
        assert other.hands.begun == ["b"]
        assert await one.store.with_letters() == frozenset()


async def test_a_gateway_that_says_nothing_is_given_up_and_nothing_is_done_later(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "LETTERS_S", 3600.0)
    monkeypatch.setattr(service, "ANSWERED_S", 0.1)
    async with gateways(database) as (one, other):
        given = workflow(llm("a", "{{v}}"), variables={"v": {"open": True}})
        run = (await one.runs.submit(ME, given)).id
        with pytest.raises(Unavailable, match="nothing was done"):
            await other.runs.ask(ME, run, lambda live: live.put(Put("v", "late")))
        assert await one.store.with_letters() == frozenset()
        await one.runs.ask(ME, run, lambda live: live.put(Put("v", "yes")))
        assert (await ended(one, run, "a")).value == "<yes>"


async def test_what_a_gateway_has_done_and_could_not_write_before_it_died_is_done_by_the_next_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "LEASE_S", 0.5)
    async with gateways(database, "a") as (one, other):
        given = workflow(llm("a", "x"), llm("b", "{{v}}"), variables={"v": {"open": True}})
        run = (await one.runs.submit(ME, given)).id
        one.store.is_cut = True
        asking = asyncio.create_task(other.runs.ask(ME, run, lambda live: live.put(Put("v", "yes"))))

        async def is_refused() -> bool:
            return one.store.num_refused > 0

        await until(is_refused)  # it has set the variable, and cannot keep it
        assert not await settled(other, run)
        await asyncio.sleep(service.LEASE_S)
        await other.runs.ask(ME, run, lambda live: live.want("b", "latency"))  # its lease is over: nobody has it
        await asking
        other.hands.let_go("a")
        assert (await ended(other, run, "b")).value == "<yes>"
        assert (await ended(other, run, "a")).value == "<x>"
        one.store.is_cut = False
        one.hands.let_go("a")

        async def is_lost() -> bool:
            return not isinstance(await one.runs.find(ME, run), LiveRun)

        await until(is_lost)  # it was not dead: it finds that another has its run
        events = await events_of(other, run)
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        assert sorted(await settled(other, run)) == ["a", "b", "v"]


async def test_who_follows_a_run_sees_all_of_it_wherever_it_goes(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "LEASE_S", 0.2)
    async with gateways(database, "b") as (one, other):
        run = (await one.runs.submit(ME, workflow(llm("a", "x"), llm("b", "{{a}}")))).id

        async def follow(gateway: Gateway) -> list[int]:
            found = await gateway.runs.find(ME, run)
            return [event.number async for event in gateway.runs.follow(found, 0) if isinstance(event, RunEvent)]

        await ended(one, run, "a")
        followers = [asyncio.create_task(follow(gateway)) for gateway in (one, other) for _ in range(3)]
        await asyncio.sleep(service.LEASE_S + 0.1)
        await other.runs.ask(ME, run, lambda live: live.want("b", "latency"))  # which takes it over
        for gateway in (one, other):
            gateway.hands.let_go("b")
        seen = await asyncio.wait_for(asyncio.gather(*followers), PATIENCE_S)
        events = await events_of(one, run)
        assert len(events) == 4
        assert seen == [[event.number for event in events]] * 6


async def test_who_looks_again_reads_only_what_is_new(database: Database) -> None:
    class Counting(Workflows):
        num_read = 0

        async def news(self, run: str, after: int, limit: int = 1000) -> Any:
            found = await super().news(run, after, limit)
            self.num_read += len(found.events) if found is not None else 0
            return found

    async with gateways(database) as (one, _):
        items = [str(number) for number in range(50)]
        run = (await one.runs.submit(ME, workflow(llm("m", "{{item}}", foreach=items)))).id
        await ended(one, run, "m")
        store = Counting(database)
        async with Runs(store, Hands(), SystemClock(), owner="third") as third:
            looks = [await third.find(ME, run) for _ in range(3)]
            assert store.num_read == 53
            assert looks[0].told is looks[2].told
            assert looks[0].told.outcome("m") == Outcome(State.DONE, [f"<{item}>" for item in items], total=50)
            with pytest.raises(UnknownId):
                await third.find(STRANGER, run)
            await third.forget(ME.tenant, None)
            await third.find(ME, run)
            assert store.num_read == 106, "what is erased is not kept"


async def test_many_gateways_asked_at_random_make_one_history(database: Database) -> None:
    async with AsyncExitStack() as stack:
        cluster = [Gateway(f"g{number}", database) for number in range(3)]
        for gateway in cluster:
            await stack.enter_async_context(gateway.runs)
        names = [f"v{number}" for number in range(12)]
        given = workflow(llm("a", " ".join(f"{{{{{name}}}}}" for name in names)),
                         variables={name: {"open": True} for name in names})  # fmt: skip
        run = (await cluster[0].runs.submit(ME, given)).id

        async def put(number: int) -> None:
            gateway = cluster[number % 3]
            await gateway.runs.ask(ME, run, lambda live: live.put(Put(names[number], str(number))))

        await asyncio.gather(*map(put, range(12)))
        told = " ".join(map(str, range(12)))
        for gateway in cluster:
            assert (await ended(gateway, run, "a")).value == f"<{told}>"
        assert sorted(await settled(cluster[0], run)) == sorted([*names, "a"])
