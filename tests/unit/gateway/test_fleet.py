"""Which worker is which after a change of the settings."""

import msgspec

from core.ids import ModelName, WorkerId
from engines.spec import WorkerSpec
from gateway.fleet import renumbered, specs_of
from gateway.settings import Settings


def spec(number: int, url: str, model: str = "m") -> WorkerSpec:
    return WorkerSpec(id=WorkerId(f"{model}-{number}"), model=ModelName(model), engine="openai", url=url)


def ids(specs: tuple[WorkerSpec, ...]) -> dict[str | None, str]:
    return {one.url: one.id for one in specs}


def test_workers_keep_their_ids_when_the_first_of_them_goes() -> None:
    assert ids(renumbered([spec(0, "b")], [spec(0, "a"), spec(1, "b")])) == {"b": "m-1"}


def test_a_changed_worker_takes_the_lowest_id_that_nobody_keeps() -> None:
    assert ids(renumbered([spec(0, "b"), spec(1, "c")], [spec(0, "a"), spec(1, "b")])) == {"b": "m-1", "c": "m-0"}


def test_equal_replicas_are_kept_one_by_one() -> None:
    present = [spec(0, "a"), spec(1, "a")]
    assert [one.id for one in renumbered([*present, spec(2, "a")], present)] == ["m-0", "m-1", "m-2"]


def test_without_a_past_the_ids_are_as_declared() -> None:
    declared = [spec(0, "a"), spec(1, "b"), spec(0, "a", "n")]
    assert renumbered(declared, ()) == tuple(declared)
    assert msgspec.structs.asdict(declared[0])["id"] == "m-0"


def test_an_engine_is_tried_for_continuation_unless_that_is_turned_off() -> None:
    worker = {"engine": "openai", "url": "http://h"}
    models = {"m": {"workers": [worker, {**worker, "probe_continuation": False}]}}
    assert [one.probe_continuation for one in specs_of(Settings.model_validate({"models": models}))] == [True, False]
