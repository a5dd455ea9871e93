"""Tenants take the slots of a real vLLM from each other, and every stream is what it would have been."""

import psutil
import pytest

from tests.e2e.disrupting import trial
from tests.e2e.plans import attached_vllm_plan
from tests.vllm.conftest import START_TIMEOUT_S, Vllm

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(START_TIMEOUT_S + 180)]


async def test_twenty_answers_of_vllm_are_whole_however_often_they_are_cut(vllm: Vllm) -> None:
    worker = vllm.worker()
    key = psutil.Process(worker["pid"]).environ()["VLLM_API_KEY"]
    seen = await trial(attached_vllm_plan(worker["url"], key, slots=3), 20)
    print(f"\n{seen.summary()}", *seen.disturbed.different, sep="\n")
    assert seen.disturbed.broken == []
    assert seen.disturbed.unfinished == []
    assert seen.ended["preempted"] >= 3
