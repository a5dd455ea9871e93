"""A kind of engine: how to start one, and how to speak to one that runs."""

from typing import Protocol

import msgspec

from engines.driver import Driver
from engines.spec import WorkerSpec


class Command(msgspec.Struct, frozen=True):
    """A program to run: argv, no shell, and what it gets in its environment beside what every worker gets.

    Keys belong into ``env``: everybody on the machine can read an argv.
    """

    argv: tuple[str, ...]
    env: dict[str, str] = {}


class Engine(Protocol):
    """One kind of engine. Stateless."""

    def command(self, spec: WorkerSpec, port: int, key: str) -> Command:
        """Return what starts ``spec`` on ``127.0.0.1:port``, asking ``key`` of its callers.

        Raises ``ValueError`` with a message for the operator if it cannot be started at all. Not asked where the
        operator gave a command of their own (``spec.launch.command``).
        """

    def driver(self, spec: WorkerSpec, base_url: str, key: str | None) -> Driver:
        """Return a new driver for the engine at ``base_url`` (no trailing slash). Opens no connection yet."""


def command_of(spec: WorkerSpec, engine: Engine, port: int, key: str) -> Command:
    """Return the operator's own command with its blanks filled in, or else the engine's; either with ``launch.env``.

    Raises ``ValueError`` as ``Engine.command`` does. ``spec`` must have a ``launch``.
    """
    launch = spec.launch
    assert launch is not None
    blanks = {
        "{port}": str(port),
        "{key}": key,
        "{source}": launch.source,
        "{name}": spec.served_name or spec.model,
    }
    if launch.command:
        command = Command(argv=tuple(_filled(word, blanks) for word in (*launch.command, *launch.args)))
    else:
        command = engine.command(spec, port, key)
    own_env = {name: _filled(value, blanks) for name, value in launch.env.items()}
    return msgspec.structs.replace(command, env={**command.env, **own_env})


def _filled(word: str, blanks: dict[str, str]) -> str:
    # Not str.format: arguments are often JSON, full of braces of their own.
    for blank, value in blanks.items():
        word = word.replace(blank, value)
    return word
