"""What a worker's legs tell of its speed."""

from routing.scheduler.pace import Pace


def test_short_prompts_that_waited_for_the_step_of_others_do_not_make_long_ones_look_dear() -> None:
    pace = Pace()
    pace.observe_prefill(200, 1.0)
    for _ in range(50):
        pace.observe_prefill(3, 0.3)
    assert pace.prefill(200) == 1.0


def test_of_short_prompts_alone_nothing_is_told() -> None:
    pace = Pace()
    pace.observe_prefill(Pace.TELLING - 1, 0.3)
    assert pace.prefill(200) is None
