"""What Grafana and Prometheus are told to look at: things that are there."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.gateway.test_metrics import busy_families

_ROOT = Path(__file__).resolve().parents[3]
_DEPLOY = _ROOT / "deploy"
_NAME = re.compile(r"\b(?:forebay|process)_[a-z0-9_]+|\bup\b")
_LABEL = re.compile(r"([a-z_]+)\s*(?:=~|!~|!=|=)\s*\"")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
_PROMETHEUS_OWN = {"instance", "job", "le"}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((_DEPLOY / "grafana/dashboards/forebay.json").read_text("utf-8"))
    return found


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((_DEPLOY / "prometheus/alerts.yml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for rule in rules():
        yield rule["alert"], rule["expr"]


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """Return the labels of each series that /metrics has."""
    found: dict[str, set[str]] = {"up": set()}
    for family in busy_families():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize(("title", "expression"), list(expressions()))
def test_an_expression_asks_for_metrics_and_labels_that_there_are(
    title: str, expression: str, exposed: dict[str, set[str]]
) -> None:
    bare = re.sub(r'"[^"]*"', '""', expression)
    names = set(_NAME.findall(bare))
    assert names, title
    assert names <= exposed.keys()
    labels = set(_LABEL.findall(expression))
    labels |= {label.strip() for group in _GROUPING.findall(bare) for label in group.split(",")}
    known = set.union(*(exposed[name] for name in names))
    assert labels <= known | _PROMETHEUS_OWN
    assert bare.count("(") == bare.count(")")


def test_counters_are_only_looked_at_as_rates() -> None:
    for title, expression in expressions():
        for match in re.finditer(r"[a-z_]+_(?:total|bucket)\b", expression):
            before = expression[: match.start()]
            assert re.search(r"(rate|increase)\($", before), f"{title}: {match.group()}"


def test_each_metric_of_ours_is_in_the_reference_and_nothing_else_is() -> None:
    text = (_ROOT / "docs/reference/metrics.md").read_text("utf-8")
    named = set(re.findall(r"^\| `(forebay_[a-z0-9_]+)`", text, flags=re.MULTILINE))
    ours = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in busy_families()
        if family.name.startswith("forebay_")
    }
    assert named == ours


def test_each_alert_says_what_is_wrong_and_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))
    for rule in rules():
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"].keys() == {"summary", "action"}


def test_the_dashboard_takes_any_data_source_and_its_panels_do_not_overlap() -> None:
    board = dashboard()
    assert board["templating"]["list"][0]["type"] == "datasource"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells


def test_prometheus_reads_the_alerts_and_asks_with_a_key() -> None:
    settings = yaml.safe_load((_DEPLOY / "prometheus/prometheus.yml").read_text("utf-8"))
    assert settings["rule_files"] == ["alerts.yml"]
    (job,) = settings["scrape_configs"]
    assert job["job_name"] == "forebay"
    assert "credentials_file" in job["authorization"]


def test_grafana_finds_the_folder_that_the_dashboard_lies_in() -> None:
    provisioning = _DEPLOY / "grafana/provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards/forebay.yml").read_text("utf-8"))["providers"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text("utf-8"))["datasources"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    assert source["type"] == "prometheus"
