"""How the settings say which rule shares a model's workers, and what a tenant's weight is."""

import math
from typing import Any, get_args

import msgspec
import pytest

from core.chat import Endpoint
from core.ids import ModelName, new_request_id
from gateway.live import catalog_of
from gateway.requests import read_call
from gateway.revisions import CONFIG, effective, owner, validate, values
from gateway.services import fairness_by_model, fairness_of
from gateway.settings import FairnessSettings, Settings, SettingsError, declare, parse
from gateway.tenants import declared_tenants
from routing.catalog import Catalog, Model
from routing.fairness.policy import Fairness, Policy
from tests.fakes.tenancy import principal, tenant

WORKER: dict[str, Any] = {"engine": "openai", "url": "http://127.0.0.1:1/v1"}


def tree_of(*, small: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    models = {"small": {"workers": [WORKER], **(small or {})}, "big.q4": {"workers": [WORKER]}}
    return {"models": models, **sections}


def settings_of(**sections: Any) -> Settings:
    return parse(tree_of(**sections), {}, origin="test")


def test_without_a_word_the_settings_say_what_the_scheduler_does_by_itself() -> None:
    assert fairness_of(FairnessSettings()) == Fairness()


def test_a_model_has_its_own_rule_in_the_place_of_all_models_rule() -> None:
    settings = settings_of(fairness={"threshold": "2k", "interval": "20ms"}, small={"fairness": {"policy": "drr"}})

    assert fairness_by_model(settings) == {
        ModelName("small"): Fairness(policy="drr"),
        ModelName("big.q4"): Fairness(threshold=2000, interval=0.02),
    }


def test_targets_are_given_by_class_and_one_that_has_none_has_no_hurry() -> None:
    fairness = fairness_of(settings_of(fairness={"targets": {"interactive": "800ms", "batch": "1m"}}).fairness)

    assert fairness.targets == (0.8, math.inf, 60.0)
    assert fairness.problem() is None


@pytest.mark.parametrize("name", get_args(Policy))
def test_every_policy_can_be_chosen(name: str) -> None:
    assert fairness_of(settings_of(fairness={"policy": name}).fairness).policy == name


@pytest.mark.parametrize(
    ("section", "place"),
    [
        ({"policy": "vtcpc"}, "fairness.policy: Input should be"),
        ({"treshold": 5}, "unknown key `fairness.treshold`; did you mean `threshold`?"),
        ({"targets": {"interactiv": "1s"}}, "did you mean `interactive`?"),
        ({"threshold": 0}, "fairness.threshold"),
        ({"waste_share": 1.5}, "fairness.waste_share"),
        ({"interval": "2m"}, "fairness.interval"),
        ({"targets": {"batch": 0}}, "fairness.targets.batch"),
    ],
)
def test_a_fault_is_told_with_its_place(section: dict[str, Any], place: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings_of(fairness=section)
    assert place in str(caught.value)


NUMBERS = [name for name in Fairness.__struct_fields__ if type(getattr(Fairness(), name)) in {int, float}]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1.0, 0.0, 1e-4, 1.0, 2.0, 59.0, 61.0, 1e6 + 1, 1e9, 1e9 + 1])
def test_what_the_settings_take_the_scheduler_takes(name: str, value: float) -> None:
    number = int(value) if isinstance(getattr(Fairness(), name), int) else value
    wanted = msgspec.structs.replace(Fairness(), **{name: number})
    try:
        found = fairness_of(settings_of(fairness={name: number}).fairness)
    except SettingsError:
        # No decision at all between two instants would be legal, and is nothing that anybody wants to write down.
        assert wanted.problem() is not None or (name, value) == ("interval", 0.0)
    else:
        assert found == wanted
        assert found.problem() is None


@pytest.mark.parametrize("name", ["run_order", "focus", "affinity", "waves"])
def test_what_can_be_switched_off_is_off_for_the_scheduler(name: str) -> None:
    assert fairness_of(settings_of(fairness={name: False}).fairness) == msgspec.structs.replace(
        Fairness(), **{name: False}
    )


def test_a_tenant_s_weight_goes_with_each_of_its_calls() -> None:
    settings = settings_of(tenants={"acme": {"weight": 2.5}})
    (acme,) = declared_tenants(settings, catalog_of(settings, {"small": 0, "big.q4": 0}))
    assert acme.weight == 2.5

    catalog = Catalog((Model(name=ModelName("small")),))
    for more in ({}, {"user": "ann"}):
        body = msgspec.json.encode({"model": "small", "messages": [{"role": "user", "content": "x"}], **more})
        caller = principal(of=tenant(weight=2.5))
        call = read_call(Endpoint.CHAT, body, {}, request_id=new_request_id(), principal=caller, catalog=catalog)
        assert call.context.weight == 2.5


@pytest.mark.parametrize("weight", [0, -1, 1001])
def test_a_weight_is_a_share_that_means_something(weight: float) -> None:
    with pytest.raises(SettingsError, match=r"tenants\.acme\.weight"):
        settings_of(tenants={"acme": {"weight": weight}})


@pytest.mark.parametrize(
    ("path", "resource"),
    [
        (("fairness", "policy"), "fairness"),
        (("models", "big.q4", "fairness", "policy"), "fairness"),
        (("models", "big.q4", "price", "input"), CONFIG),
        (("tenants", "acme", "weight"), "fairness"),
        (("tenants", "acme", "limits", "rpm"), CONFIG),
        (("queue", "size"), "fairness"),
        (("log", "level"), CONFIG),
    ],
)
def test_every_place_belongs_to_one_resource(path: tuple[str, ...], resource: str) -> None:
    assert owner(path) == resource


def test_the_policy_of_fairness_is_all_that_says_who_is_served_next() -> None:
    declared = declare(tree_of(tenants={"acme": {"weight": 2}}), {}, origin="forebay.yaml")
    overlay = {"models.big.q4.fairness.policy": "fcfs", "fairness.credit": "3k", "tenants.acme.weight": 0.5}

    assert validate(declared, "fairness", overlay) == ()
    assert len(validate(declared, CONFIG, overlay)) == 3
    held = effective(declared, {"fairness": overlay})
    assert fairness_by_model(held.settings)[ModelName("big.q4")].policy == "fcfs"
    shown = {value.path: (value.value, value.source) for value in values(held, "fairness")}
    assert shown["tenants.acme.weight"] == (0.5, "overlay")
    assert shown["models.big.q4.fairness.policy"] == ("fcfs", "overlay")
    assert shown["models.small.fairness"] == (None, "default")
    assert shown["fairness.credit"] == (3000, "overlay")
    assert "log.level" not in shown


def test_an_overlay_with_a_typo_is_told_what_was_meant() -> None:
    declared = declare(tree_of(), {}, origin="forebay.yaml")
    (fault,) = validate(declared, "fairness", {"models.small.fairness.polcy": "fcfs"})
    assert "did you mean `policy`?" in fault.message
