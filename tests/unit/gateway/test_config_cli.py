"""``forebay config``: what is in force and who said it, what two files differ in, what a file may say."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gateway.cli import main

FILE = "models: {m: {workers: [{engine: openai, url: 'http://h'}]}}\nadmin_key: fba_the-admin-key-of-a-test\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "a.yaml").write_text(FILE)
    return tmp_path / "a.yaml"


def forebay(*args: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], env=env)


def test_show_tells_each_value_with_its_source_and_no_secret(path: Path) -> None:
    shown = forebay("config", "show", "-c", path, "--effective", "--json", env={"FOREBAY_TIMEOUTS__IDLE": "3s"})
    found = {value["path"]: (value["value"], value["source"]) for value in json.loads(shown.output)}
    assert found["timeouts.idle"] == (3.0, "environment")
    assert found["timeouts.total"] == (600.0, "default")
    assert found["admin_key"] == ("***", "file")
    assert "key-of-a-test" not in shown.output


def test_show_leaves_defaults_out_unless_asked(path: Path) -> None:
    assert "timeouts" not in forebay("config", "show", "-c", path).output


def test_diff_names_what_would_change_and_exits_with_1(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "b.yaml"
    other.write_text(FILE + "queue: {size: 5}\n")
    result = forebay("config", "diff", other, "-c", path, "--json")
    assert result.exit_code == 1
    assert json.loads(result.output) == [{"path": "queue.size", "before": 2048, "after": 5, "source": "file"}]
    assert forebay("config", "diff", path, "-c", path).exit_code == 0


def test_the_schema_knows_quantities_and_what_may_be_overlaid() -> None:
    schema = json.loads(forebay("config", "schema").output)
    timeout = schema["$defs"]["TimeoutSettings"]["properties"]["total"]
    assert {"type": "string"} in timeout["anyOf"]
    assert schema["properties"]["queue"]["overridable"] is True


def test_check_tells_faults_as_json(path: Path) -> None:
    path.write_text(FILE + "queue: {siz: 5}\n")
    result = forebay("check", "-c", path, "--json")
    assert result.exit_code == 2
    assert "did you mean `size`?" in result.stdout
