"""Print what an image of Forebay is made of: a CycloneDX bill of materials, from the lock alone.

    python deploy/sbom.py requirements.txt >sbom.cdx.json

Every distribution of the lock with its version, its package URL, the hashes of all its files that pip would accept,
the condition under which it is installed, and who asked for it. The same lock gives the same bytes: no time, no
random number. What the base image brings is not in it; a scanner of images lists that.
"""

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
_BLOCK = re.compile(
    r"^(?P<requirement>[A-Za-z0-9].*?) \\\n(?P<hashes>(?: +--hash=\S+(?: \\)?\n)+)(?P<via>(?: +#.*\n?)*)", re.M
)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def bill_of_materials(lock: str, project: dict[str, Any]) -> dict[str, Any]:
    """Return the document for a lock that ``make lock`` wrote and a ``[project]`` table. Raises ``ValueError`` for a
    requirement that is not pinned to one version and by hashes."""
    root = f"{project['name']}@{project['version']}"
    components, askers = [], {}
    for block in _BLOCK.finditer(lock):
        requirement = Requirement(block["requirement"])
        name, version = canonicalize_name(requirement.name), _version(requirement)
        components.append(_component(name, version, block["hashes"], requirement))
        askers[f"{name}@{version}"] = {canonicalize_name(line) for line in _names(block["via"])}
    if not components or len(components) != len(re.findall(r"^[A-Za-z0-9]", lock, re.M)):
        raise ValueError("the lock has requirements without hashes: write it anew with `make lock`")
    of_name = {ref.rpartition("@")[0]: ref for ref in askers}
    depends: dict[str, list[str]] = {root: [], **{ref: [] for ref in askers}}
    for ref, names in askers.items():
        for name in names:
            depends[of_name.get(name, root)].append(ref)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": root,
                "name": project["name"],
                "version": project["version"],
                "licenses": [{"expression": project["license"]}],
            }
        },
        "components": components,
        "dependencies": [{"ref": ref, "dependsOn": sorted(set(on))} for ref, on in depends.items()],
    }


def _version(requirement: Requirement) -> str:
    pins = [specifier.version for specifier in requirement.specifier if specifier.operator == "=="]
    if len(pins) != 1:
        raise ValueError(f"{requirement} is not pinned to one version: write the lock anew with `make lock`")
    return pins[0]


def _names(comment: str) -> list[str]:
    """Return who asked for it: ``# via a`` or one name a line; what is no distribution's name is the project."""
    words = [line.strip(" #").removeprefix("via").strip() for line in comment.splitlines()]
    return [re.split(r"[\[ ]", word)[0] for word in words if word]


def _component(name: str, version: str, hashes: str, requirement: Requirement) -> dict[str, Any]:
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": f"{name}@{version}",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{name}@{version}",
        "externalReferences": [
            {
                "type": "distribution",
                "url": f"https://pypi.org/project/{name}/{version}/#files",
                "hashes": [{"alg": "SHA-256", "content": content} for content in _HASH.findall(hashes)],
            }
        ],
    }
    if requirement.marker is not None:
        component["properties"] = [{"name": "forebay:installed-if", "value": str(requirement.marker)}]
    return component


def main() -> None:
    """Read the lock that the command line names and write the document to standard output."""
    project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
    document = bill_of_materials(Path(sys.argv[1]).read_text(encoding="utf-8"), project)
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
