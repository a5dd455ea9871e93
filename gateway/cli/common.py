"""What several verbs share: the folders, the kept keys, and errors that tell what to do."""

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import click

from gateway.auth import EmptyKeyFile, keep_key

DATA_PORT = 8411
ADMIN_PORT = 8412
LOCAL_KEY = "local.key"
ADMIN_KEY = "admin.key"

BAD_SETTINGS = 2
CANNOT_RUN = 1


class Fault(click.ClickException):
    """Something the user has to put right before this can work; the message says what. Exit status 1."""

    exit_code = CANNOT_RUN


class SettingsFault(Fault):
    """The settings, or the options that stand for them, are wrong. Exit status 2."""

    exit_code = BAD_SETTINGS


def state_dir(env: Mapping[str, str]) -> Path:
    """Return the folder for keys and logs: ``$FOREBAY_STATE``, else ``.forebay`` here. It need not exist."""
    return Path(env.get("FOREBAY_STATE") or ".forebay")


def cache_dir(env: Mapping[str, str]) -> Path:
    """Return the folder for what can be fetched again. It need not exist."""
    if own := env.get("FOREBAY_CACHE"):
        return Path(own)
    base = env.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "forebay"


def models_dir(env: Mapping[str, str]) -> Path:
    """Return the folder that models are fetched into. It need not exist."""
    return cache_dir(env) / "models"


def kept_key(folder: Path, name: str, make: Callable[[], str]) -> str:
    """Return the key kept in ``folder/name``; see ``gateway.auth.keep_key``. Raises ``Fault``."""
    path = folder / name
    try:
        return keep_key(path, make)
    except OSError as error:
        raise Fault(
            f"cannot keep a key in {path}: {error.strerror}. Set FOREBAY_STATE to a folder you can write."
        ) from error
    except EmptyKeyFile as error:
        raise Fault(str(error)) from error


def program() -> str:
    """Return how to call this command from the present folder: ``forebay``, or a path where that is not on PATH."""
    called = Path(sys.argv[0])
    if called.name != "forebay":
        return "forebay"
    found = shutil.which("forebay")
    if found is not None and Path(found).resolve() == called.resolve():
        return "forebay"
    return os.path.relpath(called) if called.is_absolute() and called.is_relative_to(Path.cwd()) else str(called)


def human_bytes(count: float) -> str:
    """Return a size as people read it: ``91 MB``, ``4.7 GB``."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    if count >= 1e6:
        return f"{count / 1e6:.0f} MB"
    return f"{count / 1e3:.0f} kB"


def table(rows: list[list[str]]) -> str:
    """Return rows, the first being the heading, as aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
