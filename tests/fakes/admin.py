"""The admin port without a process: the real application over real parts and a real SQLite file."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from gateway.api.admin import admin_app
from gateway.live import Live
from gateway.services import Services, open_services
from gateway.settings import declare

ADMIN = "fba_0123456789-of-the-admin"
VIEWER = "fba_0123456789-of-the-viewer"
OPERATOR = "fba_0123456789-of-the-operator"
POLICY = "fba_0123456789-of-the-policy"
SECRETS = {"viewer": VIEWER, "operator": OPERATOR, "policy": POLICY, "admin": ADMIN}
HOST = "http://127.0.0.1:8412"
DATA_KEY = "fbk_0123456789-of-the-file"


def tree(state: Path, **more: Any) -> dict[str, Any]:
    """Return settings with an operator of every role, a tenant `filed`, and a model whose worker is not there."""
    operators = [
        {"name": role, "tenant": "ops", "key": secret, "role": role}
        for role, secret in SECRETS.items()
        if role != "admin"
    ]
    app = {"name": "app", "tenant": "filed", "key": DATA_KEY, "budgets": [{"usd": 5, "per": "day"}]}
    return {
        "state_dir": str(state),
        "admin_key": ADMIN,
        "keys": [*operators, app],
        "tenants": {"filed": {"limits": {"rpm": 100}, "budgets": [{"tokens": 1000, "per": "month"}]}},
        "models": {
            "small": {
                "aliases": ["s"],
                "price": {"input": 0.1, "output": 0.4},
                "workers": [{"engine": "openai", "url": "http://127.0.0.1:9"}],
            }
        },
        **more,
    }


@asynccontextmanager
async def opened(state: Path, **more: Any) -> AsyncIterator[tuple[Any, Services]]:
    """Yield the admin port's ASGI application, and the services behind it."""
    live = Live(declare(tree(state, **more), {}, origin="forebay.yaml"))
    async with open_services(live, {}) as services:
        yield admin_app(services), services


def client(app: Any, secret: str | None = ADMIN, **headers: str) -> httpx.AsyncClient:
    """Return a client of the application, with a key or none."""
    sent = {**({"authorization": f"Bearer {secret}"} if secret else {}), **headers}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=HOST, headers=sent)
