"""The supervisor and its guards with real processes: starts, crashes, stops, and what is left afterwards."""

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from uuid import uuid4

import aiohttp
import msgspec
import psutil
import pytest
import uvloop

from core.clock import SystemClock
from core.ids import ModelName, WorkerId
from engines.driver import Driver
from engines.spec import Launch, Lifecycle, WorkerSpec
from engines.supervisor import Supervisor
from engines.worker import State, WorkerStatus
from tests.fakes.engines import FakeServerEngine

ROOT = Path(__file__).resolve().parents[2]
MARK = "SUPERVISOR_TEST"
A = WorkerId("org/model-0")
QUICK = Lifecycle(
    start_timeout=15.0, drain_timeout=10.0, stop_timeout=5.0, probe_interval=0.1, backoff_base=0.1, backoff_max=1.0
)
FAKE_SERVER = (sys.executable, "-m", "engines.fake_server", "--port", "{port}")
# Leaves a process behind in a session of its own, as vLLM's engine core may.
STRAY = "import subprocess, sys; subprocess.Popen(['sleep', '1000'], start_new_session=True); "
WITH_STRAY = (sys.executable, "-c", STRAY + "import os; os.execv(sys.argv[1], sys.argv[1:])", *FAKE_SERVER)


class House:
    """A supervisor with the changes it told of."""

    def __init__(self, mark: str, log_dir: Path) -> None:
        self.env = {**os.environ, MARK: mark, "FOREBAY_ADMIN_KEY": "secret"}
        self.engine = FakeServerEngine()
        self.log_dir = log_dir
        self.running = 0
        self.changes: list[WorkerStatus] = []
        self._changed = asyncio.Event()
        self.supervisor: Supervisor

    def on_change(self, status: WorkerStatus) -> None:
        self.changes.append(status)
        self._changed.set()

    def supervise(self, *specs: WorkerSpec) -> Supervisor:
        self.supervisor = Supervisor(
            specs,
            {"fake": self.engine, "faulty": FaultyEngine()},
            SystemClock(),
            self.log_dir,
            self.on_change,
            num_running=lambda _: self.running,
            env=self.env,
        )
        return self.supervisor

    @property
    def status(self) -> WorkerStatus:
        return self.supervisor.statuses()[0]

    @property
    def states(self) -> list[State]:
        """States in the order in which they were taken."""
        seen = [status.state for status in self.changes]
        return [state for i, state in enumerate(seen) if i == 0 or state is not seen[i - 1]]

    async def until(self, holds: Callable[[WorkerStatus], bool]) -> WorkerStatus:
        """Wait for a status; fails after some seconds."""
        async with asyncio.timeout(15):
            while not holds(self.status):
                self._changed.clear()
                await self._changed.wait()
        return self.status

    async def next_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def ready(self, restarts: int = 0) -> WorkerStatus:
        return await self.until(lambda status: status.state is State.READY and status.restarts >= restarts)


OpenHouse = Callable[..., AbstractAsyncContextManager[House]]


def spec(*flags: str, command: tuple[str, ...] = (), lifecycle: Lifecycle = QUICK) -> WorkerSpec:
    launch = Launch(args=flags, command=command)
    return WorkerSpec(id=A, model=ModelName("org/model"), engine="fake", launch=launch, lifecycle=lifecycle)


