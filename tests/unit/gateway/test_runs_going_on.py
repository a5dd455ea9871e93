"""Runs that go on behind what was kept of them, and what clients' tools are asked for."""

import asyncio
from typing import Any

import pytest

from gateway.runs.history import HAPPENING, Appended, Finished, Retried, Settled, Stopped, Waiting
from gateway.runs.live import LiveRun
from gateway.runs.log import RunLog
from semantic_vars.calls import Given, Workflow
from semantic_vars.events import Done, Failed, Put, Start
from semantic_vars.variable import State
from tests.unit.gateway.houses import House, Worker
from tests.unit.semantic_vars.runs import llm, workflow

ONE = workflow(llm("a", "x"))


class Halting:
    """A worker's way that answers all calls but one, of which it tells that it was begun."""

    def __init__(self, *halting: str) -> None:
        self._halting = halting
        self.starts: list[str] = []

    async def say(self, start: Start) -> Done | Failed:
        self.starts.append(start.call)
        if start.call in self._halting:
            await asyncio.Event().wait()
        return Done(start.call, start.epoch, "x")


async def stop(house: House, run: LiveRun) -> None:
    await run.durable()
    run.leave()
    await run.left()


async def again(house: House, given: Workflow) -> tuple[LiveRun, list[str]]:
    """Go on with a run that was left, to its end; return it and what it has begun."""
    way = Halting()
    house.log = RunLog(house.telling.counting(house._write), house.clock)
    return await house.through(given, Worker(house.clock, way.say)), way.starts


async def settled(run: LiveRun, name: str) -> None:
    async with asyncio.timeout(5):
        while run.told.outcome(name) is None:
            await run.following.changed()


async def test_a_run_with_calls_that_were_appended_after_its_end_does_not_end_before_these() -> None:
    house, way = House(), Halting("b")
    async with house.log:
        run = house.run(ONE, Worker(house.clock, way.say))
        run.begin()
        await settled(run, "a")
        run.append(Appended(workflow(llm("b", "{{a}}")).calls))
        await stop(house, run)
    run, starts = await again(house, ONE)
    assert starts == ["b"]
    assert run.told.outcome("b") is not None
    kinds = [type(HAPPENING.decode(event.body)) for event in house.events]
    assert kinds[-2:] == [Settled, Finished]
    assert kinds.count(Finished) == 2


async def test_a_call_within_another_that_was_cancelled_stays_so_and_is_not_made_again() -> None:
    bodies = [{"calls": [llm(name, name)], "result": f"{{{{{name}}}}}"} for name in ("x", "y")]
    given = workflow({"kind": "race", "id": "r", "of": bodies}, llm("z", "{{r}}"))
    house, way = House(), Halting("r#0/x", "r#1/y")
    async with house.log:
        run = house.run(given, Worker(house.clock, way.say))
        run.begin()
        await asyncio.sleep(0)
        run.cancel(("r#1/y",))
        await stop(house, run)
    run, starts = await again(house, given)
    assert starts == ["r#0/x", "z"]
    assert run.told.state == "done"


async def test_a_call_that_was_cancelled_is_not_begun_again() -> None:
    given = workflow(llm("a", "x"), llm("b", "y"), llm("c", "{{b}}", on_error="default", default="-"))
    house, way = House(), Halting("a", "b")
    async with house.log:
        run = house.run(given, Worker(house.clock, way.say))
        run.begin()
        await asyncio.sleep(0)
        run.cancel(("b",))
        await stop(house, run)
    run, starts = await again(house, given)
    assert starts == ["a"]
    assert (run.told.outcomes["b"].state, run.told.outcomes["a"].state) == (State.CANCELLED, State.DONE)


async def test_what_was_asked_for_after_the_deadline_fails_also_after_a_restart() -> None:
    given = workflow(llm("a", "x"), deadline_s=5)
    house = House()
    async with house.log:
        run = house.run(given, Worker(house.clock))
        run.begin()
        await settled(run, "a")
        await stop(house, run)
    house.clock.advance(10.0)
    house.log = RunLog(house.telling.counting(house._write), house.clock)
    async with house.log:
        run = house.run(given, Worker(house.clock))
        run.begin()
        run.append(Appended(workflow(llm("b", "{{ok}}")).calls, {"ok": Given(open=True)}))
        await settled(run, "b")
        run.leave()
    failure = run.told.outcomes["ok"].failure
    assert failure is not None
    assert failure.code == "deadline"


async def test_a_tool_of_the_clients_that_is_tried_again_is_told_of_again() -> None:
    tool: dict[str, Any] = {"kind": "tool", "id": "t", "server": {"type": "client", "tool": "tests"}, "arguments": 1}
    house = House()
    async with house.log:
        run = house.run(workflow(tool | {"retry": {"max": 1, "backoff_s": 0}}), Worker(house.clock))
        run.begin()
        run.put(Put("t", failure="not today"))
        await asyncio.sleep(0.01)  # the timer of the pause before the second attempt, of no length
        await run.durable()
        assert [one.call for one in run.told.waiting.values()] == ["t"]
        run.put(Put("t", "passed"))
        await settled(run, "t")
        run.leave()
    kinds = [type(HAPPENING.decode(event.body)) for event in house.events]
    assert kinds[1:5] == [Waiting, Retried, Waiting, Settled]


async def test_what_calls_have_used_that_were_aborted_at_the_end_is_in_the_usage_of_the_run() -> None:
    house, way = House(), Halting("a")
    async with house.log:
        run = house.run(ONE, Worker(house.clock, way.say))
        run.begin()
        await asyncio.sleep(0)
        run.cancel(())
        async with asyncio.timeout(5):
            while run.told.state == "running":
                await run.following.changed()
        run.leave()
    last = HAPPENING.decode(house.events[-1].body)
    assert isinstance(last, Finished)
    assert last.used is not None
    assert last.used.prompt == 10
    assert isinstance(HAPPENING.decode(house.events[1].body), Stopped)


@pytest.mark.parametrize("outputs", [("a",), ()])
async def test_all_that_was_wanted_of_a_run_is_wanted_of_one_like_it(outputs: tuple[str, ...]) -> None:
    given = workflow(llm("a", "x"), llm("b", "{{a}}"), outputs=outputs)
    house = House()
    async with house.log:
        run = house.run(given, Worker(house.clock))
        run.begin()
        run.append(Appended(workflow(llm("c", "{{a}}"), llm("d", "{{c}}")).calls))
        await settled(run, "d")
        run.leave()
    assert run.told.whole().outputs == (("a", "d") if outputs else ())


async def test_a_variable_that_is_wanted_at_a_time_is_wanted_then_after_a_restart() -> None:
    given = workflow(llm("a", "{{ok}}"), variables={"ok": {"open": True}})
    house = House()
    async with house.log:
        run = house.run(given, Worker(house.clock))
        run.begin()
        run.want("a", "latency", 20.0)
        run.want("a", "latency", 25.0)
        await stop(house, run)
    house.clock.advance(5.0)
    left: list[float | None] = []

    async def say(start: Start) -> Done | Failed:
        left.append(start.standing.left_s)
        return Done(start.call, start.epoch, "x")

    house.log = RunLog(house.telling.counting(house._write), house.clock)
    async with house.log:
        run = house.run(given, Worker(house.clock, say))
        run.begin()
        run.put(Put("ok", "yes"))
        await settled(run, "a")
        run.leave()
    assert left == [15.0]
