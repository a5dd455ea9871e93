"""Settings: what a file may say, and what is told of what it may not."""

from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings, SettingsError, load, parse

WORKER: dict[str, Any] = {"engine": "openai", "url": "http://127.0.0.1:1/v1"}


def settings_of(env: dict[str, str] | None = None, **sections: Any) -> Settings:
    tree = {"models": {"small": {"workers": [WORKER]}}, **sections}
    return parse(tree, env or {}, origin="test")


def fault_of(env: dict[str, str] | None = None, **sections: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        settings_of(env, **sections)
    return str(caught.value)


def launch(**keys: Any) -> dict[str, Any]:
    return {"small": {"workers": [{"engine": "llamacpp", "launch": {"source": "smollm2", **keys}}]}}


def test_one_model_is_enough_and_listens_on_loopback() -> None:
    settings = settings_of()
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8411)
    assert (settings.admin.host, settings.admin.port) == ("127.0.0.1", 8412)


def test_no_model_is_a_fault() -> None:
    assert "models" in fault_of(models={})


def test_a_typo_names_its_place_and_the_key_that_was_meant() -> None:
    message = fault_of(server={"prot": 1})
    assert "unknown key `server.prot`" in message
    assert "did you mean `port`?" in message


def test_a_typo_in_a_worker_names_the_key_that_was_meant() -> None:
    assert "did you mean `threads`?" in fault_of(models=launch(thread=1))


def test_every_fault_is_told_at_once() -> None:
    message = fault_of(server={"prot": 1}, queue={"size": 0})
    assert "server.prot" in message
    assert "queue.size" in message
    assert all(line.startswith("test: ") for line in message.splitlines())


@pytest.mark.parametrize(
    ("written", "meant"), [("500ms", 0.5), ("30s", 30), ("2m", 120), ("1.5h", 5400), (7, 7), ("7", None), ("1w", None)]
)
def test_durations_have_units(written: object, meant: float | None) -> None:
    if meant is None:
        assert "timeouts.total" in fault_of(timeouts={"total": written})
    else:
        assert settings_of(timeouts={"total": written}).timeouts.total == pytest.approx(meant)


@pytest.mark.parametrize(
    ("written", "meant"), [("32MiB", 32 * 2**20), ("10MB", 10_000_000), (4096, 4096), ("1.5kB", 1500), ("1 XB", None)]
)
def test_sizes_have_units(written: object, meant: int | None) -> None:
    if meant is None:
        assert "server.max_body" in fault_of(server={"max_body": written})
    else:
        assert settings_of(server={"max_body": written}).server.max_body == meant


@pytest.mark.parametrize("value", [0, -1, "0s"])
def test_a_deadline_is_positive(value: object) -> None:
    assert "timeouts.queue" in fault_of(timeouts={"queue": value})


def test_a_name_of_the_environment_is_filled_in() -> None:
    settings = settings_of({"MY_HOST": "127.0.0.3"}, server={"host": "${MY_HOST}"})
    assert settings.server.host == "127.0.0.3"


def test_a_default_stands_in_for_a_name_that_is_not_set() -> None:
    assert settings_of(server={"host": "${NOPE:-127.0.0.2}"}).server.host == "127.0.0.2"


def test_a_name_that_is_not_set_is_a_fault_that_tells_its_place() -> None:
    message = fault_of(server={"host": "${NOPE}"})
    assert "server: host" in message
    assert "NOPE is not set" in message


def test_a_file_is_filled_in_without_its_last_newline(tmp_path: Path) -> None:
    secret = tmp_path / "admin.key"
    secret.write_text("fba_the-admin-key-of-a-test\n")
    key = settings_of(admin_key=f"${{file:{secret}}}").admin_key
    assert key is not None
    assert key.get_secret_value() == "fba_the-admin-key-of-a-test"