def marked(mark: str) -> list[int]:
    """Every living process that descends from this test."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def mark() -> Iterator[str]:
    mark = uuid4().hex
    yield mark
    left = marked(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "the test left processes behind"


@pytest.fixture
def open_house(mark: str, tmp_path: Path) -> OpenHouse:
    @asynccontextmanager
    async def open_house(*specs: WorkerSpec) -> AsyncIterator[House]:
        house = House(mark, tmp_path / "logs")
        async with house.supervise(*specs):
            yield house

    return open_house


async def put_faults(url: str | None, **faults: object) -> None:
    async with aiohttp.ClientSession() as session, session.post(f"{url}/fake/faults", json=faults) as response:
        assert response.status == 200


async def test_a_worker_becomes_ready_and_stops_without_a_trace(open_house: OpenHouse, mark: str) -> None:
    async with open_house(spec("--spawn-child")) as house:
        status = await house.ready()
        assert (status.healthy, status.context_tokens, status.restarts) == (True, 4096, 0)
        assert house.supervisor.driver_of(A) is not None
        assert status.pid in marked(mark)

        await house.supervisor.stop(A)

        assert house.states == [State.STARTING, State.READY, State.DRAINING, State.STOPPED]
        assert house.supervisor.driver_of(A) is None
        assert (house.status.pid, house.status.url, marked(mark)) == (None, None, [])
        assert is_free(house.engine.starts[0][0])


async def test_leaving_the_supervisor_stops_every_worker_at_the_same_time(open_house: OpenHouse, mark: str) -> None:
    stubborn = msgspec.structs.replace(QUICK, stop_timeout=1.0)
    specs = [
        msgspec.structs.replace(spec("--ignore-sigterm", lifecycle=stubborn), id=WorkerId(f"w{i}")) for i in range(3)
    ]
    async with open_house(*specs) as house:
        for one in specs:
            assert (await house.supervisor.settled(one.id)).state is State.READY
        began = time.monotonic()

    assert time.monotonic() - began < 2.5
    assert [status.state for status in house.supervisor.statuses()] == [State.STOPPED] * 3
    assert marked(mark) == []


async def test_a_killed_worker_is_noticed_at_once_and_started_again(open_house: OpenHouse) -> None:
    async with open_house(spec()) as house:
        before = await house.ready()
        assert before.pid is not None
        killed_at = time.monotonic()
        os.kill(before.pid, signal.SIGKILL)

        failed = await house.until(lambda status: status.state is State.FAILED)
        assert time.monotonic() - killed_at < 1.0
        assert failed.last_error is not None
        assert failed.last_error.startswith("killed by SIGKILL")
        assert house.supervisor.driver_of(A) is None

        after = await house.ready(restarts=1)
        assert after.pid != before.pid
        (port, key), (next_port, next_key) = house.engine.starts
        assert port != next_port
        assert key != next_key


async def test_a_worker_that_exits_at_once_fails_with_its_last_words(open_house: OpenHouse) -> None:
    async with open_house(spec("--exit-at-start", "3")) as house:
        status = await house.supervisor.settled(A)

        assert status.state is State.FAILED
        assert status.last_error is not None
        assert status.last_error.startswith("exited with status 3 ")
        assert status.last_error.endswith("its last words:\n  fake_server: exits at start, as it was told to")
        assert status.next_start_at is not None


async def test_a_worker_that_keeps_crashing_is_tried_again_ever_later(open_house: OpenHouse) -> None:
    crash = (sys.executable, "-I", "-S", "-c", "raise SystemExit(1)")
    async with open_house(spec(command=crash)) as house:
        await house.until(lambda status: status.restarts == 3)

    delays = [change.next_start_at - change.since for change in house.changes if change.next_start_at is not None]
    assert [round(delay, 1) for delay in sorted(set(delays))][:3] == [0.1, 0.2, 0.4]


async def test_a_missing_program_is_named_to_the_operator(open_house: OpenHouse) -> None:
    async with open_house(spec(command=("/no/such/engine", "--port", "{port}"))) as house:
        status = await house.supervisor.settled(A)

    assert status.last_error is not None
    assert "cannot run '/no/such/engine': No such file or directory" in status.last_error


async def test_a_worker_that_is_not_ready_in_time_is_stopped_and_failed(open_house: OpenHouse, mark: str) -> None:
    impatient = msgspec.structs.replace(QUICK, start_timeout=0.3, backoff_base=30.0, backoff_max=30.0)
    async with open_house(spec(command=("sleep", "1000"), lifecycle=impatient)) as house:
        status = await house.until(lambda status: status.state is State.FAILED and status.pid is None)

        assert status.last_error == "not ready after 0.3 s (health: unreachable); it printed nothing"
        await house.until(lambda status: status.url is None)
        assert marked(mark) == []


async def test_a_worker_that_ignores_sigterm_is_killed_after_its_stop_timeout(open_house: OpenHouse) -> None:
    short = msgspec.structs.replace(QUICK, stop_timeout=0.5)
    async with open_house(spec("--ignore-sigterm", lifecycle=short)) as house:
        await house.ready()
        began = time.monotonic()

        await house.supervisor.stop(A)

        assert 0.5 <= time.monotonic() - began < 2.0
        assert house.status.state is State.STOPPED


async def test_a_grandchild_in_another_session_dies_with_a_stopped_worker(open_house: OpenHouse, mark: str) -> None:
    async with open_house(spec(command=WITH_STRAY)) as house:
        await house.ready()
        assert len(marked(mark)) == 3  # guard, worker, stray

        await house.supervisor.stop(A)

        assert marked(mark) == []


@pytest.mark.parametrize("victim", ["worker", "guard"])
async def test_nothing_of_a_killed_process_tree_survives(open_house: OpenHouse, mark: str, victim: str) -> None:
    patient = msgspec.structs.replace(QUICK, backoff_base=30.0, backoff_max=30.0)
    async with open_house(spec(command=WITH_STRAY, lifecycle=patient)) as house:
        pid = (await house.ready()).pid
        assert pid is not None
        os.kill(pid if victim == "worker" else psutil.Process(pid).ppid(), signal.SIGKILL)

        await house.until(lambda status: status.state is State.FAILED and status.url is None)

        assert marked(mark) == []


async def test_failing_probes_do_not_evict_a_worker_whose_process_lives(open_house: OpenHouse) -> None:
    async with open_house(spec()) as house:
        url = (await house.ready()).url
        await put_faults(url, unhealthy=True)
        ill = await house.until(lambda status: not status.healthy)
        assert ill.state is State.READY
        assert house.supervisor.driver_of(A) is not None

        await put_faults(url)
        well = await house.until(lambda status: status.healthy)

        assert (well.restarts, well.url) == (0, url)


async def test_a_stopped_engine_that_does_not_answer_stays_ready(open_house: OpenHouse) -> None:
    frozen = msgspec.structs.replace(QUICK, fall=1)
    async with open_house(spec(lifecycle=frozen)) as house:
        pid = (await house.ready()).pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        ill = await house.until(lambda status: not status.healthy)
        os.kill(pid, signal.SIGCONT)

        assert ill.state is State.READY
        assert (await house.until(lambda status: status.healthy)).pid == pid


async def test_a_drain_waits_for_what_runs_and_then_stops(open_house: OpenHouse) -> None:
    async with open_house(spec()) as house, asyncio.TaskGroup() as tasks:
        await house.ready()
        house.running = 1
        draining = tasks.create_task(house.supervisor.drain(A))
        await house.until(lambda status: status.state is State.DRAINING)
        await asyncio.sleep(0.3)
        assert house.status.pid is not None
        assert house.supervisor.driver_of(A) is not None

        house.running = 0
        await draining

        assert house.states[-2:] == [State.DRAINING, State.STOPPED]


async def test_a_drain_ends_when_its_time_is_up(open_house: OpenHouse) -> None:
    async with open_house(spec(lifecycle=msgspec.structs.replace(QUICK, drain_timeout=0.2))) as house:
        await house.ready()
        house.running = 1

        await house.supervisor.drain(A)

        assert house.status.state is State.STOPPED


async def test_a_start_calls_a_drain_off(open_house: OpenHouse) -> None:
    async with open_house(spec()) as house, asyncio.TaskGroup() as tasks:
        pid = (await house.ready()).pid
        house.running = 1
        draining = tasks.create_task(house.supervisor.drain(A))
        await house.until(lambda status: status.state is State.DRAINING)

        house.supervisor.start(A)
        await draining

        assert (await house.ready()).pid == pid


async def test_verbs_at_the_same_time_do_the_work_once(open_house: OpenHouse) -> None:
    async with open_house(spec()) as house:
        await house.ready()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(house.supervisor.restart(A))
        await house.ready(restarts=1)
        async with asyncio.TaskGroup() as tasks:
            for verb in (house.supervisor.stop, house.supervisor.drain, house.supervisor.stop):
                tasks.create_task(verb(A))

    assert house.states.count(State.STARTING) == 2
    assert (house.status.state, house.status.restarts) == (State.STOPPED, 1)


async def test_a_stop_just_after_the_start_is_not_lost(open_house: OpenHouse) -> None:
    async with open_house(spec(command=("sleep", "1000"))) as house:
        for _ in range(5):
            await house.until(lambda status: status.pid is not None)
            began = time.monotonic()
            await house.supervisor.stop(A)
            assert time.monotonic() - began < QUICK.stop_timeout / 2
            house.supervisor.start(A)


class FaultyEngine(FakeServerEngine):
    """Its drivers have a bug."""

    def driver(self, spec: WorkerSpec, base_url: str, key: str | None) -> Driver:
        raise RuntimeError("a bug")


async def test_a_fault_in_one_driver_is_told_and_ends_nothing_else(mark: str, tmp_path: Path) -> None:
    house = House(mark, tmp_path)
    good = msgspec.structs.replace(spec(), id=WorkerId("good"), engine="fake")
    bad = msgspec.structs.replace(spec(), engine="faulty")
    async with house.supervise(bad, good):
        assert (await house.supervisor.settled(good.id)).state is State.READY
        status = await house.until(lambda status: status.restarts >= 1 and status.state is State.FAILED)

        assert status.last_error == "internal fault, see the server's log: RuntimeError('a bug')"
        assert len(marked(mark)) <= 4  # a guard and a worker for each: no second process beside a first


async def test_an_error_inside_the_context_passes_through_and_stops_the_workers(open_house: OpenHouse) -> None:
    houses = []

    async def own() -> None:
        async with open_house(spec()) as house:
            houses.append(house)
            await house.ready()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await own()

    assert houses[0].status.state is State.STOPPED


async def test_a_cancelled_owner_stops_its_workers(open_house: OpenHouse, mark: str) -> None:
    async def own() -> None:
        async with open_house(spec()) as house:
            await house.ready()
            is_ready.set()
            await asyncio.sleep(1000)

    is_ready = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        owner = tasks.create_task(own())
        await is_ready.wait()
        owner.cancel()

    assert owner.cancelled()
    assert marked(mark) == []


async def test_a_stopped_worker_starts_again_when_told(open_house: OpenHouse) -> None:
    async with open_house(spec(command=("sleep", "1000"))) as house:
        await house.until(lambda status: status.pid is not None)
        await house.supervisor.stop(A)
        assert house.status.state is State.STOPPED

        house.supervisor.start(A)

        await house.until(lambda status: status.pid is not None and status.restarts == 1)


async def test_a_log_is_private_and_holds_no_key(open_house: OpenHouse) -> None:
    script = "import os; print('key', os.environ['FOREBAY_WORKER_KEY'], os.environ.get('FOREBAY_ADMIN_KEY'))"
    async with open_house(spec(command=(sys.executable, "-I", "-S", "-c", script, "{key}"))) as house:
        await house.supervisor.settled(A)
        header, line = (await house.supervisor.logs(A, 100))[:2]

        assert header.startswith("--- ")
        assert header.endswith(" ***")
        assert line == "key *** None"
        (file,) = house.log_dir.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


@contextmanager
def guarded(tmp_path: Path, code: str, log_bytes: int = 100_000) -> Iterator[subprocess.Popen[bytes]]:
    """A guard with a worker that runs Python code; it has said that the worker runs."""
    argv = [sys.executable, "-I", "-S", "-c", code]
    fields = {"argv": argv, "env": {}, "log": str(tmp_path / "log"), "log_bytes": log_bytes, "secrets": ["key"]}
    guard = [sys.executable, "-I", "-S", "engines/guard.py"]
    with subprocess.Popen(guard, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode({**fields, "grace_s": 0.2}) + b"\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith(b"pid ")
        yield process


@pytest.mark.parametrize(
    ("code", "status"),
    [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 128 + 9), ("pass", 0)],
)
def test_a_guard_exits_as_its_worker_did(tmp_path: Path, code: str, status: int) -> None:
    with guarded(tmp_path, code) as guard:
        assert guard.wait(10) == status


def test_a_guard_passes_sigterm_on(tmp_path: Path) -> None:
    with guarded(tmp_path, "import time; time.sleep(1000)") as guard:
        guard.terminate()
        assert guard.wait(10) == 128 + signal.SIGTERM


def test_a_log_never_grows_past_its_bound_and_keeps_the_newest(tmp_path: Path) -> None:
    talk = "for i in range(5000): print('line', i, 'x' * 40)"
    with guarded(tmp_path, talk) as guard:
        assert guard.wait(10) == 0

    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"log", "log.1"}
    assert max(sizes.values()) <= 100_000
    assert (tmp_path / "log").read_text().splitlines()[-1].startswith("line 4999")


GATEWAY = """
import asyncio, os, sys
from pathlib import Path
from core.clock import SystemClock
from engines.supervisor import Supervisor
from tests.integration.test_supervisor import A, House, WITH_STRAY, spec

