"""The two admin clients. They differ in how they wait; what they ask stands in ``_resources``."""

from types import TracebackType
from typing import Generic, Self

import httpx

from forebay import _wire
from forebay.admin._asks import AsyncRunner, Runner, RunnerT
from forebay.admin._resources import (
    Audit,
    Budgets,
    Configuration,
    Decisions,
    FairnessOfModels,
    Keys,
    Models,
    Policies,
    Requests,
    System,
    Tenants,
    Usage,
    Workers,
)

_BASE_URL = "http://127.0.0.1:8412"
_KEY_VARIABLE = "FOREBAY_ADMIN_KEY"


class _Resources(Generic[RunnerT]):
    def __init__(self, runner: RunnerT) -> None:
        self.tenants: Tenants[RunnerT] = Tenants(runner)
        self.keys: Keys[RunnerT] = Keys(runner)
        self.budgets: Budgets[RunnerT] = Budgets(runner)
        self.usage: Usage[RunnerT] = Usage(runner)
        self.requests: Requests[RunnerT] = Requests(runner)
        self.decisions: Decisions[RunnerT] = Decisions(runner)
        self.fairness: FairnessOfModels[RunnerT] = FairnessOfModels(runner)
        self.models: Models[RunnerT] = Models(runner)
        self.workers: Workers[RunnerT] = Workers(runner)
        self.config: Configuration[RunnerT] = Configuration(runner)
        self.policies: Policies[RunnerT] = Policies(runner)
        self.audit: Audit[RunnerT] = Audit(runner)
        self.system: System[RunnerT] = System(runner)


class Admin(_Resources[Runner]):
    """A client of a gateway's admin port; use it as a context manager, or ``close`` it.

    ``api_key`` falls back to ``FOREBAY_ADMIN_KEY``. What only looks is tried again like a ``Client``'s requests; what
    changes something is sent once. ``transport`` replaces the network, for tests.
    """

    def __init__(
        self,
        base_url: str = _BASE_URL,
        api_key: str | None = None,
        *,
        timeout: float | httpx.Timeout = _wire.DEFAULT_TIMEOUT,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        gateway = _wire.endpoint(base_url, api_key, variable=_KEY_VARIABLE)
        self._http = httpx.Client(
            base_url=gateway.url,
            headers=gateway.headers,
            timeout=_wire.as_timeout(timeout),
            trust_env=gateway.use_proxies,
            transport=transport,
        )
        super().__init__(Runner(self._http, max_retries))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


class AsyncAdmin(_Resources[AsyncRunner]):
    """The same client for asyncio: its methods are awaited, its lists read with ``async for``."""

    def __init__(
        self,
        base_url: str = _BASE_URL,
        api_key: str | None = None,
        *,
        timeout: float | httpx.Timeout = _wire.DEFAULT_TIMEOUT,
        max_retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        gateway = _wire.endpoint(base_url, api_key, variable=_KEY_VARIABLE)
        self._http = httpx.AsyncClient(
            base_url=gateway.url,
            headers=gateway.headers,
            timeout=_wire.as_timeout(timeout),
            trust_env=gateway.use_proxies,
            transport=transport,
        )
        super().__init__(AsyncRunner(self._http, max_retries))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()
