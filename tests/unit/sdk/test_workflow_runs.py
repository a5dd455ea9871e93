"""Runs: what is sent when, and that whoever waits is told."""

import asyncio
import io
import json
from typing import Any

import forebay
import httpx
import pytest
from forebay import Input, Piece, Var, events, join, llm, prompt, tool
from forebay.workflows._feed import Told
from forebay.workflows._pieces import Pieces
from forebay.workflows._progress import Progress
from pydantic import BaseModel

from tests.unit.sdk.gateway import error
from tests.unit.sdk.running import RunningGateway, echo


class Report(BaseModel):
    summary: str
    parts: int


class Check(BaseModel):
    failed: bool


@llm(model="m")
def step(text: Input[str]) -> str:
    return f"{text}"


@llm(model="m")
def report(parts: Var[list[str]]) -> Report:
    return prompt(join(parts, "+"))


def engine(body: Any) -> Any:
    said = body["messages"][-1]["content"]
    if "bad" in said:
        raise ValueError(f"cannot do {said}")
    return {"summary": said, "parts": said.count("+") + 1} if "[" in said else f"[{said}]"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting takes no time and is written down."""
    told: list[float] = []

    async def asleep(seconds: float) -> None:
        told.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", asleep)
    return told


async def test_a_chain_is_one_request_and_one_value() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        last = step(step(step("a")))
        assert (run.id, gateway.asked) == (None, [])

        assert await last == "[[[a]]]"

    assert run.id == "run_1"
    assert gateway.asked == ["POST workflows", "GET variables/run_1.step_3"]


async def test_those_who_wait_at_a_time_share_the_request() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        values = await asyncio.gather(step("a").get(), step("b").get("throughput"))

    assert list(values) == ["[a]", "[b]"]
    assert gateway.asked.count("POST workflows") == 1
    assert gateway.criteria == {"step": "latency", "step_2": "throughput"}


async def test_what_is_written_after_an_await_is_appended() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        first = step("a")
        assert await first == "[a]"
        assert await step(first) == "[[a]]"

    assert gateway.asked == [
        "POST workflows",
        "GET variables/run_1.step",
        "POST workflows/run_1/calls",
        "GET variables/run_1.step_2",
    ]
    assert [call["id"] for call in gateway.submitted[1]["calls"]] == ["step_2"]


async def test_a_model_gives_a_value_of_the_type_that_was_promised() -> None:
    gateway = RunningGateway(engine)
    async with gateway.client() as client, client.run():
        made: Report = await report(step.map(["a", "b"]))

    assert made == Report(summary="[a]+[b]", parts=2)


async def test_a_map_goes_on_without_those_that_failed() -> None:
    gateway = RunningGateway(engine)
    async with gateway.client() as client, client.run():
        parts = step.map(["a", "bad", "c"], on_error="skip")
        assert (await report(parts.at_least(0.5))).parts == 2
        with pytest.raises(forebay.CallFailed) as caught:
            await report(parts.at_least(0.9))

    assert (caught.value.code, caught.value.call, caught.value.variable) == ("min_inputs", "report_2", "report_2")


async def test_what_a_transform_makes_can_be_awaited() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        var = step("a,b").strip().split(",")

        assert await var == ["[a", "b]"]
        assert await var == ["[a", "b]"]

    assert len(gateway.submitted) == 1


async def test_bodies_run_at_the_gateway() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        with run.loop(state=step("a"), max_iter=5) as it:
            longer = step(it.state)
            it.next(longer)
            it.until(longer.contains("[[[["))
        raced = run.race(lambda: step("x"), lambda: step("y"))
        chosen = run.branch(it.result.contains("z"), then=lambda: step("yes"), orelse=lambda: step(raced))
        each = run.map(["p", "q"], lambda text: step(step(text)))

        assert await it.result == "[[[[a]]]]"
        assert await chosen == "[[x]]"
        assert await each == ["[[p]]", "[[q]]"]

    assert len(gateway.submitted) == 1


async def test_a_value_that_looks_like_a_template_stays_as_it_is() -> None:
    gateway = RunningGateway()
    text = 'a {{b}} {{"{{"}} {'
    async with gateway.client() as client, client.run():
        assert await step(step(text)) == f"[[{text}]]"


async def test_an_open_variable_is_set_by_the_program() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        approval = run.open("approval", bool)
        answer = run.branch(approval, then=lambda: step("yes"))
        await run.set(approval, True)

        assert await answer == "[yes]"
        with pytest.raises(forebay.Conflict):
            await run.set(approval, False)


async def test_a_run_tells_its_usage_its_state_and_its_graph() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        step("a")

        assert await run.usage() == {"tokens": 7, "cost": 0.5}
        assert await run.status() == forebay.RunStatus("run_1", "done", {"step": "done"}, {"tokens": 7, "cost": 0.5})
        assert await run.graph("mermaid") == "a graph as mermaid"


PARTS = {"client_s": 0.0, "held_s": 0.0, "queue_s": 0.25, "engine_s": 0.5, "other_s": 0.25}
STEP: dict[str, Any] = {
    "call": "step", "kind": "llm", "state": "done", "attempts": 1, "started_at": 10.0, "ended_at": 11.0,
    "cached_tokens": 4, **PARTS,
}  # fmt: skip
PATH = {"calls": [{**STEP, "new": 1}], "seconds": 1.0, **PARTS, "round_trips_saved": 0, "prefill_saved": 4, "new": 1}


async def test_a_run_tells_what_took_its_time() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        await step("a")
        gateway.fails.append(httpx.Response(200, json={"critical_path": PATH}))
        path = await run.critical_path()
        assert gateway.requests[-1].url.params["critical_path"] == "true"
        assert await run.critical_path() is None, "an older gateway does not tell"

    assert path == forebay.CriticalPath(
        (forebay.workflows.Step(**STEP),), 1.0, **PARTS, round_trips_saved=0, prefill_saved=4
    )


async def test_a_critical_path_that_lacks_something_is_a_malformed_answer() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        await step("a")
        gateway.fails.append(httpx.Response(200, json={"critical_path": {"calls": []}}))
        with pytest.raises(forebay.MalformedAnswer, match="seconds"):
            await run.critical_path()


async def test_a_run_tells_how_many_calls_there_are_in_each_state() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        await step("a")
        told = {"state": "running", "variables": {}, "calls": {"running": 2, "done": 1, "failed": 0}}
        gateway.fails.append(httpx.Response(200, json=told))
        assert (await run.status()).calls == {"running": 2, "done": 1}


async def test_nothing_can_be_asked_of_a_run_without_calls() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        with pytest.raises(forebay.GraphError, match="no calls yet"):
            await run.usage()

    assert gateway.asked == []


async def test_leaving_the_block_sends_what_was_written() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        step("a")

    assert gateway.asked == ["POST workflows"]


async def test_leaving_the_block_by_an_exception_cancels_the_run() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client:
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 # the block is what is tested
            async with client.run() as run:
                run.open("never", str)
                await run.submit()
                raise ZeroDivisionError

    assert gateway.asked == ["POST workflows", "POST workflows/run_1/cancel"]


async def test_tasks_beside_each_other_write_each_to_its_own_run() -> None:
    async def one(text: str) -> tuple[str, int]:
        gateway = RunningGateway()
        async with gateway.client() as client, client.run():
            var = step(text)
            await asyncio.sleep(0)
            value = await step(var)
        return value, len(gateway.submitted[0]["calls"])

    assert list(await asyncio.gather(one("a"), one("b"))) == [("[[a]]", 2), ("[[b]]", 2)]


async def test_a_program_resumes_an_earlier_run() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run(app="again", resume="run_0") as run:
        assert await step("a") == "[a]"
        assert run.id == "run_1"

    assert gateway.asked[0] == "POST workflows/run_0/resume"
    assert gateway.submitted[0]["app"] == "again"


async def test_a_thousand_can_wait_with_few_connections() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        gate = run.open("gate", str)
        waiting = [asyncio.create_task(step(gate).get()) for _ in range(1000)]
        await asyncio.sleep(0)
        await run.set(gate, "a")
        assert set(await asyncio.gather(*waiting)) == {"[a]"}

    assert gateway.most_waiting <= 50
    assert len(gateway.submitted) == 1


async def test_a_gateway_that_does_not_wait_is_asked_now_and_then(waits: list[float]) -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        var = step("a")
        await run.submit()
        gateway.fails.extend([httpx.Response(202, json={"state": "pending"})] * 2)

        assert await var == "[a]"

    assert waits == [0.2, 0.2]


async def test_a_short_timeout_of_the_client_does_not_cut_what_waits() -> None:
    gateway = RunningGateway()
    async with gateway.client(timeout=5) as client, client.run() as run:
        await step("a")
        assert [event async for event in run.events()]

    timeouts = [request.extensions["timeout"]["read"] for request in gateway.requests]
    assert timeouts == [5, 60, 60]


# Errors


async def test_a_failure_names_the_call_where_it_began_and_the_variable() -> None:
    gateway = RunningGateway(engine)
    async with gateway.client() as client, client.run():
        last = step(step("bad"))
        with pytest.raises(forebay.CallFailed) as caught:
            await last

    assert (caught.value.call, caught.value.variable, caught.value.run) == ("step", "step_2", "run_1")
    assert "began in call 'step'" in str(caught.value)


async def test_what_is_skipped_is_told_as_that() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        skipped = run.branch(step("a").contains("b"), then=lambda: step("c"))
        with pytest.raises(forebay.CallSkipped):
            await skipped


async def test_what_is_cancelled_is_told_as_that() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        later = step(run.open("never", str))
        waiting = asyncio.create_task(later.get())
        await run.submit()
        await run.cancel(later)
        with pytest.raises(forebay.CallCancelled):
            await waiting


async def test_a_value_of_another_type_is_told_as_malformed() -> None:
    gateway = RunningGateway(lambda body: {"summary": 3})
    async with gateway.client() as client, client.run() as run:
        with pytest.raises(forebay.MalformedAnswer, match="is not a"):
            await report(run.let(["a"]))


async def test_a_lost_answer_is_asked_for_again_with_the_same_key(waits: list[float]) -> None:
    gateway = RunningGateway()
    gateway.fails.extend([httpx.ReadTimeout("silent"), error(503)])
    async with gateway.client() as client, client.run():
        assert await step("a") == "[a]"

    keys = [request.headers["idempotency-key"] for request in gateway.requests[:3]]
    assert len(set(keys)) == 1
    assert len(gateway.submitted) == 1


async def test_what_could_not_be_sent_is_sent_when_it_is_awaited_again(waits: list[float]) -> None:
    gateway = RunningGateway()
    gateway.fails.extend([httpx.ConnectError("refused")])
    async with gateway.client(max_retries=0) as client, client.run():
        var = step("a")
        with pytest.raises(forebay.ConnectionFailed):
            await var

        assert await step(var) == "[[a]]"

    keys = [request.headers.get("idempotency-key") for request in gateway.requests[:2]]
    assert keys[0] == keys[1]


async def test_a_refused_graph_is_told_to_all_who_wait_for_it() -> None:
    gateway = RunningGateway()
    gateway.fails.append(error(400, "invalid"))
    async with gateway.client() as client, client.run():
        a, b = step("a"), step("b")
        for var in [a, b, a]:
            with pytest.raises(forebay.BadRequest):
                await var
        assert await step("c") == "[c]"


async def test_calls_that_had_arrived_are_not_told_as_a_conflict(waits: list[float]) -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        first = step("a")
        await first
        second = step(first)
        answer = gateway._route

        async def lost(request: httpx.Request, path: str) -> httpx.Response:
            gateway._route = answer  # type: ignore[method-assign]
            await answer(request, path)
            raise httpx.ReadError("lost")

        gateway._route = lost  # type: ignore[method-assign]

        assert await second == "[[a]]"

    assert gateway.asked.count("POST workflows/run_1/calls") == 2


# Streams and events


async def pieces_of(var: Var[Any]) -> list[tuple[str, bool]]:
    return [(str(piece), piece.restarts) async for piece in var]


async def test_a_variable_comes_in_pieces() -> None:
    gateway = RunningGateway(pieces=3)
    async with gateway.client() as client, client.run():
        assert await pieces_of(step("abcd")) == [("[a", False), ("bc", False), ("d]", False)]


async def test_pieces_that_were_missed_come_with_the_end(waits: list[float]) -> None:
    gateway = RunningGateway(pieces=3, cuts=[3])
    async with gateway.client() as client, client.run():
        assert await pieces_of(step("abcd")) == [("[a", False), ("bcd]", False)]


def handed_on(*told: events.Event | None) -> list[tuple[str, bool]]:
    """Return the pieces that come of events; None is a new connection."""
    pieces, is_anew, found = Pieces("v"), False, []
    for event in told:
        if event is not None and (piece := pieces.after(Told(event, None, is_anew))) is not None:
            found.append((str(piece), piece.restarts))
        is_anew = event is None
    return found


def delta(text: str, attempt: int = 1) -> events.VarDelta:
    return events.VarDelta("v", attempt, text)


STARTED = events.CallStarted("v", 1, None, None)
AGAIN = events.CallStarted("v", 2, None, None)


@pytest.mark.parametrize(
    ("told", "pieces"),
    [
        ([STARTED, delta("a"), delta("b"), events.VarDone("v", "ab", None)], [("a", False), ("b", False)]),
        ([delta("b"), events.VarDone("v", "ab", None)], [("ab", False)]),  # it had begun before
        (
            [STARTED, delta("a"), delta("c"), events.VarDone("v", "abc", None)],
            [("a", False), ("c", False), ("abc", True)],
        ),
        ([STARTED, delta("a"), None, delta("c"), events.VarDone("v", "abc", None)], [("a", False), ("bc", False)]),
        (
            [STARTED, delta("x"), AGAIN, delta("y", 1), delta("a", 2), events.CallRetried("v", 1, None), delta("b", 2)],
            [("x", False), ("", True), ("a", False), ("b", False)],
        ),
        ([STARTED, AGAIN, events.VarDone("v", "a", None)], [("a", False)]),
        ([events.VarDelta("w", 1, "a"), events.VarDone("w", "a", None)], []),
        ([STARTED, delta("{}"), events.VarDone("v", {}, None)], [("{}", False)]),
    ],
)
def test_the_pieces_that_are_handed_on_are_the_text(
    told: list[events.Event | None], pieces: list[tuple[str, bool]]
) -> None:
    assert handed_on(*told) == pieces


async def test_a_list_comes_as_a_whole() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        assert await pieces_of(step.map(["a", "b"])) == [('["[a]", "[b]"]', False)]


async def test_json_comes_in_pieces_too_or_as_a_whole() -> None:
    gateway = RunningGateway(engine)
    async with gateway.client() as client, client.run() as run:
        [(text, restarts)] = await pieces_of(report(run.let(["[a]"])))

    assert json.loads(text) == {"summary": "[a]", "parts": 1}
    assert not restarts


async def test_a_stream_of_what_fails_raises() -> None:
    gateway = RunningGateway(engine)
    async with gateway.client() as client, client.run():
        with pytest.raises(forebay.CallFailed):
            await pieces_of(step("bad"))


@pytest.mark.parametrize("cuts", [[], [1], [2, 0, 3], [0, 0, 1, 0, 1]])
async def test_events_are_told_once_and_in_order_over_any_number_of_connections(
    waits: list[float], cuts: list[int]
) -> None:
    gateway = RunningGateway(engine, cuts=cuts)
    async with gateway.client() as client, client.run() as run:
        step(step("a"))
        told = [event async for event in run.events() if not isinstance(event, events.VarDelta | events.CallStarted)]

    assert told == [
        events.RunStarted("run_1", ("step", "step_2")),
        events.VarDone("step", "[a]", None),
        events.VarDone("step_2", {"summary": "[a]", "parts": 1}, None),
        events.RunDone("run_1", {"tokens": 7}),
    ]


async def test_events_can_be_those_of_some_variables() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        first = step("a")
        step(first)
        told = [event async for event in run.events([first])]

    assert {event.variable for event in told if isinstance(event, events.VarDelta | events.VarDone)} == {"step"}
    assert isinstance(told[-1], events.RunDone)


async def test_an_end_before_more_was_appended_is_not_the_end() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        await step("a")
        step("b")
        told = [event async for event in run.events()]

    assert [type(event) for event in told].count(events.RunDone) == 2
    assert events.VarDone("step_2", "[b]", None) in told


async def test_a_connection_that_breaks_again_and_again_is_told(waits: list[float]) -> None:
    gateway = RunningGateway(cuts=[1, 0, 0, 0, 0])
    async with gateway.client() as client, client.run() as run:
        step("a")
        with pytest.raises(forebay.ConnectionFailed):
            assert [event async for event in run.events()]


@pytest.mark.parametrize(
    ("name", "data", "event"),
    [
        ("run.stopped", {"run": "r", "calls": []}, events.RunStopped("r", ())),
        (
            "run.wanted",
            {"run": "r", "variable": "v", "criteria": "latency"},
            events.RunWanted("r", "v", "latency"),
        ),
        ("call.attempted", {"call": "c", "variable": "v"}, events.CallAttempted("c", "v")),
        (
            "variable.failed",
            {"variable": "v", "error": {"code": "c", "message": "m", "call": "a"}},
            events.VarFailed("v", events.Failure("c", "m", "a"), None),
        ),
        ("variable.skipped", {"variable": "v"}, events.VarSkipped("v")),
        ("run.skipped", {"run": "r"}, events.RunSkipped("r", None)),
        ("run.cancelled", {"run": "r"}, events.RunCancelled("r", None)),
    ],
)
def test_events_are_read_as_they_are_told(name: str, data: dict[str, Any], event: events.Event) -> None:
    assert events.read(name, data) == event


def test_what_a_newer_gateway_tells_is_kept() -> None:
    assert events.read("run.paused", {"a": 1}) == events.Unknown("run.paused", {"a": 1})


# Tools of this process


async def test_a_tool_runs_here_when_its_arguments_are_there() -> None:
    ran: list[tuple[str, int]] = []

    @tool(where="client")
    async def check(code: str, level: int = 1) -> Check:
        ran.append((code, level))
        return Check(failed="b" in code)

    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        checks = check.map(step.map(["a", "b"]), level=2)

        assert await checks == [Check(failed=False), Check(failed=True)]
        assert await checks.any("$.failed") is True

    assert sorted(ran) == [("[a]", 2), ("[b]", 2)]
    assert gateway.asked.count("PUT variables/run_1.check[0]") == 1


async def test_a_tool_that_blocks_runs_in_a_thread() -> None:
    @tool()
    def check(report: Report) -> str:
        return f"{report.parts} parts"

    gateway = RunningGateway(engine)
    async with gateway.client() as client, client.run() as run:
        assert await step(check(report(run.let(["[a]", "b"])))) == "[2 parts]"


async def test_what_a_tool_raises_is_the_cause() -> None:
    @tool()
    async def check(code: str) -> str:
        raise RuntimeError(f"no compiler for {code}")

    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        last = step(check(step("a")))
        with pytest.raises(forebay.CallFailed, match="no compiler") as caught:
            await last

    assert isinstance(caught.value.__cause__, RuntimeError)
    assert (caught.value.call, caught.value.code) == ("check", "tool_failed")


async def test_a_tool_that_takes_too_long_has_failed() -> None:
    @tool(timeout=0.001)
    async def check(code: str) -> str:
        await asyncio.Event().wait()
        return code

    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        with pytest.raises(forebay.CallFailed) as caught:
            await check("a")

    assert isinstance(caught.value.__cause__, TimeoutError)


async def test_a_tool_that_nobody_wants_any_more_is_stopped() -> None:
    began, stopped = asyncio.Event(), asyncio.Event()

    @tool()
    async def check(code: str) -> str:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return code

    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        var = check("a")
        await run.submit()
        await began.wait()
        await run.cancel()
        with pytest.raises(forebay.CallCancelled):
            await var
        await stopped.wait()


async def test_a_tool_of_a_body_that_lost_its_race_is_stopped() -> None:
    stopped: list[str] = []

    @tool()
    async def slow(code: str) -> str:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(code)
        return code

    @tool()
    async def quick(code: str) -> str:
        await asyncio.sleep(0)
        return code

    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        assert await step(run.race(lambda: slow("a"), lambda: quick("b"))) == "[b]"

    assert stopped == ["a"]


async def test_a_call_that_is_gone_when_its_tool_is_done_does_not_matter() -> None:
    @tool()
    async def check(code: str) -> str:
        gateway.fails.append(error(404 if code == "a" else 409))
        return code

    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        waiting = [asyncio.create_task(check(code).get()) for code in "ab"]
        while sum(asked.startswith("PUT") for asked in gateway.asked) < 2:  # noqa: ASYNC110 # it is no other task
            await asyncio.sleep(0)
        await run.cancel()
        told = await asyncio.gather(*waiting, return_exceptions=True)

    assert [type(error) for error in told] == [forebay.CallCancelled] * 2


async def test_leaving_the_block_waits_for_a_run_that_needs_this_process() -> None:
    @tool()
    async def check(code: str) -> str:
        return code

    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        step(check(step("a")))

    assert gateway._outcomes["step_2"] == {"state": "done", "value": "[[a]]"}


async def test_who_waits_for_a_tool_is_told_when_the_gateway_cannot_be_followed(waits: list[float]) -> None:
    @tool()
    async def check(code: str) -> str:
        return code

    gateway = RunningGateway(cuts=[0, 0, 0])
    async with gateway.client() as client:
        with pytest.raises(forebay.ConnectionFailed):
            async with client.run():
                await check("a")


async def test_tools_run_for_calls_that_were_appended_too() -> None:
    @tool()
    async def check(code: str) -> str:
        return f"<{code}>"

    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        text = "a"
        for _ in range(3):
            text = await step(check(text))
        step(check(text))

    assert text == "[<[<[<a>]>]>]"
    assert gateway._outcomes["step_4"]["value"] == f"[<{text}>]"


async def test_a_refused_call_does_not_keep_the_block_waiting() -> None:
    @tool()
    async def check(code: str) -> str:
        return code

    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        assert await check("a") == "a"
        gateway.fails.append(error(413, "too_large"))
        with pytest.raises(forebay.BadRequest):
            await step("b")


async def test_an_event_may_come_before_the_answer_to_the_request() -> None:
    @tool()
    async def check(code: str) -> str:
        return code

    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        await step(check("a"))
        step("b")
        gateway.is_slow_to_answer = True  # everything has been told before

    assert gateway._outcomes["step_2"]["state"] == "done"


# Without an event loop


def test_a_client_without_a_loop_runs_workflows_too() -> None:
    @tool()
    def check(code: str) -> Check:
        return Check(failed="b" in code)

    gateway = RunningGateway(pieces=2)
    with forebay.Client("http://gw:1", api_key="k", transport=gateway.transport) as client, client.run() as run:
        last = step(step("ab"))
        told = [type(event).__name__ for event in run.events()]
        assert list(last) == ["[[a", "b]]"]
        assert all(isinstance(piece, Piece) for piece in last)
        assert last.result("throughput") == "[[ab]]"
        assert check(last).result() == Check(failed=True)
        assert run.usage()["tokens"] == 7
        assert run.status().variables["check"] == "done"
        assert run.graph() == "a graph as mermaid"
        gate = run.open("gate", str)
        run.set(gate, "c")
        assert step(gate).result() == "[c]"
        run.cancel()

    assert told[0] == "RunStarted"
    assert told[-1] == "RunDone"


def test_an_error_of_a_run_without_a_loop_is_raised() -> None:
    gateway = RunningGateway(engine)
    with forebay.Client("http://gw:1", transport=gateway.transport) as client:
        with pytest.raises(forebay.CallFailed), client.run():
            step("bad").result()
        with client.run() as run:
            assert run.id is None
            step("a")
            run.submit()


def test_a_variable_of_a_client_that_was_closed_is_told_so() -> None:
    gateway = RunningGateway()
    with forebay.Client("http://gw:1", transport=gateway.transport) as client, client.run():
        var = step("a")
        assert var.result() == "[a]"
    with pytest.raises(RuntimeError, match="the client is closed"):
        var.result()


def test_a_client_without_runs_has_no_thread() -> None:
    with forebay.Client("http://gw:1", transport=RunningGateway().transport) as client:
        assert client._background._open is None


def test_a_transport_that_cannot_be_awaited_is_refused() -> None:
    class Blocking(httpx.BaseTransport):
        pass

    with forebay.Client("http://gw:1", transport=Blocking()) as client, pytest.raises(TypeError, match="transport"):
        client.run()


async def test_blocking_in_an_event_loop_is_refused() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        var = step("a")
        with pytest.raises(TypeError, match="await var"):
            var.result()
        with pytest.raises(TypeError, match="async for piece in var"):
            list(var)


# Progress


def test_progress_is_one_line() -> None:
    out, times = io.StringIO(), iter([0.0, 0.0, 0.5, 1.0, 1.25, 2.0])
    progress = Progress("sum", out, lambda: next(times))

    told: list[events.Event] = [
        events.RunStarted("r", ("a", "b")),
        events.CallStarted("a", 1, None, None),
        events.VarDone("a", "x", None),
        events.VarDelta("b", 1, "text"),
        events.VarFailed("b", None, None),
        events.RunFailed("r", None),
    ]
    for event in told:
        progress.on(event)

    assert [line.rstrip(" ") for line in out.getvalue().split("\r")] == [
        "",
        "sum: 0/2 calls, 0 running, 0.0 s",
        "sum: 0/2 calls, 1 running, 0.5 s",
        "sum: 1/2 calls, 0 running, 1.0 s",
        "sum: 2/2 calls, 0 running, 1 failed, 1.2 s",
        "sum: 2/2 calls, 0 running, 1 failed, 2.0 s, failed\n",
    ]


async def test_a_run_with_progress_tells_it_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    @tool()
    async def check(code: str) -> str:
        return code

    gateway = RunningGateway(echo)
    async with gateway.client() as client, client.run(app="sum", progress=True):
        check(step("a"))

    assert "sum: 2/2 calls, 0 running" in capsys.readouterr().err