async def main():
    house = House(sys.argv[1], Path(sys.argv[2]))
    async with house.supervise(spec("--ignore-sigterm", command=WITH_STRAY)):
        await house.ready()
        print("ready", flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


def test_a_gateway_killed_by_force_leaves_no_process_within_two_seconds(mark: str, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", GATEWAY, mark, str(tmp_path)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as gateway:
        assert gateway.stdout is not None
        while gateway.stdout.readline() != "ready\n":
            assert gateway.poll() is None
        assert len(marked(mark)) == 3

        gateway.kill()

        deadline = time.monotonic() + 2.0
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert marked(mark) == []


async def serve_attached(port: int, mark: str) -> asyncio.subprocess.Process:
    argv = [word.format(port=port) for word in FAKE_SERVER]
    return await asyncio.create_subprocess_exec(*argv, cwd=ROOT, env={**os.environ, MARK: mark})


async def test_an_attached_worker_is_found_again_and_never_killed(open_house: OpenHouse, mark: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    attached = msgspec.structs.replace(spec(), launch=None, url=f"http://127.0.0.1:{port}/")
    async with open_house(attached) as house:
        first = await serve_attached(port, mark)
        await house.ready()
        first.kill()
        await first.wait()
        lost = await house.until(lambda status: status.state is State.FAILED)
        assert lost.last_error is not None
        assert lost.last_error.startswith("no answer from http://127.0.0.1")

        second = await serve_attached(port, mark)
        assert (await house.ready()).pid is None

    assert house.status.state is State.STOPPED
    assert second.returncode is None
    second.kill()
    await second.wait()


def test_a_worker_lives_under_uvloop_too(mark: str, tmp_path: Path) -> None:
    async def scenario() -> list[State]:
        house = House(mark, tmp_path)
        async with house.supervise(spec()):
            pid = (await house.ready()).pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await house.ready(restarts=1)
        return house.states

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        states = runner.run(scenario())

    assert states[2:] == [State.FAILED, State.STARTING, State.READY, State.DRAINING, State.STOPPED]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "nonsense"}, r"choose one of \['fake', 'faulty'\]"),
        ({"url": "http://x"}, "either url or launch"),
        ({"launch": None}, "either url or launch"),
    ],
)
def test_a_worker_that_cannot_be_kept_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        House("", tmp_path).supervise(msgspec.structs.replace(spec(), **changes))


