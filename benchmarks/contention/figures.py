"""What the answers to a trace come to, seen from the clients alone: the same sums for every arm, gateway or not.

Service is counted as the scheduler counts it: ``PROMPT_WEIGHT`` a prompt token, ``OUTPUT_WEIGHT`` an output token.
"""

import bisect
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from benchmarks.contention.replay import Answer
from benchmarks.loopback.stats import RESAMPLES, Interval

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
PAUSE_S = 1.0  # a stream that says nothing for so long waits for its turn again

Span = tuple[float, float]


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of the values is not above: an observed one, never one between two."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def ttfts(answers: Sequence[Answer], until: float | None = None) -> list[float]:
    """Return the seconds from each request to its first event; of one that had none, those it had waited until then."""
    waited = [(a.first if a.first is not None else until, a.asked) for a in answers]
    return [first - asked for first, asked in waited if first is not None]


def gaps(answers: Sequence[Answer]) -> list[float]:
    """Return the seconds between pieces of text that follow each other in one answer."""
    return [later - sooner for a in answers for sooner, later in zip(a.times, a.times[1:], strict=False)]


def delivered(answers: Sequence[Answer], span: Span) -> float:
    """Return how many output tokens came within the span."""
    low, high = span
    return sum(
        (bisect.bisect_left(a.times, high) - bisect.bisect_left(a.times, low)) * a.tokens_per_piece for a in answers
    )


def crowded(answers: Sequence[Answer], slots: int) -> list[Span]:
    """Return when more requests were open than there are slots: while these last, no slot has an excuse to idle."""
    steps = sorted((at, step) for a in answers if a.end is not None for at, step in ((a.asked, 1), (a.end, -1)))
    spans, num_open, since = [], 0, 0.0
    for at, step in steps:
        if num_open == slots and step > 0:
            since = at
        if num_open == slots + 1 and step < 0 and at > since:
            spans.append((since, at))
        num_open += step
    return spans


def prompted(answers: Sequence[Answer], span: Span) -> float:
    """Return the tokens of the prompts whose answers began within the span; what was computed again is not in it."""
    low, high = span
    return sum(a.prompt_tokens for a in answers if a.first is not None and low <= a.first < high)


def rate(answers: Sequence[Answer], spans: Sequence[Span], of: Callable[[Sequence[Answer], Span], float]) -> float:
    """Return tokens a second within the spans, as ``of`` counts them; 0 where there are no spans."""
    seconds = sum(high - low for low, high in spans)
    return sum(of(answers, span) for span in spans) / seconds if seconds else 0.0


def service(answers: Sequence[Answer], at: float) -> float:
    """Return what the answers had been served by then, in weighted tokens: the prompt counts with the first event."""
    begun = sum(a.prompt_tokens for a in answers if a.first is not None and a.first <= at)
    return PROMPT_WEIGHT * begun + OUTPUT_WEIGHT * delivered(answers, (0.0, at))


def waste(answers: Sequence[Answer]) -> float:
    """Return the prompt tokens that were computed again, as a share of all tokens that were of use."""
    useful = sum(a.prompt_tokens + a.tokens for a in answers)
    return sum(a.recomputed for a in answers) / useful if useful else 0.0


def fair_shares(demands: Mapping[str, float], capacity: float) -> dict[str, float]:
    """Return the max-min fair division: nobody gets more than asked, and what one leaves is divided among the rest."""
    shares: dict[str, float] = {}
    left, waiting = capacity, sorted(demands, key=lambda name: demands[name])
    for index, name in enumerate(waiting):
        shares[name] = min(demands[name], left / (len(waiting) - index))
        left -= shares[name]
    return shares


def jain(values: Sequence[float]) -> float:
    """Return Jain's index: 1 if all are equal, 1/n if one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def evenness(answers: Sequence[Answer], until: float) -> float:
    """Return Jain's index of what each tenant was served, over its max-min fair share of all that was served."""
    tenants = by_tenant([a for a in answers if a.asked < until])
    served = {name: service(own, until) for name, own in tenants.items()}
    wanted = {
        name: sum(PROMPT_WEIGHT * a.prompt_tokens + OUTPUT_WEIGHT * a.ask.tokens for a in own)
        for name, own in tenants.items()
    }
    shares = fair_shares(wanted, sum(served.values()))
    return jain([min(served[name] / shares[name], 1.0) for name in served if shares[name]])


