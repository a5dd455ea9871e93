"""Which ports are free, and who has one that is not."""

import errno
import socket
from contextlib import ExitStack, closing, suppress

import psutil


def problem_with(host: str, port: int) -> str | None:
    """Return why nobody can listen at ``host:port`` now; None if it is free, or 0 (any port)."""
    if port == 0:
        return None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        return f"{host} is not an address of this machine: {error.strerror}"
    with closing(socket.socket(family, kind, protocol)) as probe:
        # As servers do: connections that linger after a restart are no obstacle, a listener is.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return f"cannot listen at {host}:{port}: {error.strerror}"
            holder = owner(port)
            return f"port {port} is in use" + (f" by {holder}" if holder else " by another program")
    return None


def free(count: int) -> list[int]:
    """Return different TCP ports of 127.0.0.1 that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def owner(port: int) -> str | None:
    """Return name and process id of who listens at ``port``; None if we may not know."""
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return None
