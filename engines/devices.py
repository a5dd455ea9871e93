"""Which worker gets which GPUs, and whether they have room for it."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from core.ids import WorkerId
from engines.spec import Launch, WorkerSpec

MIB_PER_GIB = 1024
# nvidia-smi answers in 0.1 s, and within seconds where the driver was not loaded yet.
SMI_TIMEOUT_S = 15.0
# A driver frees a dead process's memory within a second or two; other workers on the device may grow meanwhile, so
# that the old figure need not come back.
FREE_WAIT_S = 15.0
FREE_SLACK_MIB = 512


class Gpu(msgspec.Struct, frozen=True):
    """One device as nvidia-smi numbers it."""

    index: int
    memory_gib: float


class DeviceError(ValueError):
    """The declared workers do not fit the machine's GPUs; the message says what to change."""


class _Room(msgspec.Struct):
    """What is left of one GPU while workers are assigned."""

    total_gib: float
    taken_gib: float = 0.0
    holders: list[WorkerId] = []
    owner: WorkerId | None = None


def assign(specs: Iterable[WorkerSpec], inventory: Sequence[Gpu]) -> dict[WorkerId, str]:
    """Return ``CUDA_VISIBLE_DEVICES`` for every worker that we launch; "" hides all GPUs from those that ask for none.

    ``tp`` of the ``gpus`` that a worker lists are given to it. With ``memory_gib`` it may share them while the sums
    fit; without, it has them for itself. Workers with the least choice are served first. Raises ``DeviceError``.
    """
    rooms = {gpu.index: _Room(gpu.memory_gib) for gpu in inventory}
    launches = [(spec.id, spec.launch) for spec in specs if spec.launch is not None]
    for worker, launch in launches:
        _check(worker, launch, rooms)
    visible: dict[WorkerId, str] = {}
    for worker, launch in sorted(launches, key=_choice):
        visible[worker] = ",".join(str(index) for index in _place(worker, launch, rooms))
    return visible


def _choice(item: tuple[WorkerId, Launch]) -> tuple[int, bool, float]:
    _, launch = item
    return len(launch.gpus) - launch.tp, launch.memory_gib is not None, -(launch.memory_gib or 0.0)


def _check(worker: WorkerId, launch: Launch, rooms: Mapping[int, _Room]) -> None:
    if not launch.gpus:
        if launch.tp > 1:
            raise DeviceError(f"worker {worker!r} has tp: {launch.tp} and no gpus: list the GPUs it may use")
        return
    unknown = [index for index in launch.gpus if index not in rooms]
    if unknown:
        known = f"this machine has {sorted(rooms)}" if rooms else "nvidia-smi shows none on this machine"
        raise DeviceError(f"worker {worker!r} lists GPU {unknown[0]}, but {known}: change its gpus")
    if len(set(launch.gpus)) < len(launch.gpus):
        raise DeviceError(f"worker {worker!r} lists a GPU twice in {list(launch.gpus)}: list each once")
    if not 1 <= launch.tp <= len(launch.gpus):
        raise DeviceError(
            f"worker {worker!r} has tp: {launch.tp} and {len(launch.gpus)} in gpus: list at least tp GPUs, or lower tp"
        )


def _place(worker: WorkerId, launch: Launch, rooms: Mapping[int, _Room]) -> list[int]:
    if not launch.gpus:
        return []
    obstacles = {index: _obstacle(launch.memory_gib, rooms[index]) for index in launch.gpus}
    fitting = [index for index in launch.gpus if obstacles[index] is None]
    if len(fitting) < launch.tp:
        reasons = "; ".join(f"GPU {index} {why}" for index, why in obstacles.items() if why)
        raise DeviceError(
            f"worker {worker!r} needs {launch.tp} of the GPUs {list(launch.gpus)} and {len(fitting)} can take it: "
            f"{reasons}. Lower memory_gib, list other gpus, or remove a worker"
        )
    # Stable: among equally empty ones the operator's order holds.
    chosen = sorted(sorted(fitting, key=lambda index: rooms[index].taken_gib)[: launch.tp])
    for index in chosen:
        room = rooms[index]
        room.holders.append(worker)
        room.taken_gib += launch.memory_gib or room.total_gib
        room.owner = worker if launch.memory_gib is None else room.owner
    return chosen


def _obstacle(memory_gib: float | None, room: _Room) -> str | None:
    if room.owner is not None:
        return f"belongs to {room.owner!r} alone, which gives no memory_gib"
    if memory_gib is None:
        return f"is shared by {room.holders}, so memory_gib has to be given" if room.holders else None
    if room.taken_gib + memory_gib > room.total_gib:
        return (
            f"has {room.total_gib:g} GiB, of which {room.taken_gib:g} are taken by {room.holders} "
            f"and {memory_gib:g} more are asked for"
        )
    return None


async def inventory() -> tuple[Gpu, ...]:
    """Return this machine's GPUs; none where nvidia-smi is missing or fails."""
    rows = await _query("index,memory.total")
    return tuple(Gpu(index, mib / MIB_PER_GIB) for index, mib in rows)


async def memory_used(indices: Sequence[int]) -> dict[int, int]:
    """Return the MiB in use on each of these GPUs; nothing where that cannot be told. No cost without GPUs."""
    if not indices:
        return {}
    return {index: mib for index, mib in await _query("index,memory.used") if index in indices}


async def wait_until_freed(before: Mapping[int, int]) -> bool:
    """Wait until each GPU has about as much memory in use as ``before``, some seconds at most; False if not by then."""
    try:
        async with asyncio.timeout(FREE_WAIT_S):
            while True:
                if _is_freed(before, await memory_used(tuple(before))):
                    return True
                await asyncio.sleep(0.3)
    except TimeoutError:
        return False


def _is_freed(before: Mapping[int, int], now: Mapping[int, int]) -> bool:
    return all(now.get(index, 0) <= mib + FREE_SLACK_MIB for index, mib in before.items())


async def _query(fields: str) -> list[tuple[int, int]]:
    try:
        smi = await asyncio.create_subprocess_exec(
            "nvidia-smi",
            f"--query-gpu={fields}",
            "--format=csv,noheader,nounits",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return []
    try:
        async with asyncio.timeout(SMI_TIMEOUT_S):
            output, _ = await smi.communicate()
    except TimeoutError:
        return []
    finally:
        if smi.returncode is None:
            smi.kill()
    return parse_rows(output.decode(errors="replace")) if smi.returncode == 0 else []


def parse_rows(csv: str) -> list[tuple[int, int]]:
    """Return the pairs of numbers in nvidia-smi's answer, less the rows that hold none ("[N/A]")."""
    rows = []
    for line in csv.splitlines():
        index, _, value = line.partition(",")
        if index.strip().isdigit() and value.strip().isdigit():
            rows.append((int(index), int(value)))
    return rows