def test_a_file_that_is_missing_is_a_fault_that_names_it(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in fault_of(admin_key=f"${{file:{tmp_path / 'none'}}}")


def test_secrets_do_not_show_in_a_printed_settings_tree() -> None:
    settings = settings_of(
        admin_key="fba_the-admin-key-of-a-test",
        keys=[{"name": "a", "tenant": "a", "key": "fbk_the-data-key-of-a-test"}],
    )
    assert "key-of-a-test" not in repr(settings)


def test_a_key_needs_one_secret_long_enough_to_be_one() -> None:
    short = {"name": "a", "tenant": "a", "key": "short"}
    assert "forebay keys new" in fault_of(keys=[short])
    assert "either `key` or `sha256`" in fault_of(keys=[{"name": "a", "tenant": "a"}])


def test_a_key_may_name_only_models_that_exist() -> None:
    key = {"name": "a", "tenant": "a", "sha256": "0" * 64, "models": ["smal"]}
    assert "did you mean `small`?" in fault_of(keys=[key])


def test_a_name_of_a_model_is_given_once() -> None:
    models = {"small": {"workers": [WORKER]}, "other": {"aliases": ["small"], "workers": [WORKER]}}
    assert "'small' is given more than once" in fault_of(models=models)


def test_a_fallback_has_to_exist() -> None:
    assert "no model is called 'larg'" in fault_of(models={"small": {"fallbacks": ["larg"], "workers": [WORKER]}})


def test_a_worker_is_launched_or_attached_never_both_or_neither() -> None:
    for worker in ({"engine": "llamacpp"}, {"engine": "llamacpp", "launch": {"source": "x"}, "url": "http://h"}):
        assert "either `launch`" in fault_of(models={"small": {"workers": [worker]}})


def test_a_file_that_is_not_yaml_is_told_by_name(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("models: [")
    with pytest.raises(SettingsError, match=r"bad\.yaml is not valid YAML"):
        load(path, {})


def test_a_file_that_is_missing_leads_to_init(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="forebay init"):
        load(tmp_path / "none.yaml", {})


def test_a_file_with_a_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(SettingsError, match="mapping"):
        load(path, {})


def test_settings_cannot_be_changed_once_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        settings_of().version = 2  # type: ignore[assignment]


def file_of(tmp_path: Path, text: str = "") -> Path:
    path = tmp_path / "forebay.yaml"
    path.write_text(f"{text}\nmodels: {{small: {{workers: [{{engine: openai, url: 'http://h'}}]}}}}\n")
    return path


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    path = file_of(tmp_path, "server: {port: 1, host: 127.0.0.3}\ntimeouts: {total: 5}")
    env = {
        "FOREBAY_SERVER__PORT": "9000",
        "FOREBAY_TIMEOUTS__TOTAL": "2m",
        "FOREBAY_MODELS__SMALL__ALIASES": '["s"]',
        "FOREBAY_STATE_DIR": "/state",
    }
    settings = load(path, env)
    assert (settings.server.port, settings.server.host, settings.timeouts.total) == (9000, "127.0.0.3", 120)
    assert settings.models["small"].aliases == ("s",)
    assert settings.state_dir == Path("/state")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("FOREBAY_SERVR__PORT", "1", "did you mean `server`?"),
        ("FOREBAY_SERVER__PROT", "1", "did you mean `port`?"),
        ("FOREBAY_SERVER__PORT", "x", "server.port"),
        ("FOREBAY_KEYS", "x", "given as JSON"),
    ],
)
def test_a_fault_of_the_environment_is_told_as_one(tmp_path: Path, name: str, value: str, told: str) -> None:
    with pytest.raises(SettingsError, match=r"^environment: ") as caught:
        load(file_of(tmp_path), {name: value})
    assert told in str(caught.value)


def test_variables_for_the_command_line_are_no_settings(tmp_path: Path) -> None:
    env = {"FOREBAY_STATE": "x", "FOREBAY_VERSION": "0.1.0", "FOREBAY_PORT": "tcp://10.0.0.1:8411"}
    assert load(file_of(tmp_path), env) == load(file_of(tmp_path), {})


def test_a_masked_value_is_never_taken_back() -> None:
    assert "admin_key: *** stands for a secret" in fault_of(admin_key="***")


DATA_KEY = {"name": "app", "tenant": "a", "key": "fbk_the-data-key-of-a-test"}
OPEN_HOSTS = ["0.0.0.0", "::", "[::]", "10.0.0.7", "gateway.internal"]


@pytest.mark.parametrize("host", OPEN_HOSTS)
def test_a_port_that_others_reach_needs_a_key(host: str) -> None:
    assert "server.host" in fault_of(server={"host": host})
    assert "admin.host" in fault_of(admin={"host": host})
    assert "admin.host" in fault_of(admin={"host": host}, keys=[DATA_KEY])
    assert "fewer than" in fault_of(server={"host": host}, keys=[{**DATA_KEY, "key": "a" * 40}])
    assert "shorter than" in fault_of(admin={"host": host}, admin_key="secret")


@pytest.mark.parametrize("host", OPEN_HOSTS)
def test_a_port_whose_key_is_set_may_be_reached_by_others(host: str) -> None:
    assert settings_of(server={"host": host}, keys=[DATA_KEY]).server.host == host
    operator = {**DATA_KEY, "role": "viewer"}
    for keys in ({"admin_key": "fba_the-admin-key-of-a-test"}, {"keys": [operator]}):
        settings = settings_of(server={"host": host}, admin={"host": host}, **keys)
        assert (settings.server.host, settings.admin.host) == (host, host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert settings_of(server={"host": host}, admin={"host": host}).admin.host == host


def test_the_name_of_the_built_in_key_is_taken() -> None:
    message = fault_of(keys=[{**DATA_KEY, "name": "admin"}])
    assert "'admin' is what the key of `admin_key` is called" in message


def test_two_keys_of_one_name_are_a_fault() -> None:
    other = {**DATA_KEY, "key": "fbk_another-data-key-of-a-test"}
    assert "'app' is the name of more than one" in fault_of(keys=[DATA_KEY, other])
