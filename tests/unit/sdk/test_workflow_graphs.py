"""What programs write down is exactly this JSON, and the gateway's own executor takes it."""

from collections.abc import Callable
from typing import Any

import forebay
import pytest
from forebay import Budget, Input, Retry, Var, embed, join, llm, prompt, tool
from pydantic import BaseModel

from tests.unit.sdk.running import RunningGateway


class Report(BaseModel):
    summary: str
    risks: list[str]


class Verdict(BaseModel):
    approved: bool


@llm(model="m", max_tokens=50)
def first(chunk: Input[str]) -> str:
    return f"Summarize:\n{chunk}"


@llm(model="m", max_tokens=50)
def refine(so_far: Input[str], chunk: Input[str]) -> str:
    return f"Summary: {so_far}\nMore: {chunk}"


@llm(model="m")
def reduce(parts: Var[list[str]]) -> Report:
    return prompt("Combine:\n" + join(parts, "\n"))


@llm(model="m")
def judge(text: Input[str]) -> Verdict:
    return prompt(f"Is it good? {text}")


@tool(where="client")
def check(code: str, strict: bool = False) -> Verdict:
    return Verdict(approved=strict)


async def written(write: Callable[[forebay.AsyncRun], object], **options: Any) -> Any:
    """Return what is posted for a graph; the executor has accepted it."""
    gateway = RunningGateway(lambda body: "text")
    async with gateway.client() as client:
        run = client.run(**options)
        with run._graph.root.written():
            write(run)
        await run.submit()
    return gateway.submitted[0]


def asked(content: str, **more: Any) -> dict[str, Any]:
    """Return the request of a user's message."""
    return {"model": "m", **more, "messages": [{"role": "user", "content": content}]}


async def test_a_chain() -> None:
    body = await written(lambda run: refine(refine(first("a"), "b"), "c"))

    assert body == {
        "calls": [
            {"kind": "llm", "id": "first", "request": asked("Summarize:\na", max_tokens=50)},
            {"kind": "llm", "id": "refine", "request": asked("Summary: {{first}}\nMore: b", max_tokens=50)},
            {"kind": "llm", "id": "refine_2", "request": asked("Summary: {{refine}}\nMore: c", max_tokens=50)},
        ]
    }


async def test_a_map_and_what_combines_it() -> None:
    def write(run: forebay.AsyncRun) -> None:
        parts = first.map(["x", "{{y}}"], max_parallel=8, on_error="skip")
        reduce(parts.at_least(0.9))

    body = await written(write, app="sum", deadline=20, budget=Budget(tokens=9), objective="throughput")

    assert body == {
        "app": "sum",
        "objective": "throughput",
        "deadline_s": 20,
        "budget": {"tokens": 9},
        "calls": [
            {
                "kind": "llm",
                "id": "first",
                "foreach": ["x", '{{"{{"}}y}}'],
                "max_parallel": 8,
                "request": asked("Summarize:\n{{item}}", max_tokens=50),
                "on_error": "skip",
            },
            {
                "kind": "llm",
                "id": "reduce",
                "request": asked("Combine:\n{{first | join('\\n')}}"),
                "schema": Report.model_json_schema(),
                "min_inputs": 0.9,
            },
        ],
    }


async def test_a_map_over_a_list_within_a_variable() -> None:
    body = await written(lambda run: first.map(judge("a").json("$.files", list[str])))

    assert body["calls"][1]["foreach"] == "{{judge | json('$.files')}}"
    assert body["calls"][1]["request"] == asked("Summarize:\n{{item}}", max_tokens=50)


async def test_a_prompt_may_be_chat_messages() -> None:
    @llm(model="m")
    def chat(question: Input[str]) -> str:
        return prompt([{"role": "system", "content": "Be {short}."}, {"role": "user", "content": f"{question}"}])

    body = await written(lambda run: chat(first("a")))

    assert body["calls"][1]["request"]["messages"] == [
        {"role": "system", "content": "Be {short}."},
        {"role": "user", "content": "{{first}}"},
    ]


