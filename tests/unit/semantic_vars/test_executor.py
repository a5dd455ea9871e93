"""What a run does, one rule a test."""

import random
from typing import Any

import pytest

from core.errors import Conflict, InvalidRequest, UnknownId
from semantic_vars.calls import Given, Http
from semantic_vars.events import Append, Cancel, Done, Errand, Failed, Put, Request, Tick, Want, Work
from semantic_vars.executor import Fact
from semantic_vars.graph import Bounds
from semantic_vars.instance import Scope, Variable
from semantic_vars.values import Value
from semantic_vars.variable import State, done
from tests.unit.semantic_vars.runs import Broken, Engine, Run, echo, llm, said, workflow

CHUNKS = {"chunks": {"value": ["a", "b", "c"]}}


def failing(*prompts: str, times: int = 1_000_000) -> Engine:
    left = dict.fromkeys(prompts, times)

    def engine(work: Work) -> Value:
        if left.get(said(work), 0) > 0:
            left[said(work)] -= 1
            raise Broken("it broke")
        return echo(work)

    return engine


def test_a_chain_runs_in_its_order() -> None:
    run = Run(workflow(llm("a", "one"), llm("b", "two {{a}}"), llm("c", "three {{b}}"))).finish()
    assert run.value("c") == "<three <two <one>>>"
    assert run.starts == ["a", "b", "c"]
    assert run.ended == [State.DONE]


def test_a_call_runs_when_its_own_inputs_are_there_and_waits_for_no_other() -> None:
    run = Run(workflow(llm("slow", "x"), llm("a", "y"), llm("b", "{{a}}"), llm("z", "{{slow}}{{b}}")))
    run.answer("a")
    assert set(run.started) == {"slow", "b"}


def test_values_are_data_and_never_read_as_templates() -> None:
    given = workflow(llm("a", "x"), llm("b", "{{a}}"), variables={"secret": {"value": "s"}})
    run = Run(given, engine=lambda work: "{{secret}}" if said(work) == "x" else said(work)).finish()
    assert run.value("b") == "{{secret}}"


def test_what_stands_in_a_prompt_is_text_whatever_the_variable_is() -> None:
    chat = {"model": "m", "messages": [{"role": "user", "content": "{{n}}"}, "odd"]}
    given = workflow(
        llm("a", "{{n}}"), {"kind": "llm", "id": "b", "request": chat}, variables={"n": {"value": [1, None]}}
    )
    run = Run(given)
    bodies = [start.work.body for start in run.started.values() if isinstance(start.work, Request)]
    assert bodies[0]["prompt"] == "[1,null]"
    assert bodies[1]["messages"] == [{"role": "user", "content": "[1,null]"}, "odd"]


def test_a_map_makes_one_call_for_each_element_and_keeps_their_order() -> None:
    given = workflow(llm("m", "{{index}}{{item}}", foreach="{{chunks}}"), variables=CHUNKS)
    run = Run(given)
    for path in ("m[2]", "m[0]", "m[1]"):
        run.answer(path)
    assert run.value("m") == ["<0a>", "<1b>", "<2c>"]


def test_a_map_has_no_more_calls_under_way_than_it_may() -> None:
    given = workflow(llm("m", "{{item}}", foreach="{{n}}", max_parallel=2), variables={"n": {"value": list(range(9))}})
    run = Run(given)
    while run.started:
        assert len(run.started) <= 2
        run.answer(next(iter(run.started)))
    assert len(run.value("m")) == 9


def test_a_map_over_nothing_is_an_empty_list() -> None:
    run = Run(workflow(llm("m", "{{item}}", foreach=[]), llm("r", "[{{m | join(',')}}]"))).finish()
    assert run.value("r") == "<[]>"


def test_a_list_inside_of_a_variable_is_mapped_once_it_is_known() -> None:
    given = workflow(llm("plan", "p"), llm("m", "{{item}}", foreach="{{plan | json('$.steps')}}"))
    run = Run(given, engine=lambda work: '{"steps": ["x", "y"]}' if said(work) == "p" else echo(work)).finish()
    assert run.value("m") == ["<x>", "<y>"]


