"""What compose.yaml and the Dockerfiles say, read without Docker."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = (DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.gpu")
SETTINGS = ("forebay.yaml", "forebay.postgres.yaml", "forebay.gpu.yaml")


def compose() -> dict[str, Any]:
    """Return compose.yaml with every variable at its default."""
    text = (ROOT / "compose.yaml").read_text("utf-8")
    tree: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    return tree


def services() -> dict[str, dict[str, Any]]:
    """Return the services of all profiles."""
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions in order: the word, and the rest as one line."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def final_stage(path: Path) -> dict[str, str]:
    """Return the last stage's instructions; of an instruction that is given twice, the last."""
    found = instructions(path)
    start = max(index for index, (word, _) in enumerate(found) if word == "FROM")
    return dict(found[start:])


def environment(path: Path) -> dict[str, str]:
    """Return what the last stage's ENV sets."""
    return dict(re.findall(r"(\w+)=(\S+)", final_stage(path)["ENV"]))


def command(path: Path) -> list[str]:
    """Return what a container of the image runs. Both parts have to be in exec form."""
    stage = final_stage(path)
    return [*json.loads(stage["ENTRYPOINT"]), *json.loads(stage["CMD"])]


def health_command(path: Path) -> list[str]:
    """Return the image's health check, which has to be in exec form."""
    words: list[str] = json.loads(final_stage(path)["HEALTHCHECK"].partition("CMD ")[2])
    return words