async def test_a_variable_that_is_a_whole_prompt_stands_there_as_text() -> None:
    @llm(model="m")
    def tell(what: Var[Any]) -> str:
        return f"{what}"

    body = await written(lambda run: tell(judge("a")))

    assert body["calls"][1]["request"] == asked("{{judge | text}}")


async def test_a_variable_that_is_no_text_can_be_part_of_one() -> None:
    body = await written(lambda run: first(judge("a")))  # type: ignore[arg-type]

    assert body["calls"][1]["request"] == asked("Summarize:\n{{judge}}", max_tokens=50)


async def test_terms_of_a_call() -> None:
    def write(run: forebay.AsyncRun) -> None:
        early = first("a")
        patient = first.using(model="n", timeout=9, retry=Retry(1, ["engine"]), needs=[early], temperature=0)
        patient.using(name="fall back", on_error="default", default="{{nothing}}")("b")

    body = await written(write)

    assert body["calls"][1] == {
        "kind": "llm",
        "id": "fall_back",
        "request": {**asked("Summarize:\nb", max_tokens=50), "model": "n", "temperature": 0},
        "timeout_s": 9,
        "retry": {"max": 1, "on": ["engine"], "backoff_s": 0.2},
        "on_error": "default",
        "default": "{{nothing}}",
        "needs": ["first"],
    }


async def test_a_branch_has_bodies_with_the_calls_of_its_functions() -> None:
    def write(run: forebay.AsyncRun) -> None:
        doc = first("a")
        run.branch(~judge("b").json("$.approved"), then=lambda: refine(doc, "c"), orelse=lambda: doc)

    body = await written(write)

    assert body["calls"][2] == {
        "kind": "branch",
        "id": "branch",
        "if": "{{judge | json('$.approved') | not}}",
        "then": {
            "calls": [{"kind": "llm", "id": "refine", "request": asked("Summary: {{first}}\nMore: c", max_tokens=50)}],
            "result": "{{refine}}",
        },
        "else": {"calls": [], "result": "{{first}}"},
    }


async def test_a_loop_has_the_calls_of_its_block() -> None:
    def write(run: forebay.AsyncRun) -> None:
        with run.loop(state=first("a"), max_iter=3) as it:
            verdict = judge(it.state)
            it.next(refine(it.state, "b"))
            it.until(verdict.json("$.approved"))
            it.gives(it.state)
        first.using(name="last")(it.result)

    body = await written(write)

    assert body["calls"][1] == {
        "kind": "loop",
        "id": "loop",
        "state": {"state": "{{first}}"},
        "calls": [
            {
                "kind": "llm",
                "id": "judge",
                "request": asked("Is it good? {{state}}"),
                "schema": Verdict.model_json_schema(),
            },
            {"kind": "llm", "id": "refine", "request": asked("Summary: {{state}}\nMore: b", max_tokens=50)},
        ],
        "next": {"state": "{{refine}}"},
        "until": "{{judge | json('$.approved')}}",
        "result": "{{state}}",
        "max_iterations": 3,
    }
    assert body["calls"][2]["request"] == asked("Summarize:\n{{loop}}", max_tokens=50)


async def test_a_race_has_a_body_for_each() -> None:
    def write(run: forebay.AsyncRun) -> None:
        begun = first("a")
        run.race(begun, lambda: first.using(model="small", name="other")("a"), after=4)
        run.race_for(2, lambda: first("b"), lambda: first("c"), lambda: first("d"), name="votes")

    body = await written(write)

    assert body["calls"][1] == {
        "kind": "race",
        "id": "race",
        "of": [
            {"calls": [], "result": "{{first}}"},
            {
                "calls": [
                    {
                        "kind": "llm",
                        "id": "other",
                        "request": {**asked("Summarize:\na", max_tokens=50), "model": "small"},
                    }
                ],
                "result": "{{other}}",
            },
        ],
        "after_s": 4,
    }
    assert body["calls"][2]["first"] == 2
    assert len(body["calls"][2]["of"]) == 3


