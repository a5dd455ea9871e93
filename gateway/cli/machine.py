"""What this machine has, and which model is sensible on it."""

import os
import shutil
import subprocess
from pathlib import Path

import msgspec
import psutil

GIB = 2**30


class Gpu(msgspec.Struct, frozen=True):
    """One NVIDIA GPU as ``nvidia-smi`` reports it."""

    index: int
    name: str
    memory_gib: float
    driver: str


class Advice(msgspec.Struct, frozen=True):
    """A model that fits, why, and what to tell ``forebay`` to run it."""

    reason: str
    arguments: str


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads(cores: int) -> int:
    """Return the threads of one llama.cpp worker: half the cores, and one on a small machine.

    More than one thread on a busy two-core machine makes llama.cpp slower by far: its threads spin at barriers.
    """
    return 1 if cores <= 2 else cores // 2


def ram_gib() -> float:
    """Return the memory of this machine, or of the container we are in if that is less."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        limit = "max"
    return min(total, int(limit)) / GIB if limit.isdigit() else total / GIB


def gpus() -> list[Gpu]:
    """Return the NVIDIA GPUs; none where ``nvidia-smi`` is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=index,name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_nvidia_smi(answer.stdout)


def parse_nvidia_smi(text: str) -> list[Gpu]:
    """Read ``index, name, MiB, driver`` lines; one without a number of MiB (a GPU with shared memory) is left out."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and parts[0].isdigit() and parts[2].isdigit():
            found.append(Gpu(index=int(parts[0]), name=parts[1], memory_gib=int(parts[2]) / 1024, driver=parts[3]))
    return found


def best_gpu(found: list[Gpu]) -> Gpu | None:
    """Return the GPU with the most memory, the first of equals; None if there is none."""
    return max(found, key=lambda gpu: gpu.memory_gib, default=None)


# Memory needed (GiB) and a model without a "thinking" phase whose 16-bit weights leave room for KV in it.
_GPU_MODELS = (
    (75, "Qwen/Qwen3-30B-A3B-Instruct-2507"),
    (38, "Qwen/Qwen2.5-14B-Instruct"),
    (22, "Qwen/Qwen2.5-7B-Instruct"),
    (12, "Qwen/Qwen3-4B-Instruct-2507"),
    (6, "Qwen/Qwen2.5-1.5B-Instruct"),
)

# RAM (GiB) and cores needed, a hub repository with a 4-bit GGUF, and its size.
_CPU_MODELS = (
    (15, 8, "bartowski/Qwen2.5-7B-Instruct-GGUF", "4.7 GB"),
    (7, 4, "Qwen/Qwen2.5-3B-Instruct-GGUF", "2.1 GB"),
    (3.5, 2, "Qwen/Qwen2.5-1.5B-Instruct-GGUF", "1.1 GB"),
    (0, 0, "Qwen/Qwen2.5-0.5B-Instruct-GGUF", "0.5 GB"),
)


def advise(*, memory_gib: float, cores: int, found: list[Gpu]) -> Advice:
    """Return one model that runs well on a machine like this."""
    best = best_gpu(found)
    for needed, model in _GPU_MODELS:
        if best is not None and best.memory_gib >= needed:
            return Advice(
                reason=f"your {best.name} has {best.memory_gib:.0f} GiB",
                arguments=f"run {model} --engine vllm",
            )
    for needed_ram, needed_cores, repository, size in _CPU_MODELS:
        if memory_gib >= needed_ram and cores >= needed_cores:
            return Advice(
                reason=f"fits {memory_gib:.0f} GiB of RAM and {cores} cores; downloads {size} once",
                arguments=f"run {repository}",
            )
    raise AssertionError("the last row of the table asks for nothing")
