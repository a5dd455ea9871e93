"""A settings file that changes while the gateway serves: what it adds, takes away, changes and breaks."""

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import httpx
import yaml

from tests.e2e.asking import PATIENCE_S, until
from tests.fakes.engine import FakeEngine
from tests.fakes.gateway import GatewayProcess, attached


def rewrite(gateway: GatewayProcess, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the settings file, as an editor does: all at once."""
    change(gateway.settings)
    draft = gateway.settings_path.with_suffix(".draft")
    draft.write_text(yaml.safe_dump(gateway.settings, sort_keys=False), "utf-8")
    draft.replace(gateway.settings_path)


async def logged(gateway: GatewayProcess, text: str) -> None:
    async def is_there() -> bool:
        return text in gateway.log

    await until(is_there, f"the log says {text!r}")


def client(gateway: GatewayProcess) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=gateway.url, headers={"authorization": f"Bearer {gateway.key}"}, trust_env=False, timeout=PATIENCE_S
    )


async def ask(http: httpx.AsyncClient, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], **more}
    return await http.post("/v1/chat/completions", json=body)


async def until_served(http: httpx.AsyncClient, model: str, status: int = 200) -> httpx.Response:
    """Ask until the answer has this status."""
    response = await ask(http, model, max_tokens=2)
    for _ in range(int(PATIENCE_S / 0.1)):
        if response.status_code == status:
            break
        await asyncio.sleep(0.1)
        response = await ask(http, model, max_tokens=2)
    assert response.status_code == status, response.text
    return response


async def stream(http: httpx.AsyncClient, model: str, started: asyncio.Event) -> str:
    """Stream an answer of some seconds to its end."""
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 60, "stream": True}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        pieces = []
        async for piece in response.aiter_text():
            pieces.append(piece)
            started.set()
    return "".join(pieces)


async def test_a_changed_file_adds_and_removes_models_and_cuts_no_stream() -> None:
    async with (
        FakeEngine(model="old", itl_ms=50) as old,
        FakeEngine(model="new") as new,
        FakeEngine(model="stays") as stays,
        GatewayProcess({"old": attached(old.url), "stays": attached(stays.url)}) as gateway,
        client(gateway) as http,
    ):
        started = [asyncio.Event() for _ in range(4)]
        streams = [asyncio.create_task(stream(http, "old", event)) for event in started]
        await asyncio.gather(*(event.wait() for event in started))

        def change(settings: dict[str, Any]) -> None:
            del settings["models"]["old"]
            settings["models"]["new"] = attached(new.url)

        rewrite(gateway, change)
        await until_served(http, "new")
        assert not any(one.done() for one in streams)
        assert (await ask(http, "old")).status_code == 404
        assert (await ask(http, "stays", max_tokens=2)).status_code == 200

        for text in await asyncio.gather(*streams):
            assert text.rstrip().endswith("data: [DONE]")
            assert '"error"' not in text
        await logged(gateway, "worker_stopped")


async def test_a_broken_file_changes_nothing_and_is_told_of() -> None:
    async with (
        FakeEngine(model="fake") as engine,
        GatewayProcess({"fake": attached(engine.url)}) as gateway,
        client(gateway) as http,
    ):
        gateway.settings_path.write_text("models: [this, is\n", "utf-8")
        await logged(gateway, "is not valid YAML")
        assert (await ask(http, "fake", max_tokens=2)).status_code == 200

        rewrite(gateway, lambda settings: settings["server"].update(prot=1))
        await logged(gateway, "did you mean `port`?")
        assert (await ask(http, "fake", max_tokens=2)).status_code == 200

        gateway.settings["server"].pop("prot")
        gateway.settings["models"]["fake"]["aliases"] = ["other"]
        rewrite(gateway, lambda settings: None)
        await until_served(http, "other")


async def test_sighup_reloads_what_the_file_refers_to(tmp_path: Any) -> None:
    secret = tmp_path / "key"
    secret.write_text("fbk_the-first-of-two-good-keys")
    key = {"name": "rotated", "tenant": "t", "key": f"${{file:{secret}}}"}
    async with (
        FakeEngine(model="fake") as engine,
        GatewayProcess({"fake": attached(engine.url)}, keys=[key]) as gateway,
        client(gateway) as http,
    ):
        http.headers["authorization"] = "Bearer fbk_the-second-of-two-good-keys"
        assert (await ask(http, "fake")).status_code == 401
        secret.write_text("fbk_the-second-of-two-good-keys")  # the settings file itself stays as it is
        os.kill(gateway.pid, signal.SIGHUP)
        await until_served(http, "fake")


async def test_a_port_that_changes_waits_for_the_next_start() -> None:
    async with (
        FakeEngine(model="fake") as engine,
        GatewayProcess({"fake": attached(engine.url)}) as gateway,
        client(gateway) as http,
    ):
        rewrite(gateway, lambda settings: settings["server"].update(port=1))
        await logged(gateway, "server.port")
        assert "needs_restart" in gateway.log
        assert (await ask(http, "fake", max_tokens=2)).status_code == 200


async def test_the_environment_wins_over_the_file() -> None:
    async with (
        FakeEngine(model="fake") as engine,
        GatewayProcess({"fake": attached(engine.url)}, env={"FOREBAY_SERVER__MAX_BODY": "1kB"}) as gateway,
        client(gateway) as http,
    ):
        assert (await ask(http, "fake", user="x" * 2000)).status_code == 413
