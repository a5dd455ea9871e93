"""How every benchmark begins and ends, and how it tells what it found: progress, one table, lines of targets, files."""

import datetime
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import psutil

from benchmarks.loopback.cache import ROOT, Missing
from benchmarks.loopback.processes import Failed

RESULTS = ROOT / "benchmarks" / "results"
QUIET = 0.7  # load average


class Began(NamedTuple):
    """When a benchmark began (UTC), and what the load average was."""

    at: str
    load: float


def say(text: str) -> None:
    """Progress, beside the table on stdout."""
    print(text, file=sys.stderr, flush=True)


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def commit() -> str:
    """The commit that was measured, and whether the tree differs from it."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or "none"


def beginning() -> Began:
    """Note when this begins, and say so if the machine is too busy to measure on."""
    began = Began(now(), os.getloadavg()[0])
    if began.load > QUIET:
        say(f"this machine is busy (load average {began.load:.2f}): figures will be noise")
    return began


def command_of(name: str) -> str:
    """The command line that this process was started with, as a person would write it."""
    return shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])


def write_results(
    name: str, title: str, began: Began, *, quick: bool, table: Sequence[str], lines: Sequence[str],
    raw: Mapping[str, Any], notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Print the table, the notes and the lines of the targets; write them beside each other with the raw figures."""
    command, loads = command_of(name), (began.load, os.getloadavg()[0])
    about = [
        *notes,
        f"Machine: {platform.platform()}, {psutil.cpu_count()} cores, Python {platform.python_version()}.",
        f"Load average (1 min): {loads[0]:.2f} at the start, {loads[1]:.2f} at the end. Started {began.at}.",
        f"Commit: {commit()}.",
    ]
    body = [*table, "", *(f"- {note}" for note in about), "", "```", *lines, "```"]
    text = "\n".join([f"# {title}", "", f"`{command}`", "", *body, ""])
    print(text)
    stem = RESULTS / f"{name}-{began.at[:10]}{'-quick' if quick else ''}"
    head = {"command": command, "started": began.at, "ended": now(), "load_average": loads, "targets": list(lines)}
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps({**head, **raw}, indent=1) + "\n")
    say(f"written: {stem}.md and .json")


def exit_status(name: str, bench: Callable[[], bool], *, if_cut: str = "cut off") -> int:
    """Measure, and return the exit status: 0 when every target was held, 1 when not, 2 when it cannot be measured, 130
    when it was cut off, by Ctrl-C or SIGTERM: what was started is taken down first."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return 0 if bench() else 1
    except (Missing, Failed) as error:
        say(f"{name}: {error}")
        return 2
    except KeyboardInterrupt:
        say(f"{name}: {if_cut}")
        return 130
