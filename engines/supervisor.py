"""Keeps the declared set of workers alive."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from core.clock import Clock
from core.ids import WorkerId
from engines.driver import Driver
from engines.engine import Engine
from engines.keeper import Keeper
from engines.process import KILL_WAIT_S, Ports, WorkerLog
from engines.spec import WorkerSpec
from engines.tasks import Tasks
from engines.worker import State, WorkerStatus

FIRST_PORT = 18400
NO_DEVICES: Mapping[WorkerId, str] = MappingProxyType({})


class Supervisor:
    """All workers. While the context is open, each has a task that keeps it as its operator wants; all start at once.

    Leaving the context stops every worker, all at the same time, within the longest ``stop_timeout`` and some seconds;
    what then still runs is ended by its guard. If this process dies in any other way, the guards end the workers.

    ``on_change`` is called in the event loop at each change of a worker's status and must not block or raise.
    ``num_running`` tells how many requests run on a worker: a drain waits for it to fall to 0. ``env`` is what workers
    inherit of the environment; names that start with FOREBAY_ (our own settings, secrets among them) are left out.
    ``visible_devices`` comes from ``devices.assign``. Logs go to ``log_dir``, made if missing.

    Raises ``ValueError`` at construction for a set of specs that cannot be kept. Methods that take an id raise
    ``KeyError`` for one that was not declared.
    """

    def __init__(
        self,
        specs: Iterable[WorkerSpec],
        engines: Mapping[str, Engine],
        clock: Clock,
        log_dir: Path,
        on_change: Callable[[WorkerStatus], None],
        *,
        num_running: Callable[[WorkerId], int],
        env: Mapping[str, str],
        visible_devices: Mapping[WorkerId, str] = NO_DEVICES,
        first_port: int = FIRST_PORT,
    ) -> None:
        self._engines = engines
        self._specs = {spec.id: spec for spec in _checked(specs, engines)}
        self._devices = dict(visible_devices)
        self._group = Tasks()
        self._tasks: dict[WorkerId, asyncio.Task[None]] = {}
        self._leaving: dict[WorkerId, asyncio.Task[None]] = {}
        ports = Ports(first_port)
        inherited = {name: value for name, value in env.items() if not name.startswith("FOREBAY_")}

        def keeper_of(spec: WorkerSpec) -> Keeper:
            return Keeper(
                spec,
                engines[spec.engine],
                clock=clock,
                ports=ports,
                output=WorkerLog(log_dir, spec.id),
                env=inherited,
                visible_devices=self._devices.get(spec.id),
                on_change=on_change,
                num_running=num_running,
            )

        self._keeper_of = keeper_of
        self._on_change = on_change
        self._keepers = {spec.id: keeper_of(spec) for spec in self._specs.values()}

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        for worker in self._keepers:
            self._keep(worker)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._stop_all()
        finally:
            for keeper in self._keepers.values():
                keeper.close()
            for task in (*self._tasks.values(), *self._leaving.values()):
                task.cancel()
            await self._group.__aexit__(kind, error, traceback)

    @property
    def specs(self) -> tuple[WorkerSpec, ...]:
        """The workers that are declared now; those that are leaving are not among them."""
        return tuple(self._specs.values())

    @property
    def visible_devices(self) -> Mapping[WorkerId, str]:
        """The GPUs of each worker."""
        return self._devices

    def apply(self, specs: Iterable[WorkerSpec], visible_devices: Mapping[WorkerId, str] = NO_DEVICES) -> None:
        """Have these workers instead of those declared before. Returns at once; what has to be done is under way then.

        A worker of a new id is started; where it is to have a GPU of one that leaves, once that one has gone. One whose
        id is gone is drained and stopped, and forgotten. One that has changed is drained and started anew; one that has
        not is left alone. Raises ``ValueError``, having done nothing, for a set that cannot be kept.
        """
        new = {spec.id: spec for spec in _checked(specs, self._engines)}
        old, old_devices = self._specs, self._devices
        self._specs, self._devices = new, dict(visible_devices)
        for worker in self._keepers.keys() - new.keys() - self._leaving.keys():
            self._leaving[worker] = self._group.create_task(self._leave(worker), name=f"leave {worker}")
        for worker, spec in new.items():
            if worker not in self._keepers:
                self._add(spec, old_devices)
                continue
            returns = self._leaving.pop(worker, None)
            if spec != old.get(worker) or visible_devices.get(worker) != old_devices.get(worker):
                self._keepers[worker].change(spec, self._engines[spec.engine], visible_devices.get(worker))
            if returns is not None:
                returns.cancel()
                self._keepers[worker].start()
        self._keepers = {worker: self._keepers[worker] for worker in (*new, *(self._keepers.keys() - new.keys()))}

    def statuses(self) -> tuple[WorkerStatus, ...]:
        """Return every worker's status, in the order of declaration; those that are leaving come last."""
        return tuple(keeper.status for keeper in self._keepers.values())

    def status(self, worker: WorkerId) -> WorkerStatus:
        """Return one worker's status."""
        return self._keepers[worker].status

    def driver_of(self, worker: WorkerId) -> Driver | None:
        """Return the live driver of a ready or draining worker; None otherwise. Not to be kept over a restart."""
        keeper = self._keepers.get(worker)
        return keeper.driver if keeper is not None else None

    def start(self, worker: WorkerId) -> None:
        """Have a worker started now, whatever back-off it is in; calls off a drain. Nothing if it is up."""
        self._keepers[worker].start()

    async def stop(self, worker: WorkerId) -> None:
        """Stop a worker without waiting for its requests; return when its port and processes are gone."""
        await self._keepers[worker].stop()

    async def drain(self, worker: WorkerId) -> None:
        """Give it no more work, wait for what runs (``drain_timeout`` at most), then stop it."""
        await self._keepers[worker].drain()

    async def restart(self, worker: WorkerId) -> None:
        """Drain a worker and start it again; returns when it is starting."""
        await self._keepers[worker].restart()

    async def settled(self, worker: WorkerId) -> WorkerStatus:
        """Wait until a worker is ready, failed, or stopped because that is wanted; return its status."""
        return await self._keepers[worker].settled()

    async def logs(self, worker: WorkerId, num_lines: int) -> list[str]:
        """Return the newest lines of a worker's log; none for an attached worker."""
        return await asyncio.to_thread(self._keepers[worker].log_lines, num_lines)

    def _add(self, spec: WorkerSpec, old_devices: Mapping[WorkerId, str]) -> None:
        keeper = self._keepers[spec.id] = self._keeper_of(spec)
        wanted = _indices(self._devices.get(spec.id))
        before = [task for worker, task in self._leaving.items() if wanted & _indices(old_devices.get(worker))]
        self._on_change(keeper.status)
        self._keep(spec.id, before)

    def _keep(self, worker: WorkerId, before: Sequence[asyncio.Task[None]] = ()) -> None:
        keeper = self._keepers[worker]

        async def keep() -> None:
            if before:
                await asyncio.wait(before)
            await keeper.run()

        self._tasks[worker] = self._group.create_task(keep(), name=f"keep {worker}")

    async def _leave(self, worker: WorkerId) -> None:
        """Drain and stop a worker whatever else is asked of it meanwhile, then forget it."""
        keeper = self._keepers[worker]
        while keeper.status.state is not State.STOPPED or keeper.status.is_wanted:
            await keeper.drain()
        keeper.close()
        self._tasks.pop(worker).cancel()
        del self._keepers[worker], self._leaving[worker]

    async def _stop_all(self) -> None:
        for keeper in self._keepers.values():
            keeper.give_up()
        longest = max((spec.lifecycle.stop_timeout for spec in self._specs.values()), default=0.0)
        with suppress(TimeoutError):
            async with asyncio.timeout(longest + KILL_WAIT_S):
                for keeper in tuple(self._keepers.values()):  # one that leaves goes from the table
                    await keeper.stop()


def _checked(specs: Iterable[WorkerSpec], engines: Mapping[str, Engine]) -> list[WorkerSpec]:
    seen: dict[WorkerId, WorkerSpec] = {}
    for spec in specs:
        if spec.id in seen:
            raise ValueError(f"two workers have the id {spec.id!r}: ids must differ")
        if spec.engine not in engines:
            raise ValueError(f"worker {spec.id!r} has engine {spec.engine!r}: choose one of {sorted(engines)}")
        if (spec.url is None) is (spec.launch is None):
            raise ValueError(f"worker {spec.id!r} must have either url or launch")
        seen[spec.id] = spec
    return list(seen.values())


def _indices(visible_devices: str | None) -> set[str]:
    return set(visible_devices.split(",")) if visible_devices else set()
