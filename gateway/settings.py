"""The settings: one frozen tree, read once from a YAML file. No other module looks at the environment."""

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from gateway.units import Bytes, Seconds

_REFERENCE = re.compile(r"\$\{(file:)?([^}:]+)(?::-([^}]*))?\}")


class SettingsError(Exception):
    """The settings cannot be used; the message lists every fault with its place and what would be right."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerSettings(_Section):
    """The data port. ``max_stream_bytes`` bounds what one answer may hold undelivered, ``max_tenant_streams`` how many
    answers one tenant may have open."""

    host: str = "127.0.0.1"
    port: int = Field(default=8411, ge=0, le=65535)
    max_body: Bytes = 32 * 2**20
    body_timeout: Seconds = 30.0
    header_timeout: Seconds = 20.0
    keep_alive: Seconds = 75.0
    max_stream_bytes: Bytes = 4 * 2**20
    max_tenant_streams: int = Field(default=4096, ge=1)
    client_idle: Seconds = 60.0
    drain_timeout: Seconds = 60.0


class AdminSettings(_Section):
    """The admin port: health, workers, metrics. Loopback unless an address is given."""

    host: str = "127.0.0.1"
    port: int = Field(default=8412, ge=0, le=65535)


class KeySettings(_Section):
    """A key, by itself or as the SHA-256 of it (hex), the tenant it stands for, and the models it may use."""

    name: str
    tenant: str
    key: SecretStr | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    models: tuple[str, ...] = ("*",)

    @model_validator(mode="after")
    def _has_one_secret(self) -> "KeySettings":
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give either `key` or `sha256`")
        if self.key is not None and len(self.key.get_secret_value()) < 20:
            raise ValueError("`key` is shorter than 20 characters; `forebay keys new` makes a good one")
        return self


class TimeoutSettings(_Section):
    """The five named deadlines; a request may shorten them with ``forebay.timeouts``, never lengthen ``total``."""

    connect: Seconds = 2.0
    queue: Seconds = 30.0
    first_token: Seconds = 120.0
    idle: Seconds = 60.0
    total: Seconds = 600.0


class RetrySettings(_Section):
    """How often a request is tried before its first byte, and the longest ``Retry-After`` we wait for an engine."""

    attempts: int = Field(default=3, ge=1, le=10)
    max_retry_after: Seconds = 10.0


class QueueSettings(_Section):
    """How many requests may wait: for one model, and of one tenant for one model."""

    size: int = Field(default=2048, ge=1)
    per_tenant: int = Field(default=1024, ge=1)


class LaunchSettings(_Section):
    """How to start an engine of ours; see ``engines.spec.Launch``. ``source``: a path, ``pypi:…``, or a hub id."""

    source: str = ""
    context: int = Field(default=2048, ge=64)
    slots: int = Field(default=4, ge=1)
    threads: int | None = Field(default=None, ge=1)
    gpus: tuple[int, ...] = ()
    tp: int = Field(default=1, ge=1)
    memory: Bytes | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    program: str | None = None
    command: tuple[str, ...] = ()


class LifecycleSettings(_Section):
    """Times and counts of a worker's life; see ``engines.spec.Lifecycle``."""

    start_timeout: Seconds = 600.0
    drain_timeout: Seconds = 60.0
    stop_timeout: Seconds = 30.0
    probe_interval: Seconds = 2.0
    fall: int = Field(default=3, ge=1)
    rise: int = Field(default=2, ge=1)
    backoff_base: Seconds = 0.5
    backoff_max: Seconds = 60.0
    backoff_reset: Seconds = 60.0


class WorkerSettings(_Section):
    """One engine: ``launch`` (started and stopped by us) or ``url`` (attached, never killed), ``replicas`` times."""

    engine: Literal["llamacpp", "vllm", "openai"]
    launch: LaunchSettings | None = None
    url: str | None = Field(default=None, pattern=r"^https?://")
    key: SecretStr | None = None
    served_name: str | None = None
    max_inflight: int | None = Field(default=None, ge=1)
    replicas: int = Field(default=1, ge=1)
    lifecycle: LifecycleSettings = LifecycleSettings()

    @model_validator(mode="after")
    def _is_launched_or_attached(self) -> "WorkerSettings":
        if (self.launch is None) == (self.url is None):
            raise ValueError("give either `launch` (start it) or `url` (attach to it)")
        if self.launch is not None and self.engine == "openai" and not self.launch.command:
            raise ValueError("engine `openai` has no program of its own: give `url`, or `launch.command`")
        return self


