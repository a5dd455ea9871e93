"""Summarize the pieces of a text beside each other and combine what came of them, though some may have failed.

python map_reduce.py --model smollm2 < book.txt
"""
# ruff: noqa: T201

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Annotated

from forebay import AsyncClient, Budget, Input, Var, join, llm, prompt
from pydantic import BaseModel, Field

MODEL = os.environ.get("FOREBAY_MODEL", "smollm2")


class Report(BaseModel):
    """What the model is held to. Without the bounds a small one may never come to an end."""

    summary: Annotated[str, Field(max_length=300)]
    risks: Annotated[list[Annotated[str, Field(max_length=80)]], Field(max_length=3)]


@llm(model=MODEL, max_tokens=50, retry=2)
def summarize(chunk: Input[str]) -> str:
    """Summarize one piece."""
    return f"Summarize:\n{chunk}"


@llm(model=MODEL, max_tokens=400, retry=2)
def combine(parts: Var[list[str]]) -> Report:
    """Make a report of all. The annotation tells what the model answers, ``prompt`` what it is asked."""
    return prompt("Combine into a report with its risks:\n" + join(parts, "\n"))


async def report(client: AsyncClient, chunks: Sequence[str], model: str = MODEL) -> Report:
    """Return the report; a tenth of the pieces may be missing."""
    async with client.run(app="map_reduce", deadline=300, budget=Budget(tokens=200_000), progress=True):
        parts = summarize.using(model=model).map(chunks, max_parallel=64, on_error="skip")
        return await combine.using(model=model)(parts.at_least(0.9))


async def main(arguments: Sequence[str] | None = None) -> None:
    """Report on what comes from stdin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default=os.environ.get("FOREBAY_URL", "http://127.0.0.1:8411"))
    parser.add_argument("--key", default=os.environ.get("FOREBAY_API_KEY"))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--size", type=int, default=2000, help="characters of a piece")
    given = parser.parse_args(arguments)
    text = sys.stdin.read()
    chunks = [text[at : at + given.size] for at in range(0, len(text), given.size)]
    async with AsyncClient(given.url, api_key=given.key) as client:
        made = await report(client, chunks, given.model)
    print(made.summary, *made.risks, sep="\n- ")


if __name__ == "__main__":
    asyncio.run(main())