async def test_a_body_for_each_element_goes_its_own_way() -> None:
    def write(run: forebay.AsyncRun) -> None:
        run.map(["a", "b"], lambda chunk: refine(first(chunk), chunk), on_error="skip")

    body = await written(write)

    assert body["calls"] == [
        {
            "kind": "workflow",
            "id": "map",
            "foreach": ["a", "b"],
            "inputs": {},
            "body": {
                "calls": [
                    {"kind": "llm", "id": "first", "request": asked("Summarize:\n{{item}}", max_tokens=50)},
                    {
                        "kind": "llm",
                        "id": "refine",
                        "request": asked("Summary: {{first}}\nMore: {{item}}", max_tokens=50),
                    },
                ],
                "result": "{{refine}}",
            },
            "on_error": "skip",
        }
    ]


async def test_an_element_within_an_element_has_a_name_of_its_own() -> None:
    def write(run: forebay.AsyncRun) -> None:
        run.map([["a"], ["b"]], lambda row: refine.map(row, row))

    inner = (await written(write))["calls"][0]["body"]["calls"][0]

    assert inner["foreach"] == "{{item}}"
    assert inner["item"] == "item_2"
    assert inner["request"] == asked("Summary: {{item_2}}\nMore: {{item}}", max_tokens=50)


async def test_tools_of_this_process_and_behind_urls() -> None:
    search = tool(url="http://s/x", name="search", returns=list[str], headers={"x-key": "k"}, at_most_once=True)
    weather = tool(url="http://m/mcp", name="weather", returns=str, mcp=True)

    def write(run: forebay.AsyncRun) -> None:
        check(first("a"), strict=True)
        search(query=first("b"), most=3)
        weather.map(["x"], lambda place: {"place": place})

    body = await written(write)

    assert [call for call in body["calls"] if call["kind"] == "tool"] == [
        {
            "kind": "tool",
            "id": "check",
            "server": {"type": "client", "tool": "check"},
            "arguments": {"code": "{{first}}", "strict": True},
        },
        {
            "kind": "tool",
            "id": "search",
            "server": {"type": "http", "url": "http://s/x", "headers": {"x-key": "k"}},
            "arguments": {"query": "{{first_2}}", "most": 3},
            "at_most_once": True,
        },
        {
            "kind": "tool",
            "id": "weather",
            "foreach": ["x"],
            "server": {"type": "mcp", "url": "http://m/mcp", "tool": "weather"},
            "arguments": {"place": "{{item}}"},
        },
    ]


async def test_embeddings_values_and_open_variables() -> None:
    def write(run: forebay.AsyncRun) -> None:
        embed(first("a"), model="e")
        approval = run.open("approval", bool)
        run.let({"ok": approval, "told": f"{approval}!", "report": Report(summary="{{s}}", risks=[])}, name="all")

    body = await written(write)

    assert body["variables"] == {"approval": {"open": True}}
    assert body["calls"][1:] == [
        {"kind": "embed", "id": "embed", "request": {"model": "e", "input": "{{first}}"}},
        {
            "kind": "transform",
            "id": "all",
            "value": {
                "ok": "{{approval}}",
                "told": "{{approval}}!",
                "report": {"summary": '{{"{{"}}s}}', "risks": []},
            },
        },
    ]