class ModelSettings(_Section):
    """A model on offer, under its name and aliases."""

    aliases: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    timeouts: TimeoutSettings | None = None
    workers: tuple[WorkerSettings, ...] = Field(min_length=1)


class RequestLogSettings(_Section):
    """One JSON line per request in ``<state_dir>/requests.jsonl``: who, what, how long, never the content."""

    enabled: bool = True
    max_size: Bytes = 100 * 2**20


class LogSettings(_Section):
    """The server's own log on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"


class Settings(_Section):
    """Everything an operator can set."""

    version: Literal[1] = 1
    state_dir: Path = Path(".forebay")
    server: ServerSettings = ServerSettings()
    admin: AdminSettings = AdminSettings()
    keys: tuple[KeySettings, ...] = ()
    admin_key: SecretStr | None = None
    timeouts: TimeoutSettings = TimeoutSettings()
    retry: RetrySettings = RetrySettings()
    queue: QueueSettings = QueueSettings()
    request_log: RequestLogSettings = RequestLogSettings()
    log: LogSettings = LogSettings()
    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")], ModelSettings] = Field(
        min_length=1
    )

    @model_validator(mode="after")
    def _names_are_known_and_unique(self) -> "Settings":
        names = [name for model, spec in self.models.items() for name in (model, *spec.aliases)]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"model names and aliases have to be unique; {doubled[0]!r} is given more than once")
        for model, spec in self.models.items():
            for fallback in spec.fallbacks:
                if fallback not in self.models:
                    raise ValueError(
                        f"models.{model}.fallbacks: no model is called {fallback!r}{_hint(fallback, names)}"
                    )
        for key in self.keys:
            for name in key.models:
                if name != "*" and name not in names:
                    raise ValueError(f"keys.{key.name}.models: no model is called {name!r}{_hint(name, names)}")
        return self


def environment() -> Mapping[str, str]:
    """Return the process's environment; the one place that reads it."""
    return os.environ


def load(path: Path, env: Mapping[str, str]) -> Settings:
    """Read and check a settings file. ``${NAME}``, ``${NAME:-default}`` and ``${file:PATH}`` are filled in.

    Raises ``SettingsError``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}. `forebay init` writes a file to start from.") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise SettingsError(f"{path} has to hold a mapping with at least `models:`; `forebay init` writes an example.")
    return parse(tree, env, origin=str(path))


def parse(tree: Mapping[str, Any], env: Mapping[str, str], *, origin: str) -> Settings:
    """Check a settings tree; ``origin`` names it in messages. Raises ``SettingsError``."""
    filled = _fill(tree, env, origin)
    try:
        return Settings.model_validate(filled)
    except ValidationError as error:
        lines = [f"{origin}: {line}" for line in _faults(error)]
        raise SettingsError("\n".join(lines)) from error


def _fill(node: Any, env: Mapping[str, str], where: str) -> Any:
    if isinstance(node, Mapping):
        return {key: _fill(value, env, f"{where}: {key}") for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(value, env, where) for value in node]
    if isinstance(node, str):
        return _REFERENCE.sub(lambda match: _resolve(match, env, where), node)
    return node


def _resolve(match: re.Match[str], env: Mapping[str, str], where: str) -> str:
    is_file, name, default = match.groups()
    if is_file:
        try:
            return Path(name).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SettingsError(f"{where}: cannot read {name}: {error.strerror}") from error
    value = env.get(name, default)
    if value is None:
        raise SettingsError(f"{where}: the environment variable {name} is not set; write ${{{name}:-}} to allow that")
    return value


def _faults(error: ValidationError) -> Iterator[str]:
    for fault in error.errors(include_url=False, include_input=False):
        place = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            yield f"unknown key `{place}`{_hint(str(fault['loc'][-1]), _known_keys(fault['loc'][:-1]))}"
        else:
            message = fault["msg"].removeprefix("Value error, ")
            yield f"{place}: {message}" if place else message


def _known_keys(path: tuple[int | str, ...]) -> list[str]:
    """Return the keys that are allowed at a place of the tree."""
    section: Any = Settings
    for part in path:
        if isinstance(section, type) and issubclass(section, BaseModel) and part in section.model_fields:
            section = section.model_fields[str(part)].annotation
        section = _inner_section(section)
    if isinstance(section, type) and issubclass(section, BaseModel):
        return list(section.model_fields)
    return []


def _inner_section(annotation: Any) -> Any:
    """Return the section that an annotation such as ``dict[str, ModelSettings]`` holds, or the annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        inner = _inner_section(argument)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            return inner
    return annotation


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean `{near[0]}`?"
    return f"; known here: {', '.join(sorted(known))}" if known else ""
