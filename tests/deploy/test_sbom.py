import hashlib
import re
import tomllib
from typing import Any

import pytest

from deploy.sbom import bill_of_materials
from tests.deploy.images import ROOT

_LOCK = (ROOT / "requirements.txt").read_text("utf-8")
_PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
_DIGEST = hashlib.sha256(b"").hexdigest()


def test_every_distribution_of_the_lock_is_listed_with_all_its_hashes() -> None:
    bill = bill_of_materials(_LOCK, _PROJECT)
    pins = re.findall(r"^([a-z0-9][\w.-]*)(?:\[[^]]*\])?==(\S+)", _LOCK, re.MULTILINE)
    assert [(component["name"], component["version"]) for component in bill["components"]] == pins
    hashes = [entry for each in bill["components"] for entry in each["externalReferences"][0]["hashes"]]
    assert len(hashes) == _LOCK.count("--hash=sha256:")


def test_every_distribution_is_wanted_by_one_that_is_listed() -> None:
    bill = bill_of_materials(_LOCK, _PROJECT)
    depends = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}
    reached, left = set(), [bill["metadata"]["component"]["bom-ref"]]
    while left:
        ref = left.pop()
        if ref not in reached:
            reached.add(ref)
            left += depends[ref]
    assert reached == set(depends)


def test_the_same_lock_gives_the_same_bill() -> None:
    assert bill_of_materials(_LOCK, _PROJECT) == bill_of_materials(_LOCK, _PROJECT)


@pytest.mark.parametrize("line", ["thing==1.0\n", f"thing>=1.0 \\\n    --hash=sha256:{_DIGEST}\n"])
def test_a_requirement_that_is_not_pinned_or_has_no_hash_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="make lock"):
        bill_of_materials(line, _PROJECT)
