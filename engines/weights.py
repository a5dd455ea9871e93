"""Which model files an engine of ours may load: formats that hold numbers, not programs (S11)."""

from pathlib import Path

_SAFE = frozenset({".safetensors", ".gguf"})
_PICKLED = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})


def problem_with(source: str) -> str | None:
    """Return in one line why a folder or file is not loaded; None if it may be, or if it is no path of this machine.

    A folder is refused for a single pickled file in it: loading one runs whatever its author wrote into it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return None if path.suffix in _SAFE else f"{path} is neither a .safetensors nor a .gguf file"
    if not source or not path.is_dir():
        return None
    if pickled := sorted(file.name for file in path.rglob("*") if file.suffix.lower() in _PICKLED):
        listed = ", ".join(pickled[:3])
        return f"{path} holds files that can run code when they are loaded ({listed}); keep safetensors alone in it"
    return None
