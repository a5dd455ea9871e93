"""Types of user code, as a type checker sees them: mypy reads this file, and it runs as well."""

from typing import Any, assert_type

from forebay import Input, Var, embed, llm, prompt, tool
from pydantic import BaseModel

from tests.unit.sdk.running import RunningGateway


class Report(BaseModel):
    summary: str


@llm(model="m")
def summarize(text: Input[str], words: int = 10) -> str:
    return f"Summarize in {words} words:\n{text}"


@llm(model="m")
def report(parts: Var[list[str]]) -> Report:
    return prompt(f"{parts}")


@tool(where="client")
async def check(text: str) -> Report:
    return Report(summary=text)


@tool()
def count(text: str) -> int:
    return len(text)


search = tool(url="http://s", name="search", returns=list[str])


async def test_variables_have_the_types_that_functions_promise() -> None:
    gateway = RunningGateway()
    async with gateway.client() as client:
        run = client.run()
        with run._graph.root.written():
            text = assert_type(summarize("a", words=3), Var[str])
            parts = assert_type(summarize.map(["a"]), Var[list[str]])
            assert_type(summarize.using(model="n")(text), Var[str])
            made = assert_type(report(parts.at_least(0.5)), Var[Report])
            assert_type(report.map([["a"]]), Var[list[Report]])
            assert_type(check(text), Var[Report])
            assert_type(count(text), Var[int])
            assert_type(search(query=text), Var[list[str]])
            assert_type(parts.item(0), Var[str])
            assert_type(made.json("$.summary"), Var[Any])
            assert_type(made.json("$.summary", str), Var[str])
            assert_type(embed(text, model="e"), Var[list[float]])
            assert_type(embed(parts, model="e"), Var[list[list[float]]])
            assert_type(run.branch(text.contains("a"), then=lambda: text), Var[str])
            assert_type(run.branch(text.contains("a"), then=lambda: text, orelse=lambda: made), Var[str | Report])
            assert_type(run.race(lambda: text, lambda: summarize("b")), Var[str])
            assert_type(run.race_for(2, text, text), Var[list[str]])
            assert_type(run.map(parts, lambda part: report(part.split(","))), Var[list[Report]])
            assert_type(run.let({"a": 1}), Var[dict[str, int]])
            assert_type(run.let(text), Var[str])
            assert_type(run.open("gate", bool), Var[bool])
            with run.loop(state=text, max_iter=1) as it:
                it.next(summarize(it.state))
                it.until(assert_type(it.state, Var[str]).contains("a"))
            assert_type(it.result, Var[str])


async def test_values_have_the_types_of_their_variables() -> None:
    gateway = RunningGateway(lambda body: {"summary": "s"})
    async with gateway.client() as client, client.run() as run:
        assert assert_type(await run.let(Report(summary="{{x}}")), Report) == Report(summary="{{x}}")
        assert assert_type(await run.let("a {"), str) == "a {"
        made = report(run.let(["a"]))
        assert assert_type(await made, Report) == Report(summary="s")
        assert assert_type(await made.get("throughput"), Report).summary == "s"
