"""Environments of rival gateways: one each, versions pinned, made once and kept in the cache."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.loopback.cache import Missing, folder

INSTALL_LIMIT_S = 900


def environment(name: str, requirements: Sequence[str]) -> Path:
    """The `bin` folder of an environment that holds exactly `requirements`, installed on first use.

    Raises `Missing` with the end of pip's own words when the installation fails. The stamp is written last, so
    an environment whose installation was cut short is installed again.
    """
    home = folder("venvs") / "-".join([name, *(item.rpartition("==")[2] for item in requirements)])
    stamp = home / "installed.json"
    wanted = json.dumps([sys.version_info[:2], *requirements])
    if stamp.exists() and stamp.read_text() == wanted:
        return home / "bin"
    print(f"installing {', '.join(requirements)} into {home} (once)", file=sys.stderr, flush=True)
    _call([sys.executable, "-m", "venv", "--clear", str(home)])
    _call([str(home / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", *requirements])
    stamp.write_text(wanted)
    return home / "bin"


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"cannot install: {error}") from error
    if done.returncode:
        words = " ".join(done.stderr.split())[-400:]
        raise Missing(f"cannot install: {command[0]} ended {done.returncode}: {words}")


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """What `python`'s environment holds of `packages`, by name; a package that it lacks is left out."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: have[n] for n in sys.argv[1:] if n in have}))"
    )
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=False)
    found: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found