def test_elements_that_fail_are_left_out_of_the_list_where_the_call_says_so() -> None:
    given = workflow(
        llm("m", "{{item}}", foreach="{{chunks}}", on_error="skip"),
        llm("some", "{{m | join('')}}", min_inputs=0.5),
        llm("all", "{{m | join('')}}", min_inputs=1),
        variables=CHUNKS,
    )
    run = Run(given, engine=failing("b")).finish()
    assert run.value("some") == "<<a><c>>"
    failure = run.executor.outcome("all").failure
    assert failure is not None
    assert (failure.code, failure.call) == ("min_inputs", "all")
    assert run.ended == [State.FAILED]


def test_a_failed_call_fails_what_needs_it_and_the_error_names_the_root() -> None:
    run = Run(
        workflow(llm("a", "x"), llm("b", "{{a}}"), llm("c", "{{b}}"), llm("d", "y")), engine=failing("x")
    ).finish()
    failure = run.executor.outcome("c").failure
    assert failure is not None
    assert (failure.code, failure.call) == ("upstream_failed", "a")
    assert "it broke" in failure.message
    assert run.value("d") == "<y>", "what does not need it goes on"


def test_a_default_stands_in_for_what_failed() -> None:
    given = workflow(llm("a", "x", on_error="default", default="none"), llm("b", "{{a}}"))
    assert Run(given, engine=failing("x")).finish().value("b") == "<none>"


def test_who_needs_what_was_skipped_is_skipped() -> None:
    run = Run(workflow(llm("a", "x", on_error="skip"), llm("b", "{{a}}")), engine=failing("x")).finish()
    assert run.executor.outcome("b").state is State.SKIPPED
    assert run.ended == [State.SKIPPED]


def test_a_call_is_tried_again_as_often_as_it_may_with_growing_pauses() -> None:
    given = workflow(llm("a", "x", retry={"max": 2, "backoff_s": 1}))
    run = Run(given, engine=failing("x", times=2)).finish()
    assert run.value("a") == "<x>"
    assert [one.attempt for one in run.retried] == [1, 2]
    assert run.now == 3.0


def test_what_an_earlier_attempt_says_late_is_dropped() -> None:
    run = Run(workflow(llm("a", "x", retry={"max": 1, "backoff_s": 0})))
    first = run.started.pop("a")
    run.on(Failed("a", first.epoch, "timeout", "timeout", "late"))
    run.on(Done("a", first.epoch, "too late"))
    assert run.executor.outcome("a").state is State.PENDING
    assert run.finish().value("a") == "<x>"


def test_errors_that_are_the_callers_are_not_tried_again() -> None:
    run = Run(workflow(llm("a", "x", retry={"max": 5})))
    start = run.started.pop("a")
    run.on(Failed("a", start.epoch, "engine", "invalid_request", "no such model", can_retry=False))
    assert run.ended == [State.FAILED]


def test_only_one_side_of_a_branch_is_made() -> None:
    given = workflow(
        llm("a", "x"),
        llm("unused", "never"),
        {
            "kind": "branch", "id": "b", "if": "{{a | contains('x')}}",
            "then": {"calls": [llm("yes", "yes {{a}}")], "result": "{{yes}}"},
            "else": {"calls": [llm("no", "no {{unused}}")], "result": "{{no}}"},
        },
        outputs=["b"],
    )  # fmt: skip
    run = Run(given).finish()
    assert run.value("b") == "<yes <x>>"
    assert run.starts == ["a", "b#then/yes"]


def test_a_branch_without_another_side_is_skipped() -> None:
    given = workflow({"kind": "branch", "id": "b", "if": False, "then": {"result": "x"}})
    assert Run(given).finish().executor.outcome("b").state is State.SKIPPED


def test_a_loop_ends_when_it_is_told_or_after_its_bound() -> None:
    loop = {
        "kind": "loop", "id": "l", "state": {"draft": "d"}, "max_iterations": 3,
        "calls": [llm("better", "{{draft}}")],
        "next": {"draft": "{{better}}"}, "until": "{{better | contains('<<d>>')}}", "result": "{{better}}",
    }  # fmt: skip
    run = Run(workflow(loop)).finish()
    assert run.value("l") == "<<d>>"
    assert run.starts == ["l#0/better", "l#1/better"]
    assert Run(workflow(loop | {"until": False})).finish().value("l") == "<<<d>>>"


def test_the_first_of_a_race_wins_and_the_losers_are_aborted() -> None:
    given = workflow(
        {
            "kind": "race", "id": "r",
            "of": [{"calls": [llm("x", p)], "result": "{{x}}"} for p in ("slow", "fast")],
        }
    )  # fmt: skip
    run = Run(given)
    run.answer("r#1/x")
    assert run.value("r") == "<fast>"
    assert list(run.aborted) == [("r#0/x", 1)]
    run.finish()
    assert run.executor.spent.tokens == 4 + 1


