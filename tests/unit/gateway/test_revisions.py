"""Overlays over the declared settings: what they may change, what wins, what is dropped."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from core.errors import PreconditionFailed
from core.records import Revision
from gateway import revisions
from gateway.live import Live
from gateway.overlays import OverlayRefused, Overlays
from gateway.settings import Declared, declare, read
from tests.fakes.clock import ManualClock

KEY = "fbk_the-first-of-two-good-keys"
WORKER = {"engine": "openai", "url": "http://user:hidden@127.0.0.1:1/v1"}


def declared(**sections: Any) -> Declared:
    tree = {"models": {"a.b": {"workers": [WORKER]}, "big": {"workers": [WORKER]}}, **sections}
    return declare(tree, {}, origin="forebay.yaml")


def value_of(of: revisions.Effective, path: str) -> revisions.Value:
    return next(value for value in revisions.values(of) if value.path == path)


def message_of(overlay: dict[str, object], resource: str = "config", **sections: Any) -> str:
    (fault,) = revisions.validate(declared(**sections), resource, overlay)
    return fault.message


@pytest.mark.parametrize(
    ("overlay", "resource"),
    [
        ({"timeouts.total": "30s"}, "config"),
        ({"models.a.b.fallbacks": ["big"]}, "config"),
        ({"models.a.b.price.input": 0.5}, "config"),
        ({"models.big.timeouts": {"total": 5}}, "config"),
        ({"log.level": "debug"}, "config"),
        ({"request_log.sample": 0.1, "tracing.sample": 0}, "config"),
        ({"tenants.acme.budgets": [{"usd": 5, "per": "day"}]}, "config"),
        ({"defaults.limits.rpm": 60, "queue.size": 5, "retry.attempts": 1}, "fairness"),
    ],
)
def test_what_is_marked_may_be_overlaid(overlay: dict[str, object], resource: str) -> None:
    assert revisions.validate(declared(tenants={"acme": {}}), resource, overlay) == ()


@pytest.mark.parametrize(
    "path",
    [
        "server.port",
        "models.big.workers",
        "models.big",
        "models",
        "keys",
        "admin_key",
        "database.url",
        "log",
        "",
        "redis",
    ],
)
def test_what_is_not_marked_is_the_file_s_alone(path: str) -> None:
    assert "change it in forebay.yaml" in message_of({path: {}})


@pytest.mark.parametrize("path", ["models.big.workers.0.launch.command", "models.big.workers.0.url"])
def test_a_worker_cannot_be_overlaid(path: str) -> None:
    assert revisions.validate(declared(), "config", {path: ["sh"]})


def test_a_place_that_does_not_exist_is_refused_with_the_nearest_name() -> None:
    assert "did you mean `timeouts`?" in message_of({"timeout.total": 1})
    assert "did you mean `big`?" in message_of({"models.bg.price.input": 1})
    assert "given as a whole" in message_of({"timeouts.total.x": 1})


def test_a_value_that_is_wrong_names_its_entry() -> None:
    (fault,) = revisions.validate(declared(), "config", {"timeouts.total": "soon"})
    assert fault.path == "timeouts.total"
    assert "'soon' is not a quantity" in fault.message


def test_a_key_of_a_policy_is_changed_through_the_policy_alone() -> None:
    assert "belongs to `fairness`" in message_of({"queue.size": 1})
    assert "belongs to `config`" in message_of({"timeouts.total": 1}, "fairness")


def test_references_are_not_followed_in_an_overlay(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("debug")
    assert revisions.validate(declared(), "config", {"log.level": f"${{file:{tmp_path / 'secret'}}}"})


def test_the_overlay_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "forebay.yaml"
    path.write_text(
        "timeouts: {total: 10, idle: 10, queue: 10}\nmodels: {m: {workers: [{engine: openai, url: 'http://h'}]}}\n"
    )
    env = {"FOREBAY_TIMEOUTS__IDLE": "20s", "FOREBAY_TIMEOUTS__QUEUE": "20s"}
    found = revisions.effective(read(path, env), {"config": {"timeouts.queue": 30}})

    seen = {name: value_of(found, f"timeouts.{name}") for name in ("connect", "total", "idle", "queue")}
    assert {name: (value.value, value.source) for name, value in seen.items()} == {
        "connect": (2.0, "default"),
        "total": (10.0, "file"),
        "idle": (20.0, "environment"),
        "queue": (30.0, "overlay"),
    }


def test_an_entry_that_the_file_has_no_room_for_is_dropped_and_the_others_hold() -> None:
    overlay = {"models.a.b.fallbacks": ["big"], "models.gone.price.input": 1, "timeouts.total": 30}
    smaller = declare({"models": {"a.b": {"workers": [WORKER]}}}, {}, origin="forebay.yaml")

    found = revisions.effective(smaller, {"config": overlay})

    assert [fault.path for fault in found.dropped] == ["models.gone.price.input", "models.a.b.fallbacks"]
    assert found.settings.timeouts.total == 30
    assert found.settings.models["a.b"].fallbacks == ()


def test_a_diff_names_what_differs_with_its_source() -> None:
    base = revisions.effective(declared(), {})
    changed = revisions.effective(declared(), {"config": {"timeouts.total": 30}})
    assert revisions.diff(base, changed) == (revisions.Change("timeouts.total", 600.0, 30.0, "overlay"),)


def test_no_secret_is_shown_and_a_changed_one_is_told_of_all_the_same() -> None:
    def keyed(key: str) -> revisions.Effective:
        return revisions.effective(declared(keys=[{"name": "k", "tenant": "t", "key": key}]), {})

    old, new = keyed(KEY), keyed("fbk_the-second-of-two-good-keys")
    assert revisions.diff(old, new) == (revisions.Change("keys.0.key", "***", "***", "file"),)
    shown = f"{revisions.tree(old)} {revisions.values(old)}"
    assert KEY not in shown
    assert "hidden" not in shown


class FakeStore:
    """Revisions in memory, as `RevisionStore` says."""

    def __init__(self) -> None:
        self.found: list[Revision] = []
        self.number = 0
        self.is_away = False

    async def version(self) -> int:
        if self.is_away:
            raise OSError("away")
        return self.number

    async def add(self, revision: Revision) -> None:
        self.number += 1
        self.found.insert(0, revision)

    async def list(self, resource: str, after: int | None = None, limit: int = 100) -> tuple[Revision, ...]:
        return tuple(one for one in self.found if one.resource == resource and (after is None or one.number < after))

    async def revision(self, resource: str, number: int) -> Revision | None:
        return next((one for one in self.found if (one.resource, one.number) == (resource, number)), None)

    async def set_state(self, resource: str, number: int, state: Any, *, expires_at: float | None = None) -> None:
        self.number += 1
        self.found = [
            msgspec.structs.replace(one, state=state, expires_at=expires_at)
            if (one.resource, one.number) == (resource, number)
            else one
            for one in self.found
        ]


class Bench:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = FakeStore()
        self.live = Live(declared())
        self.overlays = Overlays(self.store, self.live, self.clock)

    @property
    def total(self) -> float:
        return self.live.settings.timeouts.total


async def test_what_is_applied_holds_and_the_one_before_returns_by_a_rollback() -> None:
    bench = Bench()
    await bench.overlays.apply("config", {"timeouts.total": 30}, author="ann", expected=0)
    await bench.overlays.apply("config", {"timeouts.total": 40}, author="ann", expected=1)
    assert bench.total == 40

    await bench.overlays.rollback("config", author="bob")
    assert bench.total == 30
    assert [one.state for one in bench.store.found] == ["applied", "rolled_back", "replaced"]


async def test_a_change_that_was_made_from_another_revision_changes_nothing() -> None:
    bench = Bench()
    with pytest.raises(PreconditionFailed, match="the settings file alone is in force for 'config', not revision 3"):
        await bench.overlays.apply("config", {"timeouts.total": 30}, author="ann", expected=3)
    await bench.overlays.canary("config", {"timeouts.total": 30}, author="ann", expected=0, lasts_s=60)
    with pytest.raises(PreconditionFailed, match="revision 1 is in force for 'config', not the settings file alone"):
        await bench.overlays.apply("config", {"timeouts.total": 40}, author="bob", expected=0)
    bench.clock.advance(61)
    with pytest.raises(PreconditionFailed):
        await bench.overlays.canary("config", {"timeouts.total": 40}, author="bob", expected=1, lasts_s=60)
    assert [one.number for one in bench.store.found] == [1]


async def test_a_rollback_of_the_first_revision_is_back_to_the_file() -> None:
    bench = Bench()
    await bench.overlays.apply("config", {"timeouts.total": 30}, author="ann", expected=None)
    await bench.overlays.rollback("config", author="ann")
    assert bench.total == 600


async def test_a_canary_that_nobody_keeps_ends_by_itself() -> None:
    bench = Bench()
    await bench.overlays.apply("config", {"timeouts.total": 30}, author="ann", expected=None)
    await bench.overlays.canary("config", {"timeouts.total": 5}, author="ann", expected=None, lasts_s=60)
    assert bench.total == 5

    bench.clock.advance(61)
    await bench.overlays.follow()

    assert bench.total == 30
    assert [one.state for one in bench.store.found] == ["rolled_back", "applied"]


async def test_a_canary_that_is_kept_stays() -> None:
    bench = Bench()
    await bench.overlays.canary("config", {"timeouts.total": 5}, author="ann", expected=None, lasts_s=60)
    assert (await bench.overlays.keep("config")).state == "applied"
    bench.clock.advance(61)
    await bench.overlays.follow()
    assert bench.total == 5


async def test_another_replica_follows() -> None:
    bench = Bench()
    other = Overlays(bench.store, live := Live(declared()), bench.clock)
    await bench.overlays.apply("config", {"timeouts.total": 30}, author="ann", expected=None)
    await other.follow()
    assert live.settings.timeouts.total == 30


async def test_an_overlay_with_a_fault_changes_nothing() -> None:
    bench = Bench()
    with pytest.raises(OverlayRefused, match=r"forebay\.yaml"):
        await bench.overlays.apply("config", {"server.port": 1}, author="ann", expected=None)
    assert bench.store.found == []


async def test_what_was_in_force_stays_while_the_store_is_away() -> None:
    bench = Bench()
    await bench.overlays.apply("config", {"timeouts.total": 30}, author="ann", expected=None)
    bench.store.is_away = True
    with pytest.raises(OSError, match="away"):
        await bench.overlays.follow()
    assert bench.total == 30