def named(worker: str, *flags: str, lifecycle: Lifecycle = QUICK) -> WorkerSpec:
    return msgspec.structs.replace(spec(*flags, lifecycle=lifecycle), id=WorkerId(worker))


async def test_a_worker_that_is_added_starts_and_those_that_are_unchanged_keep_running(open_house: OpenHouse) -> None:
    async with open_house(named("a")) as house:
        before = await house.ready()
        house.supervisor.apply([named("a"), named("b")])

        assert (await house.supervisor.settled(WorkerId("b"))).state is State.READY
        assert house.supervisor.status(WorkerId("a")).pid == before.pid


async def test_a_worker_that_is_removed_finishes_its_requests_and_is_forgotten(open_house: OpenHouse) -> None:
    async with open_house(named("a"), named("b")) as house:
        await house.supervisor.settled(WorkerId("b"))
        house.running = 1
        house.supervisor.apply([named("a")])
        await asyncio.sleep(0.2)
        assert house.supervisor.status(WorkerId("b")).is_draining
        assert not house.supervisor.status(WorkerId("b")).is_wanted

        house.running = 0
        async with asyncio.timeout(15):
            while house.changes[-1].state is not State.STOPPED:
                await house.next_change()
        await asyncio.sleep(0.05)
        assert house.supervisor.driver_of(WorkerId("b")) is None
        with pytest.raises(KeyError):
            house.supervisor.status(WorkerId("b"))