def test_a_race_begins_its_next_body_after_a_while_or_when_one_has_failed() -> None:
    body = [{"calls": [llm("x", p)], "result": "{{x}}"} for p in ("a", "b", "c")]
    run = Run(workflow({"kind": "race", "id": "r", "of": body, "after_s": 4}), engine=failing("a", "b"))
    assert list(run.started) == ["r#0/x"]
    run.answer("r#0/x")
    assert list(run.started) == ["r#1/x"]
    run.answer("r#1/x")
    assert run.finish().value("r") == "<c>"


def test_a_workflow_within_a_workflow_has_names_of_its_own() -> None:
    sub = {
        "kind": "workflow", "id": "s", "foreach": "{{chunks}}", "inputs": {"x": "{{item}}!"},
        "body": {"calls": [llm("a", "{{x}}"), llm("b", "{{a}}{{outer}}")], "result": "{{b}}"},
    }  # fmt: skip
    run = Run(workflow(sub, llm("outer", "o"), variables=CHUNKS)).finish(random.Random(1))
    assert run.value("s") == ["<<a!><o>>", "<<b!><o>>", "<<c!><o>>"]


def test_what_nobody_wants_is_not_made() -> None:
    run = Run(workflow(llm("a", "x"), llm("b", "y"), outputs=["a"])).finish()
    assert run.starts == ["a"]
    run.on(Want("b"))
    assert run.finish().value("b") == "<y>"
    assert run.ended == [State.DONE, State.DONE]


def test_calls_can_be_appended_and_use_what_is_there() -> None:
    run = Run(workflow(llm("a", "x"))).finish()
    run.on(Append(workflow(llm("b", "{{a}}")).calls))
    assert run.finish().value("b") == "<<x>>"


def test_calls_that_cannot_be_appended_change_nothing() -> None:
    run = Run(workflow(llm("a", "x")))
    with pytest.raises(InvalidRequest, match="'nowhere'"):
        run.on(Append(workflow(llm("b", "{{a}}"), llm("c", "{{nowhere}}")).calls))
    run.on(Append(workflow(llm("b", "{{a}}")).calls))
    assert run.finish().value("b") == "<<x>>"


def test_an_open_variable_is_set_once() -> None:
    run = Run(workflow(llm("a", "{{ok}}"), variables={"ok": {"open": True}}))
    assert not run.started
    run.on(Put("ok", "yes"))
    with pytest.raises(Conflict, match="set once"):
        run.on(Put("ok", "no"))
    assert run.finish().value("a") == "<yes>"
    with pytest.raises(Conflict):
        run.on(Put("a", "no"))


def test_a_variable_may_be_called_otherwise_than_its_call() -> None:
    given = [llm("a", "x", output="v"), llm("m", "{{item}}{{v}}", foreach=[1, 2], output="list"), llm("z", "{{list}}")]
    run = Run(workflow(*given)).finish()
    assert run.value("z") == '<["<1<x>>","<2<x>>"]>'
    assert run.starts == ["a", "m[0]", "m[1]", "z"]
    assert run.resolved.keys() == {"v", "list[0]", "list[1]", "list", "z"}
    assert Run(workflow(*given), facts=run.log).finish().starts == []


def test_nothing_is_begun_after_the_deadline() -> None:
    run = Run(workflow(llm("a", "x", on_error="default", default="d"), llm("b", "{{a}}"), deadline_s=5))
    run.now = 5.0
    run.on(Tick())
    assert run.finish().ended == [State.FAILED]
    assert run.starts == ["a"]


def test_a_tool_that_the_client_runs_is_answered_by_setting_its_output() -> None:
    tool = {
        "kind": "tool",
        "id": "t",
        "output": "tested",
        "server": {"type": "client", "tool": "tests"},
        "arguments": {"x": "{{a}}"},
    }
    run = Run(workflow(llm("a", "x"), tool))
    run.answer("a")
    run.started.pop("t")
    run.on(Put("tested", {"passed": True}))
    assert run.value("tested") == {"passed": True}


