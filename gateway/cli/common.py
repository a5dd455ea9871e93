"""What several verbs share: the folders, the kept keys, and errors that tell what to do."""

import os
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import click

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


def new_admin_key() -> str:
    """Return a fresh key for the admin port: 256 random bits."""
    return "fba_" + secrets.token_urlsafe(32)


def kept_key(folder: Path, name: str, make: Callable[[], str]) -> str:
    """Return the key in ``folder/name``; the first caller makes it, readable by its owner alone. Raises ``Fault``.

    Two processes that start at once get the same key, and nobody ever sees half of one.
    """
    path = folder / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _write_once(path, make())
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
        key = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise Fault(
            f"cannot keep a key in {path}: {error.strerror}. Set FOREBAY_STATE to a folder you can write."
        ) from error
    if not key:
        raise Fault(f"{path} is empty; delete it and start again.")
    return key


def _write_once(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # another process was first: its key stands
            os.link(draft, path)
    finally:
        draft.unlink()


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
