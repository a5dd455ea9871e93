"""Summarize a long text piece by piece, each step over the result of the last: one request, N steps at the gateway.

python chain.py --model smollm2 < book.txt
"""
# ruff: noqa: T201

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence

from forebay import AsyncClient, Input, llm

MODEL = os.environ.get("FOREBAY_MODEL", "smollm2")


@llm(model=MODEL, max_tokens=50)
def first(chunk: Input[str]) -> str:
    """Begin a summary."""
    return f"Summarize in one sentence:\n{chunk}"


@llm(model=MODEL, max_tokens=50)
def refine(so_far: Input[str], chunk: Input[str]) -> str:
    """Go on with it."""
    return f"Existing summary: {so_far}\nMore context:\n{chunk}\nRefined summary:"


async def summarize(client: AsyncClient, chunks: Sequence[str], model: str = MODEL) -> str:
    """Return the summary."""
    begin, go_on = first.using(model=model), refine.using(model=model)
    async with client.run(app="chain"):
        summary = begin(chunks[0])
        for chunk in chunks[1:]:
            summary = go_on(summary, chunk)
        return await summary  # nothing was sent before


async def main(arguments: Sequence[str] | None = None) -> None:
    """Summarize what comes from stdin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default=os.environ.get("FOREBAY_URL", "http://127.0.0.1:8411"))
    parser.add_argument("--key", default=os.environ.get("FOREBAY_API_KEY"))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--size", type=int, default=2000, help="characters of a piece")
    given = parser.parse_args(arguments)
    text = sys.stdin.read()
    chunks = [text[at : at + given.size] for at in range(0, len(text), given.size)]
    if not chunks:
        parser.error("there is nothing to summarize")
    async with AsyncClient(given.url, api_key=given.key) as client:
        print(await summarize(client, chunks, given.model))


if __name__ == "__main__":
    asyncio.run(main())
