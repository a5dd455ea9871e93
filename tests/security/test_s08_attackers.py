"""S8 with a real llama.cpp behind: bombs that would stop it never get there, and those beside them notice nothing."""

import asyncio
import os
import time
from typing import Any

from engines.models import fetch
from gateway.cli.common import models_dir
from tests.e2e.asking import ask
from tests.fakes.gateway import GatewayProcess, launched_llamacpp

CHAT = "/v1/chat/completions"
PLAIN = {"model": "real", "messages": [{"role": "user", "content": "Count: 1, 2, 3"}], "max_tokens": 8}
# Each of these stopped a llama.cpp for all its clients for five seconds or more.
BOMBS: list[dict[str, Any]] = [
    {"grammar": "root ::= x+\nx ::= " + " | ".join(["[a-zA-Z0-9 ,]"] * 32)},
    {"dry_multiplier": 1, "dry_sequence_breakers": ["x" * 40] * 10_000},
    *(
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
        for schema in (
            {"enum": [f"v{index:05}" for index in range(2000)]},
            {"type": "string", "pattern": "^(" + "|".join(["[a-zA-Z ]"] * 16) + ")+$"},
            {"type": "string", "pattern": "^" + "[a-zA-Z ]?" * 64 + "$"},
            {"type": "string", "pattern": "^(([a-zA-Z ]{1,6}){1,6}){1,6}$"},
        )
    ),
]


async def test_a_client_beside_attackers_is_answered_and_they_are_told_why_not() -> None:
    models = {"real": launched_llamacpp(fetch("smollm2", models_dir(os.environ)))}
    async with GatewayProcess(models) as gateway:
        for bomb in BOMBS:
            began = time.monotonic()
            attack, answer = await asyncio.gather(ask(gateway, CHAT, {**PLAIN, **bomb}), ask(gateway, CHAT, PLAIN))

            assert (attack.status, answer.status) == (400, 200)
            assert attack.json["error"]["param"] in bomb
            assert time.monotonic() - began < 4  # a generous bound: alone it takes 0.2 s
