"""Keeps one declared worker as its operator wants it: starts it, probes it, drains and stops it, starts it again."""

import asyncio
import secrets
import shlex
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from enum import Enum, auto
from typing import Any

import msgspec
import structlog

from core.clock import Clock
from core.errors import ForebayError
from core.ids import WorkerId
from engines import devices
from engines.driver import Capabilities, Driver, Health, Load
from engines.engine import Engine, command_of
from engines.process import LOOPBACK, Ports, Process, ProcessError, WorkerLog
from engines.spec import WorkerSpec
from engines.worker import ILL_FOR_GOOD_S, Life, State, WorkerStatus

# Small engines are ready in less than a second, large ones in minutes: ask often at first.
FIRST_PROBE_PAUSE_S = 0.05
PROBE_PAUSE_GROWTH = 1.5
LOAD_TIMEOUT_S = 2.0
# What runs on a worker is known to the dispatcher, which is asked this often while a worker drains.
DRAIN_POLL_S = 0.05
NUM_LAST_WORDS = 5

log = structlog.get_logger(__name__)


class Goal(Enum):
    """What the operator wants of a worker. ``RESTART`` is a drain that ends in a start, ``DOWN`` does not wait."""

    UP = auto()
    RESTART = auto()
    DRAIN = auto()
    DOWN = auto()


