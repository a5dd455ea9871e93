"""``forebay doctor``: what this machine has, what is in the way, and what to do about it."""

import contextlib
import json
import platform
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import click
import msgspec

from gateway.cli import ports
from gateway.cli.common import ADMIN_PORT, CANNOT_RUN, DATA_PORT, cache_dir, human_bytes, program, state_dir
from gateway.cli.machine import Gpu, advise, gpus, num_cores, ram_gib
from gateway.settings import environment

_MIN_PYTHON = (3, 11)
_MIN_FREE_DISK = 1e9
_MIN_RAM_GIB = 1.0
_MIN_OPEN_FILES = 4096
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class Finding(msgspec.Struct, frozen=True):
    """One line. A ``problem`` prevents running, a ``note`` does not; ``advice`` says what to do about either."""

    about: str
    state: Literal["ok", "note", "problem"]
    detail: str
    advice: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(*, as_json: bool) -> None:
    """Look for what keeps Forebay from running here; exit status 1 if there is something.

    \b
    Example:
      forebay doctor --json
    """
    findings = list(examine(environment()))
    if as_json:
        click.echo(json.dumps([msgspec.to_builtins(finding) for finding in findings], indent=2))
    else:
        click.echo(report(findings))
    if any(finding.state == "problem" for finding in findings):
        raise SystemExit(CANNOT_RUN)


def report(findings: Iterable[Finding]) -> str:
    """Return the findings as lines, advice below each."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8} {finding.about:12} {finding.detail}")
        if finding.advice:
            lines.append(f"{'':21} -> {finding.advice}")
    return "\n".join(lines)


def examine(env: Mapping[str, str]) -> Iterator[Finding]:
    """Look at everything, in the order of the report."""
    found = gpus()
    yield _python()
    yield _port("data port", DATA_PORT, "--port")
    yield _port("admin port", ADMIN_PORT, "--admin-port")
    yield _cpu()
    yield _ram(ram_gib())
    yield _gpu(found)
    yield _disk("cache", cache_dir(env), "FOREBAY_CACHE")
    yield _disk("state", state_dir(env), "FOREBAY_STATE")
    yield from _proxies(env)
    yield _open_files()
    yield _llamacpp()
    yield _vllm(found)
    advice = advise(memory_gib=ram_gib(), cores=num_cores(), found=found)
    yield Finding("good model", "ok", advice.reason, f"{program()} {advice.arguments}")


def _python() -> Finding:
    detail = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] < _MIN_PYTHON:
        return Finding("python", "problem", detail, "use Python 3.11 or newer")
    return Finding("python", "ok", detail)


def _port(about: str, port: int, option: str) -> Finding:
    problem = ports.problem_with("127.0.0.1", port)
    if problem is None:
        return Finding(about, "ok", f"{port} is free")
    return Finding(
        about, "problem", problem, f"stop that program (it may be Forebay itself), or use `forebay run {option} N`"
    )


def _cpu() -> Finding:
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        if match := re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE):
            flags = set(match[1].split())
    wanted = [flag for flag in ("avx2", "avx512f") if flag in flags]
    detail = f"{num_cores()} cores, {platform.machine()}" + (f", {' and '.join(wanted)}" if wanted else "")
    if flags and platform.machine() == "x86_64" and "avx2" not in flags:
        return Finding(
            "cpu", "problem", detail + ", no avx2", "the llama.cpp engine needs AVX2: attach with --base-url"
        )
    return Finding("cpu", "ok", detail)


def _ram(total_gib: float) -> Finding:
    detail = f"{total_gib:.1f} GiB"
    if total_gib < _MIN_RAM_GIB:
        return Finding("ram", "problem", detail, "SmolLM2 and the gateway take about 0.6 GiB; give 1 GiB or more")
    return Finding("ram", "ok", detail)


def _gpu(found: list[Gpu]) -> Finding:
    if not found:
        return Finding("gpu", "note", "no NVIDIA GPU seen by nvidia-smi", "none is needed for small models")
    names = ", ".join(f"{gpu.name} ({gpu.memory_gib:.0f} GiB)" for gpu in found)
    return Finding("gpu", "ok", f"{names}, driver {found[0].driver}")


def _disk(about: str, folder: Path, variable: str) -> Finding:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    detail = f"{folder}: {human_bytes(free)} free"
    if not _is_writable(existing):
        return Finding(about, "problem", f"{detail}, not writable", f"set {variable} to a folder you can write")
    if free < _MIN_FREE_DISK:
        return Finding(about, "note", detail, f"models are large: make room, or set {variable} to another disk")
    return Finding(about, "ok", detail)


def _is_writable(folder: Path) -> bool:
    probe = folder / ".forebay-doctor"
    try:
        probe.touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:
        return False
    probe.unlink(missing_ok=True)
    return True


def _proxies(env: Mapping[str, str]) -> Iterator[Finding]:
    found = {name: value for name, value in env.items() if name.lower() in _PROXIES and value}
    if not found:
        yield Finding("proxy", "ok", "none in the environment")
    for name, value in sorted(found.items()):
        advice = ""
        if name.lower() == "no_proxy":
            shown = value
        else:
            shown = masked(value)
            advice = (
                "used for downloads and providers, never for workers here; clients of ours may need NO_PROXY=127.0.0.1"
            )
        yield Finding("proxy", "note", f"{name}={shown}", advice)


def masked(url: str) -> str:
    """Return a proxy's URL without its user and password."""
    return re.sub(r"(^|//)[^/]*@", r"\1***@", url)


def _open_files() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # the gateway raises the soft limit by itself
    if hard == resource.RLIM_INFINITY:
        return Finding("open files", "ok", "no limit")
    if hard < _MIN_OPEN_FILES:
        return Finding("open files", "note", f"limit {hard}", "each client takes one: raise the hard limit of nofile")
    return Finding("open files", "ok", f"limit {hard}")


def _llamacpp() -> Finding:
    try:
        return Finding("llama.cpp", "ok", f"xllamacpp {version('xllamacpp')}")
    except PackageNotFoundError:
        return Finding("llama.cpp", "problem", "xllamacpp is not installed", "install with `make run`, or pip again")


def _vllm(found: list[Gpu]) -> Finding:
    if program := find_vllm():
        return Finding("vllm", "ok", program)
    advice = "install it beside your GPU: `pip install vllm` in an environment of its own, then put it on PATH"
    return Finding("vllm", "note", "not on PATH", advice if found else "only needed for --engine vllm")


def find_vllm(which: Callable[[str], str | None] = shutil.which) -> str | None:
    """Return the ``vllm`` program that a worker would start, the one beside our Python first; None if there is none."""
    beside = Path(sys.executable).with_name("vllm")
    return str(beside) if beside.exists() else which("vllm")
