"""The gateway that one writes in an afternoon: FastAPI and aiohttp, bytes through, nothing looked at."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

TARGET = os.environ.get("UPSTREAM", "") + "/v1/chat/completions"
clients: list[aiohttp.ClientSession] = []


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Holds one client session with no limit of connections while the application runs."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as client:
        clients.append(client)
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health() -> str:
    """Says that the application runs."""
    return "ok"


@app.post("/v1/chat/completions", response_model=None)
async def complete(request: Request) -> Response:
    """Passes a completion to the engine and its answer back, as it comes where it is a stream."""
    body = await request.body()
    answer = await clients[0].post(TARGET, data=body, headers={"Content-Type": "application/json"})
    kind = answer.headers["Content-Type"]
    if kind.startswith("text/event-stream"):
        return StreamingResponse(parts(answer), answer.status, media_type=kind)
    async with answer:
        return Response(await answer.read(), answer.status, media_type=kind)


async def parts(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The engine's answer in the pieces in which it arrived."""
    async with answer:
        async for part in answer.content.iter_any():
            yield part
