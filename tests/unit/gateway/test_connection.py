"""What a connection leaves behind when it ends."""

import asyncio
from typing import Any

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from gateway.connection import Connection


class Wire(asyncio.Transport):
    """A transport that leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.is_closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True


async def _application(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("nobody asks")


@pytest.mark.parametrize("error", [None, ConnectionResetError()], ids=["closed", "reset"])
async def test_an_idle_connection_that_ends_leaves_no_timer_behind(error: Exception | None) -> None:
    """The timer would hold the connection, and all that hangs on it, for the rest of its keep-alive time."""
    config = Config(_application, http=Connection, lifespan="off", log_config=None)
    config.load()
    connection = Connection(config, ServerState(), {}, asyncio.get_running_loop())
    connection.connection_made(Wire())
    connection.on_response_complete()
    timer = connection.timeout_keep_alive_task
    assert timer is not None

    connection.connection_lost(error)

    assert timer.cancelled()
