"""Who pays for what an engine did: the tenant once for its prompt and its answer, nobody or the budget for the rest.

A prompt is charged by estimate when its first leg starts, and settled when the engine tells what it computed. What is
computed again is *waste* after a cut by our choice, and *lost* after a failure; only who kept an engine waiting for
its reader pays for it.
"""

from routing.fairness.line import Line
from routing.scheduler.state import Leg, Request


def charge_prompt(line: Line, request: Request) -> None:
    """The request's first leg on this model starts."""
    if request.charged is None:
        request.charged = request.prompt_tokens or 1  # what costs nothing would keep its turn for ever
        _charge(line, request, request.charged)


def charge_tokens(line: Line, request: Request, num: int) -> None:
    """So many tokens of the answer were delivered."""
    amount = num * line.output_price
    request.spent += amount
    request.account.charge(amount)
    line.waste.earn(num, line.fairness)


def settle_prompt(line: Line, leg: Leg, prefilled: int) -> None:
    """The engine tells what it computed for the leg's prompt: settle who pays, and learn from it. Once for a leg."""
    if leg.is_told:
        return
    leg.is_told = True
    request = leg.request
    leg.worker.cost.computed(prefilled)
    if leg.first_at is not None:
        leg.worker.pace.observe_prefill(prefilled, leg.first_at - leg.started_at)
    if leg.resumed:
        leg.worker.resume_cost.observe(leg.context, prefilled, is_home=leg.is_home)
        pay_again(line, leg, prefilled)
    elif not request.is_settled:
        request.is_settled = True
        leg.worker.observe_prompt(leg.context, prefilled)
        assert request.charged is not None
        _charge(line, request, prefilled - request.charged)
        request.charged = prefilled
        line.turns.changed(request.account)
        earn_prompt(line, request, prefilled)


def expect_again(line: Line, leg: Leg) -> None:
    """The leg goes on, or is over, and its engine has not told what it computed again: what it was expected to is paid
    for now, and what it tells later makes the difference."""
    if leg.resumed and leg.has_begun and not leg.is_told and not leg.again:
        pay_again(line, leg, leg.worker.resume_cost.tokens(leg.context, is_home=leg.is_home))


def pay_again(line: Line, leg: Leg, tokens: int) -> None:
    """So many tokens were computed again for a leg that goes on."""
    request = leg.request
    release_owed(line, request)
    more, leg.again = tokens - leg.again, tokens
    if leg.pays_again:
        _charge(line, request, more)
        line.turns.changed(request.account)
    elif leg.goes_on_after in {"preempted", "migrated"}:
        line.waste.spend(more)
    else:
        line.waste.lost += more


def owe(line: Line, request: Request, tokens: int) -> None:
    """So many tokens will probably be computed again, because of a cut: the budget for waste is held to that."""
    release_owed(line, request)
    request.owed = tokens
    line.waste.held += tokens


def release_owed(line: Line, request: Request) -> None:
    """What was held for the request is known now, or will never be."""
    line.waste.held -= request.owed
    request.owed = 0


def earn_prompt(line: Line, request: Request, tokens: int) -> None:
    """That many tokens of the request's prompt were of use."""
    line.waste.earn(tokens - request.earned, line.fairness)
    request.earned = tokens


def _charge(line: Line, request: Request, tokens: int) -> None:
    amount = tokens * line.prompt_price
    request.spent += amount
    request.account.charge(amount)
