"""What drivers want of an HTTP client: ``http1.py`` and ``http_remote.py`` fit it; one contract suite holds both."""

from collections.abc import Mapping
from typing import Protocol


class Response(Protocol):
    """The answer to one request. ``release`` it once, when done; cut short, its connection is closed.

    ``status`` is there after the first ``readany`` or ``read``. Both raise ``WorkerLost`` when the connection breaks
    before the answer is whole, or what comes is no HTTP.
    """

    status: int

    @property
    def is_complete(self) -> bool:
        """Whether all of it has come."""

    async def readany(self) -> bytes:
        """Wait for more of the body and return what has come; nothing at its end."""

    async def read(self) -> bytes:
        """Return the rest of the body, of any size."""

    def header(self, name: str) -> str | None:
        """Return a header's value; of several, the first."""

    def release(self) -> None:
        """Let go of it; nothing of it may be used afterwards."""


class Http(Protocol):
    """Connections to one origin, as many as there are requests; each is kept for the next one if it can be.

    A request is sent once: what becomes of one that is lost on its way is for the scheduler to say.
    """

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, *, connect_timeout: float
    ) -> Response:
        """Send a request and return its answer, of which nothing need have come yet.

        ``path`` may have a query. Raises ``ConnectTimeout``, ``WorkerUnreachable`` or ``WorkerLost``, and
        ``ValueError`` for a header with a line break in it.
        """

    async def close(self) -> None:
        """Close every connection. Who waits for an answer gets a ``WorkerLost``."""