def test_a_tool_of_the_clients_may_fail_and_be_tried_again_wherever_it_stands() -> None:
    tool = {"kind": "tool", "id": "t", "output": "o", "server": {"type": "client", "tool": "x"}, "retry": {"max": 1}}
    body = {"calls": [tool], "result": "{{o}}"}
    run = Run(workflow({"kind": "workflow", "id": "w", "foreach": [1], "inputs": {}, "body": body}))
    assert {start.variable for start in run.started.values()} == {"w[0]/o"}
    run.started.clear()
    run.on(Put("w[0]/o", failure="it does not compile"))
    assert [one.code for one in run.retried] == ["tool_failed"]
    run.step()
    run.started.clear()
    run.on(Put("w[0]/o", failure="still not"))
    failure = run.executor.outcome("w").failure
    assert failure is not None
    assert "still not" in failure.message


def test_an_open_variable_may_be_said_to_have_no_value() -> None:
    run = Run(workflow(llm("a", "{{ok}}"), variables={"ok": {"open": True}}))
    run.on(Put("ok", failure="nobody is there"))
    failure = run.executor.outcome("a").failure
    assert failure is not None
    assert failure.call == "ok"


def test_a_run_that_is_asked_for_what_is_there_already_ends_again() -> None:
    run = Run(workflow(llm("a", "x"))).finish()
    run.on(Append(workflow({"kind": "transform", "id": "b", "value": "{{a}}"}).calls))
    run.on(Want("a", "throughput"))
    assert run.ended == [State.DONE] * 3


def test_a_cancelled_call_takes_what_only_it_needed_with_it() -> None:
    run = Run(workflow(llm("shared", "s"), llm("own", "o"), llm("a", "{{shared}}{{own}}"), llm("b", "{{shared}}")))
    run.on(Cancel(("a",)))
    assert [path for path, _ in run.aborted] == ["own"]
    run.finish()
    assert run.value("b") == "<<s>>"
    assert run.executor.outcome("a").state is State.CANCELLED
    assert run.ended == [State.CANCELLED]


def test_a_cancelled_run_ends_all_its_variables() -> None:
    given = workflow(
        llm("m", "{{item}}", foreach="{{chunks}}"), llm("r", "{{m}}{{ok}}"), variables=CHUNKS | {"ok": {"open": True}}
    )
    run = Run(given)
    run.on(Cancel())
    assert not run.started
    assert not run.ended, "what was aborted has yet to say what it has used"
    run.finish()
    assert run.ended == [State.CANCELLED]
    assert run.executor.num_running == 0
    assert run.executor.spent.tokens == 3
    with pytest.raises(UnknownId):
        run.on(Cancel(("nothing",)))


def test_a_run_ends_at_its_deadline() -> None:
    run = Run(workflow(llm("a", "x"), llm("b", "{{a}}{{ok}}"), variables={"ok": {"open": True}}, deadline_s=5))
    start = run.started["a"]
    run.now = 5.0
    run.on(Done("a", start.epoch - 1, "of another time"))
    failure = run.executor.outcome("b").failure
    assert failure is not None
    assert failure.code in {"deadline", "upstream_failed"}
    assert run.finish().ended == [State.FAILED]


def test_a_budget_is_shared_and_reserved_before_a_fan_out() -> None:
    given = workflow(
        llm("m", "{{item}}", foreach="{{n}}", on_error="skip"), variables={"n": {"value": list(range(9))}},
        budget={"tokens": 33},
    )  # fmt: skip
    run = Run(given)
    assert len(run.started) == 3
    run.finish()
    assert run.executor.spent.tokens <= 33
    assert len(run.value("m")) == 6, "4 each were used of 10 set aside, until 10 were not left"


def test_a_budget_that_is_used_up_fails_the_call_that_would_need_more() -> None:
    run = Run(workflow(llm("a", "x"), llm("b", "{{a}}"), budget={"tokens": 12})).finish()
    failure = run.executor.outcome("b").failure
    assert failure is not None
    assert (failure.code, failure.call) == ("budget_exhausted", "b")


def test_a_value_that_is_too_large_fails_the_call_that_made_it() -> None:
    run = Run(workflow(llm("a", "x")), engine=lambda _: "y" * 100, bounds=Bounds(value=50)).finish()
    failure = run.executor.outcome("a").failure
    assert failure is not None
    assert failure.code == "value_too_large"


def test_the_values_of_a_run_are_bounded_together() -> None:
    given = workflow(llm("m", "{{item}}", foreach=[1, 2, 3], on_error="skip"))
    run = Run(given, engine=lambda _: "y" * 40, bounds=Bounds(total=100)).finish()
    assert len(run.value("m")) == 2