def by_tenant(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Return each tenant's own."""
    own: dict[str, list[Answer]] = {}
    for answer in answers:
        own.setdefault(answer.ask.tenant, []).append(answer)
    return own


def waits(answers: Sequence[Answer]) -> list[Span]:
    """Return when at least one of these waited: for its first event, or in a pause that is longer than ``PAUSE_S``."""
    spans: list[Span] = []
    for a in answers:
        if a.first is None:
            continue
        spans.append((a.asked, a.first))
        spans += [(low, high) for low, high in zip(a.times, a.times[1:], strict=False) if high - low > PAUSE_S]
    return _merged(spans)


def service_gap(answers: Sequence[Answer]) -> float:
    """Return the most weighted tokens by which one tenant got ahead of another while both had requests that waited."""
    tenants = by_tenant(answers)
    waiting = {name: waits(own) for name, own in tenants.items()}
    curves = {name: _curve(own) for name, own in tenants.items()}
    most = 0.0
    for name in tenants:
        for other in tenants:
            for span in _common(waiting[name], waiting[other]) if name < other else ():
                most = max(most, _range(curves[name], curves[other], span))
    return most


def same_text(answers: Sequence[Answer], others: Sequence[Answer]) -> float:
    """Return the share of requests that were answered with the same text both times; the order has to be the same."""
    pairs = [(a.text, b.text) for a, b in zip(answers, others, strict=True) if a.is_whole and b.is_whole]
    return sum(one == other for one, other in pairs) / len(pairs) if pairs else 0.0


def ratio(
    above: Sequence[Sequence[float]], below: Sequence[Sequence[float]], figure: Callable[[Sequence[float]], float]
) -> Interval:
    """Return a figure of one arm over that of another, of values pooled over rounds.

    The 95 % interval is a bootstrap over rounds, drawn alike for both arms because a round is one time on one machine.
    """

    def over(rounds: Sequence[int]) -> float:
        top, bottom = ([value for number in rounds for value in arm[number]] for arm in (above, below))
        return figure(top) / max(figure(bottom), 1e-9)

    numbers = range(min(len(above), len(below)))
    draw = random.Random(len(numbers))
    drawn = sorted(over(draw.choices(numbers, k=len(numbers))) for _ in range(RESAMPLES // 4))
    cut = len(drawn) // 40
    return Interval(over(numbers), drawn[cut], drawn[-1 - cut])


def middle(values: Sequence[float]) -> float:
    """Return the median, 0 of nothing."""
    return statistics.median(values) if values else 0.0


def _merged(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for low, high in sorted(spans):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _common(one: Sequence[Span], other: Sequence[Span]) -> Iterator[Span]:
    for low, high in one:
        for low2, high2 in other:
            if max(low, low2) < min(high, high2):
                yield max(low, low2), min(high, high2)


def _curve(answers: Sequence[Answer]) -> tuple[list[float], list[float]]:
    """Return when the tenant's service grew, and to what."""
    grows = [(a.first, PROMPT_WEIGHT * a.prompt_tokens) for a in answers if a.first is not None]
    grows += [(at, OUTPUT_WEIGHT * a.tokens_per_piece) for a in answers for at in a.times]
    times, totals, total = [], [], 0.0
    for at, amount in sorted(grows):
        total += amount
        times.append(at)
        totals.append(total)
    return times, totals


def _range(one: tuple[list[float], list[float]], other: tuple[list[float], list[float]], span: Span) -> float:
    """Return how far the difference of two services moved within the span."""

    def at(curve: tuple[list[float], list[float]], when: float) -> float:
        index = bisect.bisect_right(curve[0], when)
        return curve[1][index - 1] if index else 0.0

    whens = [span[0], *(when for when in (*one[0], *other[0]) if span[0] < when <= span[1])]
    differences = [at(one, when) - at(other, when) for when in whens]
    return max(differences) - min(differences)