async def test_a_worker_that_has_changed_is_drained_and_started_anew(open_house: OpenHouse) -> None:
    async with open_house(named("a")) as house:
        before = await house.ready()
        house.supervisor.apply([named("a", "--max-model-len", "2048")])
        assert house.status.is_wanted

        after = await house.ready(restarts=1)
        assert after.pid != before.pid
        assert "2048" in psutil.Process(after.pid).cmdline()


async def test_new_bounds_alone_restart_nothing(open_house: OpenHouse) -> None:
    async with open_house(named("a")) as house:
        before = await house.ready()
        house.supervisor.apply([msgspec.structs.replace(named("a"), max_inflight=9)])
        assert (house.status.pid, house.status.max_inflight) == (before.pid, 9)


async def test_a_worker_that_returns_while_it_leaves_stays(open_house: OpenHouse) -> None:
    async with open_house(named("a")) as house:
        before = await house.ready()
        house.running = 1
        house.supervisor.apply([])
        await house.until(lambda status: status.state is State.DRAINING)
        house.supervisor.apply([named("a")])

        assert (await house.ready()).pid == before.pid


async def test_a_stopped_worker_that_changes_stays_stopped(open_house: OpenHouse) -> None:
    async with open_house(named("a")) as house:
        await house.ready()
        await house.supervisor.stop(WorkerId("a"))
        house.supervisor.apply([named("a", "--max-model-len", "2048")])
        assert house.status.state is State.STOPPED

        house.supervisor.start(WorkerId("a"))
        assert "2048" in psutil.Process((await house.ready()).pid).cmdline()


async def test_a_set_that_cannot_be_kept_changes_nothing(open_house: OpenHouse) -> None:
    async with open_house(named("a")) as house:
        before = await house.ready()
        with pytest.raises(ValueError, match="ids must differ"):
            house.supervisor.apply([named("b"), named("b")])
        assert [(status.id, status.pid) for status in house.supervisor.statuses()] == [("a", before.pid)]
