"""What the operator declares of a worker. Comes from the settings file only, never from a request (S10)."""

import msgspec

from core.ids import ModelName, WorkerId


class Launch(msgspec.Struct, frozen=True):
    """How to start an engine of ours: it gets a free loopback port and a fresh key, and dies with us.

    ``source`` is a file or a hub id, whatever the engine loads. ``context`` is what one request may use; an engine
    that divides its memory over ``slots`` is given the product. ``command`` replaces the engine's own program
    (argv, no shell; ``{port}``, ``{key}``, ``{source}`` and ``{name}`` are filled in), ``args`` are added at its end.
    ``gpus`` are device indices, ``tp`` of them per worker; ``memory_gib`` is what it takes on each.

    ``revision`` is the commit, tag or branch of a hub id, ``sha256`` the digest that a GGUF file must have.
    ``trust_remote_code`` lets the engine run Python that comes with the model: whoever wrote the model then owns the
    worker.
    """

    source: str = ""
    revision: str | None = None
    sha256: str | None = None
    trust_remote_code: bool = False
    context: int = 2048
    slots: int = 4
    threads: int | None = None
    gpus: tuple[int, ...] = ()
    tp: int = 1
    memory_gib: float | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    program: str | None = None
    command: tuple[str, ...] = ()


class Lifecycle(msgspec.Struct, frozen=True):
    """Times (seconds) and counts of a worker's life.

    A worker turns unhealthy after ``fall`` failed probes in a row and healthy after ``rise`` good ones. A crash is
    answered by a restart after ``backoff_base * 2**(crashes - 1)`` seconds, at most ``backoff_max``; crashes count
    until the worker has been ready for ``backoff_reset``.
    """

    start_timeout: float = 600.0
    drain_timeout: float = 60.0
    stop_timeout: float = 30.0
    probe_interval: float = 2.0
    fall: int = 3
    rise: int = 2
    backoff_base: float = 0.5
    backoff_max: float = 60.0
    backoff_reset: float = 60.0


class WorkerSpec(msgspec.Struct, frozen=True):
    """One declared worker: ``launch`` (ours) or ``url`` (attached: probed and used, never killed).

    ``served_name`` is what the engine calls the model, ``api_key`` what an attached one wants as a bearer token,
    ``max_inflight`` how many requests it is given at a time. ``probe_continuation``: an engine that nothing is known of
    is tried at its start whether it can go on with an answer. ``slot_files``: with how many an attached llama.cpp was
    started, if it is Forebay's own server for it.
    """

    id: WorkerId
    model: ModelName
    engine: str
    url: str | None = None
    launch: Launch | None = None
    served_name: str | None = None
    api_key: str | None = None
    max_inflight: int = 4
    probe_continuation: bool = True
    slot_files: int = 0
    lifecycle: Lifecycle = Lifecycle()
