"""Traces: what readers make of lines, who gets which requests, and what is made up."""

import itertools
import json

import pytest

from core.ids import TenantId
from routing.simulator import formats
from routing.simulator.generator import Bursts, burstgpt_like
from routing.simulator.trace import Arrival, BadTrace, light_and_heavy, trace, zipf_tenants

AZURE = [
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2023-11-16 18:15:46.6805900,374,44",
    "2023-11-16 18:15:50.9951690,396,109",
]
BURSTGPT = [
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
    "5,s1,2.1,ChatGPT,472,18,490,Conversation log",
    "45,s1,0.4,ChatGPT,1087,0,1087,Conversation log",
    "50,,0.4,GPT-4,10,20,30,API log",
]
MOONCAKE = [
    json.dumps({"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 7, 8]}),
    json.dumps({"timestamp": 3000, "input_length": 1700, "output_length": 6, "hash_ids": [0, 7, 8, 9]}),
    json.dumps({"timestamp": 3000, "input_length": 400, "output_length": 7, "hash_ids": [0]}),
]
TENANTS = [
    json.dumps({"t_s": 2.5, "tenant": "b", "prompt_tokens": 3, "output_tokens": 4}),
    json.dumps({"t_s": 0.5, "tenant": "a", "prompt_tokens": 1, "output_tokens": 2}),
]


def test_azures_timestamps_become_seconds_from_the_first_request() -> None:
    one, other = formats.azure(AZURE).arrivals
    assert (one.at, one.prompt, one.output) == (0.0, 374, 44)
    assert other.at == pytest.approx(4.3145790)


def test_tenants_that_a_file_does_not_name_are_drawn_by_a_seed() -> None:
    assert formats.azure(AZURE, seed=3) == formats.azure(AZURE, seed=3)
    assert "Zipf(1.0), seed 3" in formats.azure(AZURE, seed=3).note


def test_the_first_tenant_of_zipf_has_twice_the_requests_of_the_second() -> None:
    draw = zipf_tenants(10, seed=1)
    drawn = [draw() for _ in range(20_000)]
    first, second = drawn.count(TenantId("tenant-00")), drawn.count(TenantId("tenant-01"))
    assert first / second == pytest.approx(2.0, rel=0.1)


def test_a_session_of_burstgpt_is_one_program_of_one_tenant() -> None:
    one, other, alone = formats.burstgpt(BURSTGPT).arrivals
    assert one.tenant == other.tenant
    assert (one.program, other.program, alone.program) == ("s1", "s1", "")


def test_a_failure_of_burstgpt_has_no_answer() -> None:
    assert [arrival.output for arrival in formats.burstgpt(BURSTGPT).arrivals] == [18, 0, 20]


def test_requests_of_one_mooncake_conversation_have_one_tenant_and_their_full_blocks() -> None:
    one, other, short = formats.mooncake(MOONCAKE).arrivals
    assert one.tenant == other.tenant
    assert one.program == other.program != short.program
    assert (one.blocks, other.blocks, short.blocks) == ((0, 7), (0, 7, 8), ())


def test_the_file_with_tenants_keeps_them_and_is_sorted_by_time() -> None:
    assert [(one.at, one.tenant) for one in formats.tenants(TENANTS).arrivals] == [(0.0, "a"), (2.0, "b")]


@pytest.mark.parametrize(
    ("lines", "name"), [(AZURE, "azure"), (BURSTGPT, "burstgpt"), (MOONCAKE, "mooncake"), (TENANTS, "tenants")]
)
def test_a_format_is_known_by_its_first_line(lines: list[str], name: str) -> None:
    assert formats.recognise(lines[0]) == name
    assert formats.read(name, lines, seed=1).name == name


def test_a_line_of_no_format_is_not_recognised() -> None:
    assert formats.recognise("id,words") is None


def test_a_wrong_line_is_named() -> None:
    with pytest.raises(BadTrace, match="line 3"):
        formats.azure([*AZURE[:2], "2023-11-16 18:15:50,many,109"])
    with pytest.raises(BadTrace, match="line 2"):
        formats.tenants([TENANTS[0], '{"t_s": 1}'])


def test_a_file_without_requests_is_no_trace() -> None:
    with pytest.raises(BadTrace, match="no request"):
        formats.azure(AZURE[:1])


def test_a_faster_trace_has_the_same_requests_closer_together() -> None:
    found = formats.azure(AZURE).faster(2)
    assert found.duration == pytest.approx(4.3145790 / 2)
    assert found.first(1).arrivals == found.arrivals[:1]


def test_who_asks_for_half_of_all_is_heavy_and_who_asks_for_little_is_light() -> None:
    asks = {"hog": 100, "some": 30, "few": 2}
    arrivals = [Arrival(0.0, TenantId(name), num, 0) for name, num in asks.items()]
    assert light_and_heavy(arrivals) == {"hog": "heavy", "some": "middle", "few": "light"}


def test_the_made_up_trace_is_the_same_for_the_same_seed_only() -> None:
    assert burstgpt_like(Bursts(requests=50)) == burstgpt_like(Bursts(requests=50))
    assert burstgpt_like(Bursts(requests=50)) != burstgpt_like(Bursts(requests=50, seed=2))


def test_the_made_up_trace_has_the_rate_the_failures_and_the_lengths_it_was_asked_for() -> None:
    found = burstgpt_like(Bursts(requests=3000, rate=5.0, failures=0.1))
    assert 3000 / found.duration == pytest.approx(5.0, rel=0.2)
    assert sum(not one.output for one in found.arrivals) / 3000 == pytest.approx(0.1, abs=0.02)
    answers = sorted(one.output for one in found.arrivals)
    assert answers[-1] <= 1024
    assert answers[1500] * 4 < answers[2970]  # many short, few very long


def test_its_gaps_are_burstier_when_asked_for() -> None:
    def variation(burstiness: float) -> float:
        found = burstgpt_like(Bursts(requests=2000, burstiness=(burstiness, burstiness), swing=0.0, turns=0.0)).arrivals
        gaps = [b.at - a.at for a, b in itertools.pairwise(found)]
        mean = sum(gaps) / len(gaps)
        return float((sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean)

    assert variation(0.5) == pytest.approx(0.5, rel=0.2)
    assert variation(3.0) > 2.0


def test_a_later_turn_of_a_session_begins_with_what_was_said_before() -> None:
    found = burstgpt_like(Bursts(requests=400, turns=0.5)).arrivals
    sessions: dict[str, list[Arrival]] = {}
    for one in found:
        sessions.setdefault(one.program, []).append(one)
    longer = [turns for turns in sessions.values() if len(turns) > 1]
    assert longer
    for first, second, *_ in longer:
        assert second.prompt > first.prompt + first.output - 1
        assert second.blocks[: len(first.blocks)] == first.blocks


def test_a_trace_begins_at_zero() -> None:
    assert trace("t", [Arrival(9.0, TenantId("a"), 1, 1)], "").arrivals[0].at == 0.0
