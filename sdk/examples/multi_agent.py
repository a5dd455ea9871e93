"""Agents that plan, write, review, test and revise code: map, loop, race, branch, and a tool of this process.

    python multi_agent.py --model smollm2 "a command that counts words"

The tool only compiles what the model wrote; it is not run.
"""
# ruff: noqa: T201

import argparse
import asyncio
import os
from collections.abc import Sequence
from typing import Annotated

from forebay import AsyncClient, Input, Var, llm, prompt, tool
from pydantic import BaseModel, Field

MODEL = os.environ.get("FOREBAY_MODEL", "smollm2")


class Spec(BaseModel):
    """What the architect makes. The bounds hold the model too: without them a small one may never come to an end."""

    files: Annotated[list[Annotated[str, Field(min_length=1, max_length=40)]], Field(min_length=1, max_length=3)]


class Review(BaseModel):
    """What the reviewer makes."""

    approved: bool
    comments: Annotated[str, Field(max_length=200)]


class Check(BaseModel):
    """What the tool makes."""

    failed: bool
    message: str


@llm(model=MODEL, max_tokens=300, retry=2)
def architect(task: Input[str]) -> Spec:
    """Plan."""
    return prompt(f"Name the Python files that are needed for this, at most three, as JSON:\n{task}")


@llm(model=MODEL, max_tokens=300)
def coder(file: Input[str], task: Input[str]) -> str:
    """Write one file."""
    return f"Write the file {file} of this task, as one block of Python:\n{task}"


@llm(model=MODEL, max_tokens=300, retry=2)
def review(code: Input[str]) -> Review:
    """Judge one file."""
    return prompt(
        [
            {"role": "system", "content": "You review Python code. Answer in JSON."},
            {"role": "user", "content": f"{code}"},
        ]
    )


@llm(model=MODEL, max_tokens=300)
def revise(code: Input[str], judged: Input[Review], checked: Input[Check]) -> str:
    """Make one file better."""
    return f"Revise this code:\n{code}\nReview: {judged}\nCompiler: {checked}\nAnswer with one block of Python."


@tool(where="client", timeout=30)
def compiles(code: str) -> Check:
    """Compile one file, in this process."""
    source = code.rsplit("```python\n", maxsplit=1)[-1].split("```", maxsplit=1)[0]
    try:
        compile(source, "file", "exec")
    except SyntaxError as error:
        return Check(failed=True, message=str(error))
    return Check(failed=False, message="")


@llm(model=MODEL, max_tokens=200)
def write_docs(files: Var[list[str]]) -> str:
    """Document all."""
    return f"Write a short README for these files:\n{files}"


@llm(model=MODEL, max_tokens=200)
def explain(checks: Var[list[Check]]) -> str:
    """Say what went wrong."""
    return f"Explain to the user what does not compile:\n{checks}"


async def develop(client: AsyncClient, task: str, model: str = MODEL, small: str | None = None) -> str:
    """Return the documentation of what was made, or what is wrong with it."""
    async with client.run(app="multi_agent", progress=True) as run:
        spec = architect.using(model=model)(task)
        files = coder.using(model=model).map(spec.json("$.files", list[str]), task)

        def better(code: Var[str]) -> Var[str]:
            return revise.using(model=model)(code, review.using(model=model)(code), compiles(code))

        with run.loop(state=files, max_iter=2) as it:
            improved = run.map(it.state, better)  # each file by itself
            it.next(improved)
            it.until(review.using(model=model).map(improved).all("$.approved"))
        docs = run.race(
            lambda: write_docs.using(model=model)(it.result),
            lambda: write_docs.using(model=small or model)(it.result),
            after=10,
        )
        checks = compiles.map(it.result)
        answer = run.branch(
            checks.any("$.failed"), then=lambda: explain.using(model=model)(checks), orelse=lambda: docs
        )
        return await answer


async def main(arguments: Sequence[str] | None = None) -> None:
    """Do the task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("--url", default=os.environ.get("FOREBAY_URL", "http://127.0.0.1:8411"))
    parser.add_argument("--key", default=os.environ.get("FOREBAY_API_KEY"))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--small", help="a faster model, asked when the other takes more than ten seconds")
    given = parser.parse_args(arguments)
    async with AsyncClient(given.url, api_key=given.key) as client:
        print(await develop(client, given.task, given.model, given.small))


if __name__ == "__main__":
    asyncio.run(main())
