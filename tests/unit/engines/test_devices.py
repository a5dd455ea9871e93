"""GPU assignment: who gets which device, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from core.ids import ModelName, WorkerId
from engines.devices import DeviceError, Gpu, assign, inventory, memory_used, parse_rows, wait_until_freed
from engines.spec import Launch, WorkerSpec

TWO = (Gpu(0, 80.0), Gpu(1, 80.0))
FOUR = (*TWO, Gpu(2, 80.0), Gpu(3, 80.0))


def worker(name: str, *gpus: int, tp: int = 1, memory_gib: float | None = None) -> WorkerSpec:
    launch = Launch(gpus=gpus, tp=tp, memory_gib=memory_gib)
    return WorkerSpec(id=WorkerId(name), model=ModelName("m"), engine="vllm", launch=launch)


def test_a_worker_sees_the_gpu_it_lists() -> None:
    assert assign([worker("a", 1)], TWO) == {"a": "1"}


def test_a_worker_without_gpus_sees_none() -> None:
    assert assign([worker("a")], TWO) == {"a": ""}


def test_an_attached_worker_is_not_assigned_anything() -> None:
    spec = WorkerSpec(id=WorkerId("a"), model=ModelName("m"), engine="vllm", url="http://host:8000")

    assert assign([spec], TWO) == {}


def test_a_worker_gets_as_many_gpus_as_its_tensor_parallel_degree() -> None:
    assert assign([worker("a", 0, 1, 2, 3, tp=2)], FOUR) == {"a": "0,1"}


def test_workers_that_list_the_same_gpus_are_spread_over_them() -> None:
    specs = [worker("a", 0, 1, 2, 3, tp=2), worker("b", 0, 1, 2, 3, tp=2)]

    assert assign(specs, FOUR) == {"a": "0,1", "b": "2,3"}


def test_the_worker_with_less_choice_is_served_first() -> None:
    assert assign([worker("a", 0, 1), worker("b", 0)], TWO) == {"a": "1", "b": "0"}


def test_workers_that_give_their_memory_share_a_gpu() -> None:
    specs = [worker("a", 0, memory_gib=40), worker("b", 0, memory_gib=40)]

    assert assign(specs, TWO) == {"a": "0", "b": "0"}


def test_memory_is_counted_on_every_gpu_of_a_worker() -> None:
    specs = [worker("a", 0, 1, tp=2, memory_gib=50), worker("b", 1, memory_gib=40)]

    with pytest.raises(DeviceError, match=r"GPU 1 has 80 GiB, of which 50 are taken by \['a'\] and 40 more"):
        assign(specs, TWO)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([worker("a", 7)], r"'a' lists GPU 7, but this machine has \[0, 1\]"),
        ([worker("a", 0, 1, tp=3)], "tp: 3 and 2 in gpus: list at least tp GPUs"),
        ([worker("a", 0, tp=0)], "tp: 0"),
        ([worker("a", tp=2)], "tp: 2 and no gpus"),
        ([worker("a", 1, 1)], "lists a GPU twice"),
        ([worker("a", 0), worker("b", 0)], "'b' needs 1 .* belongs to 'a' alone, which gives no memory_gib"),
        ([worker("a", 0), worker("b", 0, memory_gib=1)], "'b' needs 1 .* belongs to 'a' alone"),
        ([worker("a", 0, memory_gib=90)], "GPU 0 has 80 GiB, of which 0 are taken .* 90 more"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(specs: list[WorkerSpec], message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        assign(specs, TWO)


def test_a_machine_without_gpus_says_so() -> None:
    with pytest.raises(DeviceError, match="nvidia-smi shows none"):
        assign([worker("a", 0)], ())


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """A stand-in for nvidia-smi; call it with what it shall print."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncat "$0.out"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return (tmp_path / "nvidia-smi.out").write_text


async def test_the_inventory_is_what_nvidia_smi_lists(nvidia_smi: Callable[[str], object]) -> None:
    nvidia_smi("0, 81920\n1, 40960\n")

    assert await inventory() == (Gpu(0, 80.0), Gpu(1, 40.0))


async def test_memory_in_use_is_asked_for_the_given_gpus_alone(nvidia_smi: Callable[[str], object]) -> None:
    nvidia_smi("0, 700\n1, 900\n")

    assert await memory_used([1]) == {1: 900}


async def test_memory_counts_as_freed_when_it_is_about_what_it_was(nvidia_smi: Callable[[str], object]) -> None:
    nvidia_smi("0, 700\n")

    assert await wait_until_freed({0: 500})


async def test_a_machine_without_nvidia_smi_has_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert await inventory() == ()
    assert await memory_used([0]) == {}
    assert await wait_until_freed({})


def test_rows_of_nvidia_smi_that_hold_no_number_are_left_out() -> None:
    assert parse_rows("0, 81559\n1, [N/A]\nNo devices were found\n") == [(0, 81559)]
