"""`forebay simulate`: files in, tables, pages and errors out."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gateway.cli import main
from gateway.cli.charts import Chart, Line, page, svg
from gateway.cli.simulate import fleet_of, read_fleet

FLEET = """\
workers:
  - {count: 2, slots: 4, step: {base: 0.02, per_sequence: 0.001, per_prefill_token: 0.0001}}
  - {slots: 8, keeps_prefixes: false}
outages: [{worker: 0, at: 5, lasts: 10}]
fairness: {threshold: 500}
weights: {tenant-01: 2.0}
"""


def forebay(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["simulate", *arguments])


def trace_file(folder: Path, num: int = 40) -> Path:
    path = folder / "trace.jsonl"
    rows = [
        {"t_s": index * 0.3, "tenant": f"t{index % 3}", "prompt_tokens": 40, "output_tokens": 30}
        for index in range(num)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_it_compares_policies_in_tables_and_says_what_was_replayed(tmp_path: Path) -> None:
    done = forebay("--trace", str(trace_file(tmp_path)), "--slots", "2", "--policy", "fcfs", "--policy", "vtc-pc")
    assert done.exit_code == 0, done.output
    assert "POLICY" in done.output
    assert "SERVICE GAP" in done.output
    assert "40 requests in 12 s, 1 workers with 2 slots" in done.output


def test_json_has_every_figure_of_every_policy(tmp_path: Path) -> None:
    done = forebay("--trace", str(trace_file(tmp_path)), "--policy", "vtc", "--json")
    found = json.loads(done.output)["policies"]["vtc"]
    assert found["requests"] == 40
    assert found["classes"][0]["ttft"]["num"] == 40


def test_a_trace_is_made_up_where_none_is_given() -> None:
    done = forebay("--requests", "60", "--policy", "vtc-pc", "--stride", "8")
    assert done.exit_code == 0, done.output
    assert "BurstGPT-like, made up: 60 requests" in done.output


def test_a_fleet_file_describes_workers_outages_weights_and_figures(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET)
    fleet = fleet_of(read_fleet(path))
    assert [engine.slots for engine in fleet.engines] == [4, 4, 8]
    assert [engine.keeps_prefixes for engine in fleet.engines] == [True, True, False]
    done = forebay("--requests", "80", "--fleet", str(path), "--policy", "vtc-pc")
    assert done.exit_code == 0, done.output
    assert "3 workers with 16 slots in all, 1 outages" in done.output


def test_the_page_has_charts_and_tables_and_loads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "result.html"
    assert forebay("--trace", str(trace_file(tmp_path)), "--policy", "vtc", "--html", str(path)).exit_code == 0
    text = path.read_text()
    assert text.count("<svg") >= 2
    assert "Time to first token" in text
    assert "src=" not in text
    assert "href=" not in text


@pytest.mark.parametrize(
    ("text", "complaint", "status"),
    [
        ("workers: []", "1 to 1000 workers", 2),
        ("workers: [{count: 1001}]", "1 to 1000 workers", 2),
        ("workers: [{slots: 0}]", "must be above 0", 2),
        ("workers: [{slosts: 4}]", "slosts", 2),
        ("workers: [{}]\noutages: [{worker: 1, at: 1, lasts: 1}]", "worker from 0 to 0", 2),
        ("workers: [{}]\nfairness: {treshold: 1}", "treshold", 2),
        ("workers: [{}]\nfairness: {quantum: 0}", "quantum", 2),
        ("workers: [", "fleet.yaml", 2),
    ],
)
def test_a_wrong_fleet_is_refused_with_what_is_wrong(tmp_path: Path, text: str, complaint: str, status: int) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    done = forebay("--requests", "5", "--fleet", str(path))
    assert done.exit_code == status
    assert complaint in done.output


def test_a_trace_that_is_not_there_or_of_no_format_is_refused_with_advice(tmp_path: Path) -> None:
    missing = forebay("--trace", str(tmp_path / "none.csv"))
    assert missing.exit_code == 1
    assert "--trace takes a file, or burstgpt-like" in missing.output
    strange = tmp_path / "strange.csv"
    strange.write_text("a,b\n1,2\n")
    assert "no format known here (azure, burstgpt, mooncake, tenants)" in forebay("--trace", str(strange)).output


def test_png_without_matplotlib_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    done = forebay("--requests", "5", "--policy", "vtc", "--png", str(tmp_path / "x.png"))
    assert done.exit_code == 1
    assert "PNG needs matplotlib" in done.output


def test_a_chart_shows_each_line_by_name_and_leaves_out_what_a_logarithm_cannot_show() -> None:
    chart = Chart("Waits <all>", "s", "share", [Line("one", [(0.0, 0.0), (1.0, 0.5), (10.0, 1.0)]), Line("none", [])],
                  is_log=True)  # fmt: skip
    drawn = svg(chart)
    assert "Waits &lt;all&gt;" in drawn
    assert drawn.count("<polyline") == 2
    assert drawn.count(",") >= 2
    assert "nan" not in drawn
    assert "<td>&lt;x&gt;</td>" in page("t", [chart], [["a"], ["<x>"]], ["note"])