def test_a_transform_that_cannot_be_made_fails_its_call_and_says_why() -> None:
    run = Run(workflow(llm("a", "x"), llm("b", "{{a | json('$.y')}}"))).finish()
    failure = run.executor.outcome("b").failure
    assert failure is not None
    assert (failure.code, failure.call) == ("transform", "b")
    assert "no JSON" in failure.message


def test_a_restarted_run_makes_no_call_twice() -> None:
    given = workflow(llm("m", "{{item}}", foreach="{{chunks}}"), llm("r", "{{m | join('')}}"), variables=CHUNKS)
    before = Run(given)
    before.answer("m[1]")
    after = Run(given, facts=before.log).finish()
    assert after.starts == ["m[0]", "m[2]", "r"]
    assert after.value("r") == "<<a><b><c>>"
    again = Run(given, facts=after.log).finish()
    assert again.starts == []
    assert again.value("r") == "<<a><b><c>>"


def test_an_edited_run_makes_only_the_calls_whose_inputs_have_changed() -> None:
    given = [llm("a", "x"), llm("b", "y"), llm("c", "{{a}}{{b}}")]
    before = Run(workflow(*given)).finish()
    after = Run(workflow(given[0], llm("b", "z"), given[2]), facts=before.log).finish()
    assert after.starts == ["b", "c"]
    assert after.value("c") == "<<x><z>>"


def test_a_race_that_was_won_is_won_by_the_same_after_a_restart() -> None:
    body = [{"calls": [llm("x", p)], "result": "{{x}}"} for p in ("a", "b")]
    given = workflow({"kind": "race", "id": "r", "of": body}, llm("z", "{{r}}"))
    before = Run(given)
    before.answer("r#1/x")
    after = Run(given, facts=before.log).finish()
    assert after.starts == ["z"]
    assert after.value("z") == "<<b>>"


def test_a_variable_that_was_set_from_outside_is_set_after_a_restart() -> None:
    given = workflow(llm("a", "{{ok}}"), variables={"ok": {"open": True}})
    facts = {"ok": Fact(Run(workflow(variables={"ok": {"value": "yes"}})).executor.outcome("ok"))}
    assert Run(given, facts=facts).finish().value("a") == "<yes>"


def test_the_map_of_a_hundred_thousand_elements_keeps_little_but_its_values() -> None:
    width = 100_000
    given = workflow(llm("m", "{{item}}", foreach="{{n}}"), variables={"n": {"value": list(range(width))}})
    run = Run(given, engine=lambda _: "ok")
    most = 0
    while run.step():
        most = max(most, len(run.executor._live))
    assert len(run.value("m")) == width
    assert most <= 66


def test_a_chain_of_five_thousand_calls_needs_no_stack() -> None:
    given = [llm("c0", "x")] + [llm(f"c{n}", f"{{{{c{n - 1} | truncate(3)}}}}") for n in range(1, 5_000)]
    assert Run(workflow(*given)).finish().value("c4999") == "<<<<>"


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ({"kind": "llm", "id": "a", "request": {"model": "m", "messages": "{{given}}"}}, "transform"),
        ({"kind": "transform", "id": "a", "value": "{{deep | json('$')}}"}, "transform"),
        ({"kind": "transform", "id": "a", "value": "{{huge | json('$[0]')}}"}, None),
        ({"kind": "embed", "id": "a", "request": {"model": "{{given}}", "input": "{{given}}"}}, None),
    ],
)
def test_whatever_a_value_is_the_call_fails_at_most_and_the_run_ends(call: dict[str, Any], code: str | None) -> None:
    given = {"given": {"value": {"x": 1}}, "deep": {"value": "[" * 100_000}, "huge": {"value": "[1" + "0" * 400 + "]"}}
    run = Run(workflow(call, variables=given), engine=lambda _: "x").finish()
    outcome = run.executor.outcome("a")
    assert (outcome.failure.code if outcome.failure is not None else None) == code
    assert len(run.ended) == 1


def test_messages_may_be_one_variable_that_is_a_list() -> None:
    history = [{"role": "user", "content": "Say one."}]
    call = {"kind": "llm", "id": "a", "request": {"model": "m", "messages": "{{history}}"}}
    run = Run(workflow(call, variables={"history": {"value": history}}))
    work = run.started["a"].work
    assert isinstance(work, Request)
    assert work.body["messages"] == history


