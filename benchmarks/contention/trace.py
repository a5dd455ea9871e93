"""What tenants ask, and when; the same in every arm."""

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

HOG = "hog"
URGENT = "urgent"
_HOG_TRACE = Path(__file__).resolve().parents[1] / "traces" / "hog.jsonl"
_WORDS = ("sluice", "weir", "intake", "gauge", "spill", "draft", "rack", "gate", "flume", "crest", "surge", "head")


class Ask(msgspec.Struct, frozen=True):
    """One request: when it is sent (seconds from the start), by whom, and exactly how many tokens it wants."""

    at: float
    tenant: str
    prompt: str
    tokens: int


def hog_trace() -> list[Ask]:
    """Return the trace of the paper's shape: ten long reports wanted at once by one tenant, while each of six others
    puts a short question every four seconds (Poisson; times drawn once and kept in the file), from 8 s on for 50 s."""
    return [msgspec.json.decode(line, type=Ask) for line in _HOG_TRACE.read_bytes().splitlines()]


def part_of(asks: Sequence[Ask], *, hogs: int, until: float, shorter: float) -> list[Ask]:
    """Return the first of the hog's requests, with answers that much shorter, and the others' until then."""
    first = [ask for ask in asks if ask.tenant == HOG][:hogs]
    cut = [Ask(ask.at, ask.tenant, ask.prompt, int(ask.tokens * shorter)) for ask in first]
    return cut + [ask for ask in asks if ask.tenant != HOG and ask.at < until]


def full_batch(
    *,
    hogs: int,
    hog_tokens: tuple[int, int],
    hog_prompt: int,
    rate: float,
    seconds: float,
    urgent_tokens: int,
    seed: int,
) -> list[Ask]:
    """Return a batch that fills every slot at once, and urgent requests at ``rate`` a second (Poisson) beside it.

    No two prompts begin alike, so that nobody is served from a prefix cache by chance. ``hog_prompt``: its words.
    """
    draw = random.Random(seed)
    asks = [
        Ask(0.0, HOG, f"{number}: " + " ".join(draw.choices(_WORDS, k=hog_prompt)), draw.randint(*hog_tokens))
        for number in range(hogs)
    ]
    at = 1.0  # the batch is in the engine by then
    while (at := at + draw.expovariate(rate)) < seconds:
        asks.append(Ask(at, URGENT, f"At {at:.6f}: " + " ".join(draw.choices(_WORDS, k=24)), urgent_tokens))
    return asks
