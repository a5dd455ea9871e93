"""What the simulated benchmarks share: data, and what is compared with the scheduler."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from benchmarks.loopback.cache import ROOT, Missing
from core.ids import LegId, WorkerId
from routing.scheduler import Effect, Event, LegEnded, Start, Submit
from routing.simulator import formats
from routing.simulator.simulation import MODEL
from routing.simulator.trace import Trace

TRACES = {
    "tenants": "traces/vtc_27_tenants.jsonl",
    "azure": "traces/azure_llm_2023_conv.csv",
    "mooncake": "traces/mooncake_conversation.jsonl",
}


def data_folder() -> Path:
    """`$FOREBAY_DATA`, else the folder `shared/data` beside the checkout."""
    return Path(os.environ.get("FOREBAY_DATA") or ROOT.parent / "shared" / "data")


def load(name: str, seed: int = 1) -> Trace:
    """A public trace by name; raises `Missing` where its file is not."""
    path = data_folder() / TRACES[name]
    if not path.exists():
        raise Missing(f"there is no {path}; set FOREBAY_DATA to the folder with traces/")
    with path.open(encoding="utf-8-sig") as lines:
        return formats.read(name, lines, seed)


class Direct:
    """What stands in front of engines today: each request goes to a worker the moment it comes, and waits there.

    `round_robin` takes the workers in turn; `least_requests` that with the fewest requests.
    """

    def __init__(self, workers: int, rule: Literal["round_robin", "least_requests"] = "round_robin") -> None:
        self._open = [0] * workers
        self._rule = rule
        self._next = 0
        self._at: dict[LegId, int] = {}

    def on(self, event: Event) -> Sequence[Effect]:
        """A request is started as it comes; nothing else follows anything."""
        match event:
            case Submit():
                index = self._choose()
                leg = LegId(f"{event.request}/0")
                self._open[index] += 1
                self._at[leg] = index
                return [Start(leg=leg, request=event.request, worker=WorkerId(f"w{index}"), model=MODEL, attempt=1)]
            case LegEnded():
                self._open[self._at.pop(event.leg)] -= 1
            case _:
                pass
        return ()

    def next_wakeup(self) -> float | None:
        """Nothing waits for time to pass."""
        return None

    def _choose(self) -> int:
        if self._rule == "least_requests":
            # Ties go round, or the first worker would have them all.
            order = range(self._next, self._next + len(self._open))
            index = min(order, key=lambda place: self._open[place % len(self._open)]) % len(self._open)
        else:
            index = self._next
        self._next = (index + 1) % len(self._open)
        return index
