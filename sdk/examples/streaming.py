"""Watch two variables of a run grow, one of which is made of the other; a broken connection is made anew.

python streaming.py --model smollm2 "Why is the sky blue?"
"""
# ruff: noqa: T201

import argparse
import asyncio
import os
from collections.abc import AsyncIterator, Sequence

from forebay import AsyncClient, Input, llm
from forebay.events import CallRetried, RunDone, VarDelta, VarDone, VarFailed

MODEL = os.environ.get("FOREBAY_MODEL", "smollm2")


@llm(model=MODEL, max_tokens=100)
def make_plan(question: Input[str]) -> str:
    """Plan."""
    return f"Make a plan in three steps of how to answer this:\n{question}"


@llm(model=MODEL, max_tokens=200, retry=1)
def answer(question: Input[str], plan: Input[str]) -> str:
    """Answer by the plan."""
    return f"Answer this:\n{question}\nby this plan:\n{plan}"


async def watch(client: AsyncClient, question: str, model: str = MODEL) -> AsyncIterator[str]:
    """Yield what there is to show, line by line."""
    async with client.run(app="streaming") as run:
        plan = make_plan.using(model=model)(question)
        final = answer.using(model=model)(question, plan)
        async for event in run.events(vars=[plan, final]):
            match event:
                case VarDelta(variable=name, text=text):
                    yield f"{name} + {text!r}"
                case CallRetried(call=name, attempt=attempt):
                    yield f"{name} begins anew, for the {attempt}. time"
                case VarDone(variable=name, value=value):
                    yield f"{name} = {value!r}"
                case VarFailed(variable=name, error=error):
                    yield f"{name} failed: {error}"
                case RunDone(usage=usage):
                    yield f"used {usage}"
                case _:
                    pass


async def main(arguments: Sequence[str] | None = None) -> None:
    """Answer the question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question")
    parser.add_argument("--url", default=os.environ.get("FOREBAY_URL", "http://127.0.0.1:8411"))
    parser.add_argument("--key", default=os.environ.get("FOREBAY_API_KEY"))
    parser.add_argument("--model", default=MODEL)
    given = parser.parse_args(arguments)
    async with AsyncClient(given.url, api_key=given.key) as client:
        async for line in watch(client, given.question, given.model):
            print(line)


if __name__ == "__main__":
    asyncio.run(main())
