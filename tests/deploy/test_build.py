import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.deploy.images import ROOT


def context(folder: Path) -> Path:
    """Return what a build would be sent: what .dockerignore lets through, and nothing else."""
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        source = ROOT / line.removeprefix("!")
        if not line.startswith("!") or not source.exists():
            continue
        target = folder / line.removeprefix("!")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return folder


def test_what_a_build_is_sent_is_enough_to_install_the_whole_server(tmp_path: Path) -> None:
    sent = context(tmp_path / "context")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-index", "-q"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", str(tmp_path), "."],
        cwd=sent, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    packages = [folder for folder in sent.iterdir() if (folder / "__init__.py").exists()]
    files = {path.relative_to(sent).as_posix() for folder in packages for path in folder.rglob("*") if path.is_file()}
    assert {"gateway/cli/forebay.yaml.in", "core/errors.py"} <= files
    assert packed == files