def test_what_is_filled_into_the_address_and_the_headers_of_a_tool_is_text() -> None:
    server = {"type": "http", "url": "https://a.example/{{index}}", "headers": {"x-number": "{{index}}"}}
    run = Run(workflow({"kind": "tool", "id": "t", "foreach": ["p"], "server": server, "arguments": "{{item}}"}))
    work = run.started["t[0]"].work
    assert isinstance(work, Errand)
    assert isinstance(work.server, Http)
    assert (work.server.url, work.server.headers) == ("https://a.example/0", {"x-number": "0"})


def test_tools_that_wait_for_the_client_take_no_place_of_other_calls() -> None:
    tool = {"kind": "tool", "id": "t", "foreach": [1, 2, 3], "server": {"type": "client", "tool": "x"}, "arguments": 0}
    run = Run(workflow(tool, llm("a", "x")), parallel=2)
    assert set(run.started) == {"t[0]", "t[1]", "t[2]", "a"}


def test_a_budget_that_is_used_up_is_told_of_while_the_client_is_waited_for() -> None:
    tool = {"kind": "tool", "id": "t", "server": {"type": "client", "tool": "x"}, "arguments": 0}
    run = Run(workflow(tool, llm("a", "x"), budget={"tokens": 9}))
    failure = run.executor.outcome("a").failure
    assert failure is not None
    assert failure.message == "it may use 10 tokens, and the run's budget of 9 has 9 left"


def test_a_budget_in_money_is_told_of_in_money_and_holds_no_tool_up() -> None:
    tool = {"kind": "tool", "id": "t", "server": {"type": "http", "url": "https://a.example"}, "needs": ["a"]}
    run = Run(workflow(llm("a", "x"), llm("b", "{{a}}", on_error="skip"), tool, budget={"cost": 0.12})).finish()
    failure = run.executor.outcome("b").failure
    assert failure is not None
    assert failure.message == "it may cost 0.1, and the run's budget of 0.12 has 0.08 left"
    assert run.executor.outcome("t").state is State.DONE


def test_a_variable_that_was_set_in_another_run_is_told_of_in_this_one_and_no_call_is_taken_for_it() -> None:
    given = workflow(llm("a", "{{ok}}"), variables={"ok": {"open": True}})
    run = Run(given, facts={"ok": Fact(done("yes"))})
    assert run.resolved["ok"] is State.DONE
    run = Run(given, facts={"ok": Fact(done("a call's"), key="of a call")})
    assert run.executor.outcome("ok").state is State.PENDING


def test_a_variable_that_is_appended_open_after_the_deadline_fails() -> None:
    run = Run(workflow(deadline_s=1))
    run.now = 2.0
    run.on(Append(workflow(llm("a", "{{ok}}")).calls, {"ok": Given(open=True)}))
    assert run.executor.outcome("ok").state is run.executor.outcome("a").state is State.FAILED
    assert run.ended[-1] is State.FAILED


def test_a_fan_in_of_thousands_of_calls_costs_little_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [llm(f"c{number}", "x") for number in range(5_000)]
    prompt = "y" * 3_000 + "".join(f"{{{{c{number}}}}}" for number in range(999))
    needs = [f"c{number}" for number in range(5_000)]
    num_found, find = 0, Scope.find

    def count(scope: Scope, name: str) -> Variable:
        nonlocal num_found
        num_found += 1
        return find(scope, name)

    monkeypatch.setattr(Scope, "find", count)
    run = Run(workflow(*many, llm("r", prompt, needs=needs)), prefills=True).finish()
    assert run.executor.outcome("r").state is State.DONE
    assert "r" in run.prefilled
    assert num_found < 50 * len(many), "it was thousands for each while all inputs were looked at each time"


def test_a_variable_that_is_wanted_at_a_time_hurries_all_that_it_comes_of() -> None:
    given = workflow(llm("a", "{{ok}}"), llm("b", "{{a}}"), llm("c", "{{ok}}"), variables={"ok": {"open": True}})
    run = Run(given)
    run.now = 3.0
    run.on(Want("b", deadline_s=5.0))
    run.on(Want("b", deadline_s=9.0))
    run.now = 4.0
    run.on(Put("ok", "yes"))
    assert (run.started["a"].standing.left_s, run.started["c"].standing.left_s) == (4.0, None)
