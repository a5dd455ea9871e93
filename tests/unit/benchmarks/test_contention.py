"""What the fairness benchmarks compute from answers, by answers whose figures are known."""

from array import array
from collections.abc import Sequence

import pytest

from benchmarks.contention import figures
from benchmarks.contention.replay import Answer
from benchmarks.contention.trace import HOG, URGENT, Ask, full_batch, hog_trace, part_of


def answer(
    tenant: str = "a",
    *,
    asked: float = 0.0,
    times: Sequence[float] = (),
    prompt: int = 0,
    recomputed: int = 0,
    text: str = "",
    is_cut_off: bool = False,
) -> Answer:
    """An answer of one token a piece; its first event comes with its first piece."""
    one = Answer(Ask(asked, tenant, "Hi.", len(times)), asked, array("d", times), text=text)
    one.first = times[0] if times else None
    one.prompt_tokens, one.recomputed = prompt, recomputed
    if not is_cut_off:
        one.end, one.tokens = (times[-1] if times else asked), len(times)
    return one


def test_a_quantile_is_a_value_that_was_seen() -> None:
    values = [4.0, 1.0, 3.0, 2.0]

    assert [figures.quantile(values, share) for share in (0.0, 0.5, 0.9, 1.0)] == [1.0, 3.0, 4.0, 4.0]


def test_a_request_without_a_token_has_waited_until_the_window_closed() -> None:
    answers = [answer(asked=1.0, times=[3.0]), answer(asked=2.0, is_cut_off=True)]

    assert figures.ttfts(answers) == [2.0]
    assert figures.ttfts(answers, 10.0) == [2.0, 8.0]


def test_the_engine_is_crowded_while_more_requests_are_open_than_it_has_slots() -> None:
    answers = [answer(times=[4.0]), answer(asked=1.0, times=[5.0]), answer(asked=2.0, times=[6.0])]

    assert figures.crowded(answers, 1) == [(1.0, 5.0)]
    assert figures.crowded(answers, 2) == [(2.0, 4.0)]
    assert figures.crowded(answers, 3) == []


def test_a_request_that_takes_the_place_of_another_at_once_leaves_the_engine_crowded_in_two_spans_at_most() -> None:
    answers = [answer(times=[4.0]), answer(times=[8.0]), answer(asked=4.0, times=[6.0])]

    assert sum(high - low for low, high in figures.crowded(answers, 1)) == pytest.approx(6.0)


def test_tokens_a_second_are_counted_within_the_spans_alone() -> None:
    answers = [answer(times=[1.0, 2.0, 3.0, 9.0], prompt=30), answer(times=[2.5, 3.5], prompt=7)]
    spans = [(1.0, 2.0), (2.0, 4.0)]

    assert figures.delivered(answers, (2.0, 3.5)) == 3.0
    assert figures.prompted(answers, (2.0, 3.5)) == 7.0  # with the first piece, as the engine was done with it then
    assert figures.rate(answers, spans, figures.delivered) == pytest.approx(5 / 3)
    assert figures.rate(answers, spans, figures.prompted) == pytest.approx(37 / 3)
    assert figures.rate(answers, [], figures.delivered) == 0.0


def test_a_piece_of_several_tokens_counts_as_many() -> None:
    one = answer(times=[1.0, 2.0])
    one.tokens = 4

    assert figures.delivered([one], (0.0, 1.5)) == 2.0


def test_waste_is_what_was_computed_again_over_what_was_of_use() -> None:
    assert figures.waste([answer(times=[1.0] * 80, prompt=20, recomputed=10)]) == pytest.approx(0.1)
    assert figures.waste([]) == 0.0


def test_a_fair_share_gives_nobody_more_than_asked_and_the_rest_to_the_others() -> None:
    assert figures.fair_shares({"a": 10.0, "b": 100.0, "c": 100.0}, 90.0) == {"a": 10.0, "b": 40.0, "c": 40.0}
    assert figures.fair_shares({"a": 10.0, "b": 20.0}, 90.0) == {"a": 10.0, "b": 20.0}


def test_jains_index_is_one_for_equals_and_one_of_all_for_a_monopoly() -> None:
    assert figures.jain([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert figures.jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def test_a_tenant_that_gets_all_that_it_asked_for_makes_nothing_uneven_by_asking_for_little() -> None:
    little = answer("light", times=[1.0, 2.0])
    much = [answer("hog", times=[float(at) for at in range(1, 9)])]

    assert figures.evenness([little, *much], 10.0) == pytest.approx(1.0)


def test_the_gap_is_what_one_got_while_both_waited() -> None:
    hog = [answer("hog", times=[1.0, 2.0, 3.0, 4.0]), answer("hog", times=[9.0])]
    light = [answer("light", asked=1.5, times=[3.5])]

    # both wait from 1.5 to 3.5: two tokens of the hog's, at 2.0 and 3.0; then the light one's own at 3.5
    assert figures.service_gap([*hog, *light]) == pytest.approx(2 * figures.OUTPUT_WEIGHT)


def test_a_stream_that_is_silent_for_long_waits_for_its_turn() -> None:
    assert figures.waits([answer(asked=1.0, times=[2.0, 2.5, 4.0])]) == [(1.0, 2.0), (2.5, 4.0)]


def test_answers_of_two_runs_are_compared_where_both_are_whole() -> None:
    ours = [
        answer(times=[1.0], text="x"),
        answer(times=[1.0], text="y"),
        answer(times=[1.0], text="z", is_cut_off=True),
    ]
    theirs = [answer(times=[2.0], text="x"), answer(times=[2.0], text="Y"), answer(times=[2.0], text="z")]

    assert figures.same_text(ours, theirs) == 0.5


def test_a_ratio_of_rounds_that_agree_has_a_narrow_interval_around_it() -> None:
    above, below = [[8.0, 10.0], [8.0, 10.0]], [[1.0, 2.0], [1.0, 2.0]]

    measured = figures.ratio(above, below, lambda values: figures.quantile(values, 0.99))

    assert (measured.middle, measured.low, measured.high) == (5.0, 5.0, 5.0)


def test_the_trace_has_a_hog_and_six_others_who_make_three_hundred_samples_in_four_rounds() -> None:
    asks = hog_trace()
    light = [ask for ask in asks if ask.tenant != HOG]

    assert {ask.at for ask in asks if ask.tenant == HOG} == {0.0}
    assert len({ask.tenant for ask in light}) == 6
    assert 4 * len(light) >= 300
    assert len({ask.prompt for ask in asks}) == len(asks)


def test_a_part_of_the_trace_has_fewer_and_shorter_answers_of_the_hog_and_the_others_until_then() -> None:
    part = part_of(hog_trace(), hogs=2, until=12.0, shorter=0.5)
    heavy = [ask for ask in part if ask.tenant == HOG]

    assert [2 * ask.tokens for ask in heavy] == [ask.tokens // 2 * 2 for ask in hog_trace()[:2]]
    assert all(ask.at < 12.0 for ask in part)


def test_a_full_batch_is_the_same_each_time_and_no_two_of_its_prompts_begin_alike() -> None:
    def drawn() -> list[Ask]:
        return full_batch(
            hogs=8, hog_tokens=(20, 40), hog_prompt=5, rate=8.0, seconds=40.0, urgent_tokens=4, seed=4
        )  # fmt: skip

    asks = drawn()

    assert asks == drawn()
    assert len({ask.prompt[:12] for ask in asks}) == len(asks)
    assert all(1.0 < ask.at < 40.0 for ask in asks if ask.tenant == URGENT)