class Keeper:
    """One worker, its process if it has one, and its driver. ``run`` is the only task that acts on them.

    The verbs state a goal and wait until the worker is there; the newest goal wins, the same goal twice is one. A
    verb returns early when a newer goal has replaced its own, and when the keeper is closed.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        engine: Engine,
        *,
        clock: Clock,
        ports: Ports,
        output: WorkerLog,
        env: Mapping[str, str],
        visible_devices: str | None,
        on_change: Callable[[WorkerStatus], None],
        num_running: Callable[[WorkerId], int],
    ) -> None:
        self._spec = spec
        self._next: tuple[WorkerSpec, Engine, str | None] | None = None
        self._engine = engine
        self._clock = clock
        self._ports = ports
        self._output = output
        self._env = env
        self._visible_devices = visible_devices
        self._on_change = on_change
        self._num_running = num_running
        self._life = Life(spec.lifecycle, clock)
        self._goal = Goal.UP
        self._is_closed = False
        self._changed = asyncio.Event()
        self._driver: Driver | None = None
        self._pid: int | None = None
        self._url = spec.url
        self._load: Load | None = None
        self._capabilities = Capabilities()
        self.status = self._view()

    # What holds

    @property
    def driver(self) -> Driver | None:
        """The driver of a worker that serves; None where it does not (yet, or any more)."""
        return self._driver if self._life.state in (State.READY, State.DRAINING) else None

    def log_lines(self, num_lines: int) -> list[str]:
        """Return the newest lines that the worker printed; none of an attached one. Reads files."""
        return [] if self._spec.launch is None else self._output.tail(num_lines)

    # Verbs

    def start(self) -> None:
        """Have it started now, whatever back-off it is in; a drain is called off. Nothing if it is up."""
        self._life.start_requested()
        self._aim(self._goal if self._goal is Goal.RESTART else Goal.UP)

    async def stop(self) -> None:
        """Stop it without waiting for its requests; return when nothing of it is left."""
        self.give_up()
        await self._until(lambda: self._goal is not Goal.DOWN or self._life.state is State.STOPPED)

    def give_up(self) -> None:
        """Have it stopped, and do not wait."""
        self._aim(Goal.DOWN)

    async def drain(self) -> None:
        """Let it finish its requests, ``drain_timeout`` at most, and stop it; return when nothing of it is left."""
        if self._goal is not Goal.DOWN:
            self._aim(Goal.DRAIN)
        await self._until(lambda: self._wants_up() or self._life.state is State.STOPPED)

    async def restart(self) -> None:
        """Drain it and start it again; return when it starts. One that does not run is started."""
        if self._life.state in (State.STOPPED, State.FAILED):
            self.start()
            return
        self._aim(Goal.RESTART)
        await self._until(lambda: self._goal is not Goal.RESTART)

    def change(self, spec: WorkerSpec, engine: Engine, visible_devices: str | None) -> None:
        """Have it be another worker under the same id: what runs is drained, then started anew. Does not wait.

        A worker that is stopped, or is to be, stays so. New times and bounds alone need no restart.
        """
        if self._next is None and visible_devices == self._visible_devices and _starts_alike(spec, self._spec):
            self._spec = spec
            self._life.lifecycle = spec.lifecycle
            self._publish()
            return
        self._next = spec, engine, visible_devices
        if self._wants_up():
            self._life.start_requested()
            self._aim(Goal.RESTART)

    async def settled(self) -> WorkerStatus:
        """Wait until it is ready, failed or, if that is wanted, stopped."""
        await self._until(
            lambda: (
                self._life.state in (State.READY, State.FAILED)
                or (self._life.state is State.STOPPED and not self._wants_up())
            )
        )
        return self.status

    def _aim(self, goal: Goal) -> None:
        self._goal = goal
        self._publish()  # whether it is wanted may have changed
        self._notify()

    def close(self) -> None:
        """Wake all who wait for a goal: nobody will reach it."""
        self._is_closed = True
        self._notify()

    # The owner's loop

    async def run(self) -> None:
        """Keep the worker until cancelled. A process that then still runs is ended by its guard."""
        while True:
            await self._until_due()
            self._take_over()
            try:
                await (self._live_attached() if self._spec.url is not None else self._live_launched())
            except (ProcessError, ValueError) as error:
                self._crash(str(error))
            except Exception as error:
                # The border: a fault in one worker's driver or engine must not end the others.
                log.exception("keeper_failed", worker=self._spec.id)
                self._crash(f"internal fault, see the server's log: {error!r}")

    async def _until_due(self) -> None:
        while True:
            if not self._wants_up():
                self._goal = Goal.DOWN
                if self._life.state is not State.STOPPED:
                    self._life.stopped()
                    self._publish()
                await self._next_change()
            elif (delay := self._life.start_delay) > 0 and self._goal is Goal.UP:
                with suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._next_change()
            else:
                self._goal = Goal.UP
                return

    def _take_over(self) -> None:
        """Become what the operator has changed it to; nothing of it runs."""
        if self._next is not None:
            self._spec, self._engine, self._visible_devices = self._next
            self._next = None
            self._life.lifecycle = self._spec.lifecycle
            self._url = self._spec.url

    async def _live_launched(self) -> None:
        self._begin()
        gpus = [int(index) for index in (self._visible_devices or "").split(",") if index]
        memory_before = await devices.memory_used(gpus)
        port = self._ports.take()
        self._url = f"http://{LOOPBACK}:{port}"
        try:
            await self._run_on(port)
        except (ProcessError, ValueError) as error:
            self._crash(str(error))
        finally:
            self._ports.release(port)
        if not await self._ports.wait_until_free(port):
            log.warning("worker_port_stayed_taken", worker=self._spec.id, port=port)
        if not await devices.wait_until_freed(memory_before):
            log.warning("gpu_memory_stayed_taken", worker=self._spec.id, gpus=gpus)
        self._finish()

    async def _run_on(self, port: int) -> None:
        key = secrets.token_urlsafe(32)
        command = command_of(self._spec, self._engine, port, key)
        env = {**self._gpu_env(), **command.env, "FOREBAY_WORKER_KEY": key}
        began = time.monotonic()
        process = await Process.start(
            msgspec.structs.replace(command, env=env),
            log=self._output,
            header=f"{_now()} start {self._life.restarts + 1}: {shlex.join(command.argv)}",
            secrets=(key,),
            env=self._env,
        )
        self._pid = process.pid
        self._publish()
        try:
            driver = self._engine.driver(self._spec, f"http://{LOOPBACK}:{port}", key)
            await self._serve(driver, self._exit_of(process, began))
            await process.stop(self._spec.lifecycle.stop_timeout)
        except Exception:
            await process.stop(self._spec.lifecycle.stop_timeout)  # a second process must not be started beside it
            raise
        finally:
            process.abandon()
            self._pid = None

    async def _live_attached(self) -> None:
        assert self._spec.url is not None
        # A worker that has failed stays so until it answers: no flapping between failed and starting.
        if self._life.state is State.FAILED and not await self._answers():
            self._crash(self._unreachable())
            return
        self._begin()
        await self._serve(self._attached_driver(self._spec.url), asyncio.Event().wait())
        self._finish()

    async def _answers(self) -> bool:
        assert self._spec.url is not None
        driver = self._attached_driver(self._spec.url)
        try:
            return await driver.health() != "unreachable"
        finally:
            await driver.close()

    def _attached_driver(self, url: str) -> Driver:
        return self._engine.driver(self._spec, url.rstrip("/"), self._spec.api_key)

    async def _serve(self, driver: Driver, ending: Coroutine[Any, Any, object]) -> None:
        """Use the driver until the worker has to go; the state tells why. Closes it."""
        self._driver = driver
        try:
            error = await self._watch(driver, ending)
            if error is None:
                self._begin_drain()
            else:
                self._crash(error)
        finally:
            self._driver = None
            self._load = None
            await driver.close()

    async def _watch(self, driver: Driver, ending: Coroutine[Any, Any, object]) -> str | None:
        """Follow a life to its end. Return None if the operator wants that, else what went wrong."""
        async with asyncio.TaskGroup() as tasks:
            ended = tasks.create_task(ending)
            probed = tasks.create_task(self._probe(driver))
            left = tasks.create_task(self._leave())
            done, _ = await asyncio.wait((ended, probed, left), return_when=asyncio.FIRST_COMPLETED)
            for task in (ended, probed, left):
                task.cancel()
        if left in done or not self._wants_to_serve():
            return None
        return str((ended if ended in done else probed).result())

    async def _exit_of(self, process: Process, began: float) -> str:
        status = await process.exited()
        after = time.monotonic() - began
        return await self._with_last_words(f"{_exit_text(status)} {after:.1f} s after its start")

    async def _leave(self) -> None:
        """Return when the worker may be stopped, as the operator wants."""
        while self._goal is not Goal.DOWN:
            if self._goal is Goal.UP:
                if self._life.state is State.DRAINING:
                    self._life.drain_called_off()
                    self._publish()
                await self._next_change()
            elif await self._drained():
                return

    async def _drained(self) -> bool:
        """Wait until nothing runs on it, or no longer than it may; False if another goal comes first."""
        if self._life.state is State.STARTING:
            return True
        self._begin_drain()
        deadline = self._clock.monotonic() + self._spec.lifecycle.drain_timeout
        while self._num_running(self._spec.id) > 0 and self._clock.monotonic() < deadline:
            if self._goal not in (Goal.DRAIN, Goal.RESTART):
                return False
            await asyncio.sleep(DRAIN_POLL_S)
        return True

    # Probes

    async def _probe(self, driver: Driver) -> str:
        """Probe for as long as the worker is worth it; return why it no longer is."""
        error = await self._become_ready(driver)
        while error is None:
            await asyncio.sleep(self._spec.lifecycle.probe_interval)
            error = await self._probe_once(driver)
        return error

    async def _become_ready(self, driver: Driver) -> str | None:
        limit = None if self._spec.url is not None else self._spec.lifecycle.start_timeout
        pause = FIRST_PROBE_PAUSE_S
        health: Health = "unreachable"
        try:
            async with asyncio.timeout(limit):
                while (health := await driver.health()) != "ok":
                    self._life.probed(health)
                    if self._is_lost():
                        return self._unreachable()
                    await asyncio.sleep(min(pause, self._spec.lifecycle.probe_interval))
                    pause *= PROBE_PAUSE_GROWTH
                self._capabilities = await self._prove(driver)
        except TimeoutError:
            return await self._with_last_words(f"not ready after {limit:g} s (health: {health})")
        self._life.became_ready()
        self._publish()
        return None

    async def _prove(self, driver: Driver) -> Capabilities:
        try:
            return await driver.capabilities()
        except ForebayError as error:
            # Nothing is proven then, and plain requests may still work: the operator sees both.
            log.warning("worker_capabilities_unknown", worker=self._spec.id, error=error.message)
            return Capabilities()

    async def _probe_once(self, driver: Driver) -> str | None:
        health = await driver.health()
        self._life.probed(health)
        if health == "ok":
            self._load = await _load_of(driver)
        self._publish()
        if self._is_lost():
            return self._unreachable()
        if self._spec.url is None and self._life.is_ill_for_good:
            return await self._with_last_words(f"said for {ILL_FOR_GOOD_S:g} s without a break that it is ill")
        return None

    def _is_lost(self) -> bool:
        return self._spec.url is not None and self._life.is_out_of_reach

    # Changes

    def _begin(self) -> None:
        self._capabilities = Capabilities()
        self._life.start_began()
        self._publish()

    def _begin_drain(self) -> None:
        if self._life.state in (State.STARTING, State.READY):
            self._life.drain_began()
            self._publish()

    def _finish(self) -> None:
        """Nothing of it is left: whether that was wanted, the state tells."""
        self._url = self._spec.url
        if self._life.state is not State.FAILED:
            if self._goal is Goal.RESTART:
                self._life.start_requested()
            self._life.stopped()
        self._publish()

    def _crash(self, error: str) -> None:
        self._life.crashed(error)
        self._publish()

    def _publish(self) -> None:
        before, now = self.status, self._view()
        if now == before:
            return
        self.status = now
        if now.state is not before.state:
            _log_state(now)
        elif now.healthy is not before.healthy:
            log.warning("worker_health_changed", worker=now.id, healthy=now.healthy)
        self._on_change(now)
        self._notify()

    def _view(self) -> WorkerStatus:
        spec, life = self._spec, self._life
        asked = spec.launch.context if spec.launch is not None else None
        return WorkerStatus(
            id=spec.id,
            model=spec.model,
            engine=spec.engine,
            state=life.state,
            healthy=life.healthy,
            is_wanted=self._wants_up(),
            max_inflight=spec.max_inflight,
            since=life.since,
            restarts=life.restarts,
            context_tokens=self._capabilities.context_tokens or asked,
            last_error=life.last_error,
            next_start_at=life.next_start_at,
            pid=self._pid,
            url=self._url,
            load=self._load,
            capabilities=self._capabilities,
        )

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _next_change(self) -> None:
        await self._changed.wait()

    async def _until(self, is_reached: Callable[[], bool]) -> None:
        while not is_reached() and not self._is_closed:
            await self._next_change()

    def _wants_up(self) -> bool:
        return self._goal in (Goal.UP, Goal.RESTART)

    def _wants_to_serve(self) -> bool:
        return self._goal is Goal.UP

    # Words

    def _gpu_env(self) -> dict[str, str]:
        if self._visible_devices is None:
            return {}
        # By default CUDA numbers GPUs by speed, nvidia-smi (and so the operator) by their place on the bus.
        return {"CUDA_VISIBLE_DEVICES": self._visible_devices, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

    def _unreachable(self) -> str:
        return f"no answer from {self._spec.url}: is the engine running, and reachable from here?"

    async def _with_last_words(self, error: str) -> str:
        lines = await asyncio.to_thread(self._output.last_words, NUM_LAST_WORDS)
        if not lines:
            return f"{error}; it printed nothing"
        return "\n".join((f"{error}; its last words:", *(f"  {line}" for line in lines)))


async def _load_of(driver: Driver) -> Load | None:
    try:
        async with asyncio.timeout(LOAD_TIMEOUT_S):
            return await driver.load()
    except (ForebayError, TimeoutError):
        return None  # load is advice: not knowing it says nothing of health


def _starts_alike(one: WorkerSpec, other: WorkerSpec) -> bool:
    """Whether two specs differ in nothing that an engine or its driver is started with."""
    return msgspec.structs.replace(one, max_inflight=other.max_inflight, lifecycle=other.lifecycle) == other


def _log_state(status: WorkerStatus) -> None:
    known = {"worker": status.id, "pid": status.pid, "url": status.url}
    match status.state:
        case State.STARTING:
            log.info("worker_start_began", **known)
        case State.READY:
            log.info("worker_became_ready", **known)
        case State.DRAINING:
            log.info("worker_drain_began", **known)
        case State.STOPPED:
            log.info("worker_stopped", **known)
        case State.FAILED:
            log.error("worker_failed", error=status.last_error, **known)


def _exit_text(status: int) -> str:
    if status <= 128:
        return f"exited with status {status}"
    try:
        return f"killed by {signal.Signals(status - 128).name}"
    except ValueError:
        return f"exited with status {status}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
