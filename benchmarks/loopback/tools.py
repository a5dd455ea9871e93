"""The two compiled programs of the rig: built from the C beside this file when first wanted."""

import hashlib
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

from benchmarks.loopback.cache import Missing, folder

FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra")


@lru_cache
def tool(name: str) -> Path:
    """The program `name`, built once per state of its source; raises `Missing` where there is no C compiler."""
    source = Path(__file__).with_name(f"{name}.c")
    digest = hashlib.sha256(source.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:12]
    program = folder("bin") / f"{name}-{digest}"
    if program.exists():
        return program
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        raise Missing(
            f"this benchmark's {name} program is C and no compiler (gcc, cc or clang) is on the PATH; "
            "on Debian: apt-get install gcc libc6-dev"
        )
    fresh = program.with_suffix(".new")
    done = subprocess.run([compiler, *FLAGS, "-o", fresh, source], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"{compiler} cannot build {source.name} (libc6-dev missing?): {done.stderr[:600]}")
    fresh.rename(program)
    return program