def expressions(var: Var[str]) -> dict[str, Var[Any]]:
    return {
        "v | json('$.a')": var.json("$.a"),
        "v | regex('a(b)', 1)": var.regex("a(b)", 1),
        "v | matches('x')": var.matches("x"),
        "v | split(',') | item(0)": var.split(",").item(0),
        "v | lines | length": var.lines().length(),
        "v | strip | lower | truncate(3)": var.strip().lower().truncate(3),
        "v | code | text": var.code().text(),
        "v | contains('it\\'s \"so\"')": var.contains('it\'s "so"'),
        "v | equals([1, None, {'a': {'b': True } }])": var.equals([1, None, {"a": {"b": True}}]),
        "v | all('$.ok') | not": ~var.all("$.ok"),
        "v | any('$.ok')": var.any("$.ok"),
        "v | choose({'yes': 1, '*': 0 })": var.choose({"yes": 1, "*": 0}),
        "v | split(',') | join('; ')": var.split(",").join("; "),
    }


async def test_transforms_are_methods() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        for expression, var in expressions(first.using(name="v")("x")).items():
            assert var.expression == expression
            run.let(var)


async def test_types_go_with_variables() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        parts = first.map(["a"])
        assert parts.kind == list[str]
        assert parts.item(0).kind is str
        assert parts.join(",").kind is str
        assert judge("a").json("$.x").kind is Any
        assert judge("a").json("$.x", list[int]).item(-1).kind is int


# What cannot be written


def test_a_call_outside_of_a_run_is_refused() -> None:
    with pytest.raises(forebay.GraphError, match="there is no run"):
        first("a")


async def test_what_belongs_to_a_body_cannot_be_used_outside() -> None:
    inside: list[Var[str]] = []
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:

        def body() -> Var[str]:
            inside.append(first("a"))
            return inside[0]

        run.branch(judge("b").json("$.approved"), then=body)
        with pytest.raises(forebay.GraphError, match="body of a call"):
            refine(inside[0], "c")
        with pytest.raises(forebay.GraphError, match="body of a call"):
            await inside[0]


async def test_a_variable_of_another_run_is_refused() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client:
        async with client.run():
            other = first("a")
        async with client.run():
            with pytest.raises(forebay.GraphError, match="another run"):
                refine(other, "b")
            with pytest.raises(forebay.GraphError, match="another run"):
                embed(other, model="e")


async def test_a_variable_has_no_truth_value_and_no_format() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        var = first("a")
        with pytest.raises(TypeError, match="has no value yet"):
            assert var
        with pytest.raises(TypeError, match="no value yet that could be formatted"):
            f"{var:>10}"
        with pytest.raises(TypeError, match="cannot hold a variable"):
            var.contains(f"{var}")
        assert repr(var) == "<Var first>"


@pytest.mark.parametrize("returned", [3, None, ["text"]])
async def test_a_prompt_is_a_text_or_messages(returned: Any) -> None:
    @llm(model="m")
    def odd() -> str:
        return prompt(returned)

    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        with pytest.raises(forebay.GraphError, match="odd returned"):
            odd()


async def test_a_loop_says_how_it_goes_on_and_ends() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run() as run:
        with pytest.raises(forebay.GraphError, match="a loop needs both"), run.loop(state=first("a"), max_iter=1) as it:
            it.next(it.state)
        with pytest.raises(forebay.GraphError, match="after its `with` block"):
            assert it.result


async def test_two_tools_of_one_name_are_refused() -> None:
    @tool(name="check")
    def other(code: str) -> str:
        return code

    gateway = RunningGateway()
    async with gateway.client() as client:
        run = client.run()
        with run._graph.root.written():
            check("a")
            with pytest.raises(forebay.GraphError, match="two tools of this run are named 'check'"):
                other("b")


def test_a_tool_has_parameters_with_names() -> None:
    with pytest.raises(TypeError, match="the parameters of a tool have names"):

        @tool()
        def odd(*parts: str) -> str:
            return "".join(parts)


async def test_names_of_variables_are_such_that_the_gateway_takes_them() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client, client.run():
        names = [first.using(name=wish)("a").name for wish in ["item", "1 ü", "a" * 90, "a" * 90, "", "x", "x", "x_2"]]

    assert names == ["item_2", "_1__", "a" * 56, "a" * 56 + "_2", "first", "x", "x_2", "x_2_2"]
