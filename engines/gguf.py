"""The file format of llama.cpp's models. Imports nothing that a worker's process would have to wait for."""

from pathlib import Path

_MAGIC = b"GGUF"


def problem_with(path: Path) -> str | None:
    """Return in one line why the path is not a readable GGUF file; None if it is one."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        return f"cannot read the model {path}: {error.strerror}"
    return None if magic == _MAGIC else f"{path} is not a GGUF file"
