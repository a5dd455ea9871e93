"""What a run of these benchmarks leaves: one page, and the raw figures beside it."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from benchmarks.dataflow.arms import ARMS
from benchmarks.dataflow.cells import Run
from benchmarks.dataflow.verdicts import table
from benchmarks.reporting import Began, command_of, commit, now, say


def write(
    script: str, title: str, began: Began, run: Run, *, stem: Path, machine: str, lines: Sequence[str],
    notes: Sequence[str], more: Mapping[str, Any],
) -> None:  # fmt: skip
    """Print the page, and write it and the figures to ``stem`` with ``.md`` and ``.json`` at its end."""
    command, loads = command_of(script), (began.load, os.getloadavg()[0])
    used = dict.fromkeys(arm for _, _, arm in run.cells)
    about = [
        *notes,
        "Intervals: 95 % bootstraps over rounds, of three or fewer their range. `over ours`: inside each round. `same "
        "text`: outputs equal to those of the good client (with affinity, for agents) in the same round.",
        f"Machine: {machine}.",
        f"Load average (1 min): {loads[0]:.2f} at the start, {loads[1]:.2f} at the end. Started {began.at}. "
        f"Commit: {commit()}.",
        *(f"{name}: {ARMS[name].note}." for name in used),
        *(f"FAILED {problem}" for problem in run.problems),
    ]
    body = [*table(run), "", *(f"- {note}" for note in about), "", "```", *lines, "```", ""]
    text = "\n".join([f"# {title}", "", f"`{command}`", "", *body])
    print(text)
    cells = [
        {"part": part, "rtt_ms": rtt, "arm": arm, "rounds": [msgspec.to_builtins(seen) for seen in cells]}
        for (part, rtt, arm), cells in run.cells.items()
    ]
    seeds = {part.name: part.make("").seed for part in run.parts}
    head = {"command": command, "started": began.at, "ended": now(), "machine": machine, "load_average": loads}
    found = {"targets": list(lines), "problems": run.problems, "seeds": seeds, **more, "cells": cells}
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(stem.name + ".md").write_text(text)
    stem.with_name(stem.name + ".json").write_text(json.dumps({**head, **found}, indent=1) + "\n")
    say(f"written: {stem}.md and .json")


def this_machine() -> str:
    """Return what this runs on."""
    return f"{platform.platform()}, {psutil.cpu_count()} cores, Python {platform.python_version()}"
