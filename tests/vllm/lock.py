"""Write requirements.txt anew from requirements.in: `python tests/vllm/lock.py`, in Forebay's development environment.

uv resolves and lists the hash of every file of every package, for all platforms: 350 kB. Only the files that pip
takes on Python 3.11 for x86-64 Linux are kept, since torch's CPU wheel ties the environment to that.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
HEAD = """\
# Made by lock.py from requirements.in; do not edit. For Python 3.11 on x86-64 Linux, installed with --no-deps.
"""


def resolve() -> dict[str, tuple[str, set[str]]]:
    """Return each package's pinned requirement and the hashes of all its files."""
    command = ["uv", "pip", "compile", "--quiet", "--python-version", "3.11", "--no-annotate", "--no-header"]
    command += ["--python-platform", "x86_64-manylinux_2_28", "--generate-hashes"]
    command += ["--override", str(HERE / "overrides.txt"), str(HERE / "requirements.in")]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    packages: dict[str, tuple[str, set[str]]] = {}
    for block in text.replace("\\\n", " ").splitlines():
        words = block.split()
        name, _, _ = words[0].partition("==")
        packages[name] = (words[0], {word.removeprefix("--hash=sha256:") for word in words[1:]})
    return packages


def chosen_hashes(pins: list[str]) -> dict[str, str]:
    """Ask pip which file it takes for each pin."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins))
        file.flush()
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        command += ["--only-binary", ":all:", "--report", "-", "--requirement", file.name]
        report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {
        re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower(): item["download_info"]["archive_info"]["hashes"][
            "sha256"
        ]
        for item in report["install"]
    }


def main() -> None:
    """Resolve, reduce, write."""
    packages = resolve()
    chosen = chosen_hashes([pin for pin, _ in packages.values()])
    lines = []
    for name, (pin, hashes) in sorted(packages.items()):
        if chosen[name] not in hashes:
            raise SystemExit(f"{pin}: pip takes a file that the index does not list")
        lines.append(f"{pin} --hash=sha256:{chosen[name]}\n")
    REQUIREMENTS.write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()
