"""The workers that the settings declare, and how a change of the settings is carried over to those that run."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

import msgspec

from core.ids import ModelName, WorkerId
from engines import devices
from engines.spec import Launch, Lifecycle, WorkerSpec
from engines.supervisor import NO_DEVICES, Supervisor
from gateway.settings import Settings, SettingsError, WorkerSettings

Localize = Callable[[Settings], Settings]
"""Puts files of this machine in the place of models' sources, fetching them: may be slow. Raises ``SettingsError``."""


class Fleet(msgspec.Struct, frozen=True):
    """Workers and their GPUs, found to fit this machine."""

    specs: tuple[WorkerSpec, ...]
    visible_devices: Mapping[WorkerId, str]


async def fleet_of(
    settings: Settings,
    localize: Localize,
    *,
    present: Sequence[WorkerSpec] = (),
    present_devices: Mapping[WorkerId, str] = NO_DEVICES,
) -> Fleet:
    """Return the workers that the settings declare. Those that are ``present`` unchanged keep their ids and GPUs.

    Raises ``SettingsError`` for what this machine cannot give.
    """
    specs = renumbered(specs_of(await asyncio.to_thread(localize, settings)), present)
    ids = [spec.id for spec in specs]
    if doubled := next((worker for worker in ids if ids.count(worker) > 1), None):
        raise SettingsError(f"two models give a worker the id {doubled!r}: `/` and `:` count as `_` there; rename one")
    unchanged = {spec.id for spec in present if spec in specs}
    held = [_held_to(spec, present_devices.get(spec.id, "")) if spec.id in unchanged else spec for spec in specs]
    try:
        visible = devices.assign(held, await devices.inventory() if _wants_gpus(specs) else ())
    except devices.DeviceError as error:
        raise SettingsError(str(error)) from error
    return Fleet(specs, visible)


async def prepare(settings: Settings, localize: Localize, supervisor: Supervisor) -> Callable[[], None]:
    """Find out whether the workers of new settings can be had; return what has the supervisor have them."""
    fleet = await fleet_of(settings, localize, present=supervisor.specs, present_devices=supervisor.visible_devices)
    return lambda: supervisor.apply(fleet.specs, fleet.visible_devices)


def specs_of(settings: Settings) -> tuple[WorkerSpec, ...]:
    """Return every declared worker; those of one model are numbered from 0."""
    specs: list[WorkerSpec] = []
    for name, model in settings.models.items():
        workers = [worker for worker in model.workers for _ in range(worker.replicas)]
        specs += (_spec(_id(ModelName(name), index), ModelName(name), worker) for index, worker in enumerate(workers))
    return tuple(specs)


def renumbered(specs: Sequence[WorkerSpec], present: Sequence[WorkerSpec]) -> tuple[WorkerSpec, ...]:
    """Give workers that are present already the ids they have, wherever they stand now in their model's list."""
    free = {spec.id: spec for spec in present}
    kept: dict[int, WorkerId] = {}
    for index, spec in enumerate(specs):
        twin = next((old.id for old in free.values() if msgspec.structs.replace(old, id=spec.id) == spec), None)
        twin = spec.id if free.get(spec.id) == spec else twin
        if twin is not None:
            kept[index] = twin
            del free[twin]
    taken = set(kept.values())
    result = []
    for index, spec in enumerate(specs):
        number = 0
        while index not in kept and _id(spec.model, number) in taken:
            number += 1
        worker = kept.get(index, _id(spec.model, number))
        taken.add(worker)
        result.append(msgspec.structs.replace(spec, id=worker))
    return tuple(result)


def _id(model: ModelName, number: int) -> WorkerId:
    stem = model.replace("/", "_").replace(":", "_")
    return WorkerId(f"{stem}-{number}")


def _held_to(spec: WorkerSpec, visible_devices: str) -> WorkerSpec:
    """Return a spec that can be assigned nothing but the GPUs it has."""
    if spec.launch is None or not visible_devices:
        return spec
    gpus = tuple(int(index) for index in visible_devices.split(","))
    return msgspec.structs.replace(spec, launch=msgspec.structs.replace(spec.launch, gpus=gpus))


def _spec(worker: WorkerId, model: ModelName, settings: WorkerSettings) -> WorkerSpec:
    launch = settings.launch
    default_inflight = launch.slots if launch is not None else 64
    return WorkerSpec(
        id=worker,
        model=model,
        engine=settings.engine,
        url=settings.url.rstrip("/").removesuffix("/v1") if settings.url is not None else None,
        launch=Launch(
            source=launch.source,
            revision=launch.revision,
            sha256=launch.sha256,
            trust_remote_code=launch.trust_remote_code,
            context=launch.context,
            slots=launch.slots,
            threads=launch.threads,
            gpus=launch.gpus,
            tp=launch.tp,
            memory_gib=launch.memory / 2**30 if launch.memory is not None else None,
            args=launch.args,
            env=launch.env,
            program=launch.program,
            command=launch.command,
        )
        if launch is not None
        else None,
        served_name=settings.served_name,
        api_key=settings.key.get_secret_value() if settings.key is not None else None,
        max_inflight=settings.max_inflight or default_inflight,
        probe_continuation=settings.probe_continuation,
        slot_files=settings.slot_files,
        lifecycle=Lifecycle(**settings.lifecycle.model_dump()),
    )


def _wants_gpus(specs: tuple[WorkerSpec, ...]) -> bool:
    return any(spec.launch is not None and spec.launch.gpus for spec in specs)
