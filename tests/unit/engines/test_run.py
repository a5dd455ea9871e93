"""The state of one answer between its legs."""

import pytest

from core.ids import LegId, ModelName, RequestId, WorkerId
from engines.run import Run
from engines.transcript import Transcript
from routing.scheduler import Start
from tests.fakes.clock import ManualClock
from tests.fakes.drivers import call


async def nothing(*_: object) -> None:
    pass


@pytest.mark.parametrize(("model", "is_resumed"), [("m", True), ("other", False)])
def test_only_the_same_model_goes_on_with_what_was_kept_of_a_whole_answer(model: str, is_resumed: bool) -> None:
    given = call(stream=False)
    run = Run(given, ManualClock(), on_close=lambda _: None, drive=nothing, is_inline=False)
    for number, name in enumerate((given.model, model)):
        run.begin_leg(
            Start(
                leg=LegId(f"r/{number}"), request=RequestId("r"), worker=WorkerId("w"), model=ModelName(name),
                attempt=number + 1,
            ),
            0,
            0.0,
        )  # fmt: skip
        if not number:
            run.transcript = Transcript(given)
            run.journal.asides.append(b"x")
    assert run.is_resumed is is_resumed
    assert bool(run.journal.asides) is is_resumed
