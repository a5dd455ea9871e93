"""What a prompt begins with is told while the rest of it is being made."""

from semantic_vars.events import Put, Request
from tests.unit.semantic_vars.runs import Run, llm, workflow

LONG = "x" * 2_000


def beginnings(run: Run, path: str) -> set[int]:
    work = run.started[path].work
    assert isinstance(work, Request)
    return {one.digest for one in work.beginnings}


def test_the_constant_beginning_is_told_when_what_is_missing_has_started() -> None:
    run = Run(workflow(llm("a", "one"), llm("b", LONG + "{{a}} and more")))

    assert run.prefilled["b"].body == {"prompt": LONG, "model": "m"}
    run.answer("a")
    assert {one.digest for one in run.prefilled["b"].beginnings} < beginnings(run, "b")


def test_values_that_are_there_belong_to_the_beginning_of_messages_too() -> None:
    messages = [
        {"role": "system", "content": "{{doc}}"},
        {"role": "user", "content": [{"type": "text", "text": "Of this: {{a}}"}]},
        {"role": "user", "content": "never"},
    ]
    given = workflow(
        llm("a", "one"),
        {"kind": "llm", "id": "b", "request": {"model": "m", "messages": messages, "max_tokens": 9}},
        variables={"doc": {"value": LONG}},
    )
    run = Run(given)

    assert run.prefilled["b"].body == {
        "messages": [{"role": "system", "content": LONG}, {"role": "user", "content": "Of this: "}],
        "model": "m",
    }
    run.answer("a")
    assert {one.digest for one in run.prefilled["b"].beginnings} <= beginnings(run, "b")


def test_it_is_told_again_to_nobody_and_only_if_all_that_is_missing_is_on_its_way() -> None:
    given = workflow(
        llm("a", "one"), llm("b", LONG + "{{a}}{{open}}"), llm("c", LONG + "{{d}}"), llm("d", "{{a}}"),
        variables={"open": {"open": True}},
    )  # fmt: skip
    run = Run(given)
    assert not run.prefilled, "one waits for a person, and the other for what has not started"

    run.answer("a")

    assert run.prefilled.keys() == {"c"}
    run.on(Put("open", "y"))
    assert run.finish().prefilled.keys() == {"c"}


def test_nothing_is_told_of_short_beginnings_of_maps_or_where_it_is_switched_off() -> None:
    assert not Run(workflow(llm("a", "one"), llm("b", "short {{a}}"))).prefilled
    assert not Run(workflow(llm("a", "one"), llm("b", LONG + "{{item}}", foreach="{{a | lines}}"))).prefilled
    assert not Run(workflow(llm("a", "one"), llm("b", LONG + "{{a}}")), prefills=False).prefilled


def test_a_transform_that_fails_is_left_to_the_call_itself() -> None:
    prompt = "{{doc | json('$.x')}}" + LONG + "{{a}}"
    run = Run(workflow(llm("a", "one"), llm("b", prompt), variables={"doc": {"value": "no json"}}))

    assert not run.prefilled
    run.finish()
    assert run.executor.outcome("b").failure is not None
