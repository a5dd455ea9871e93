"""``forebay fairness``: how models are shared between tenants at this moment."""

from typing import Any

import click

from gateway.cli.admin import Admin, as_json, asks, at, fields, listed, report


@click.command()
@click.argument("model", required=False)
@asks
@as_json
def fairness(admin: Admin, model: str | None, *, as_json: bool) -> None:
    """Show how models are shared; for one MODEL also who waits and who has had how much.

    Tokens are weighted: one of a prompt counts 1, one of an answer 2, unless the settings say otherwise. SERVED is
    what a tenant has had in all. COUNTER is that by its weight, lifted when it was away for a while: the lowest is
    served next. CREDIT is by how much it may begin behind the others when it comes back. PREEMPTED, MOVED, DRAINED and
    RECOVERED count answers that went on later or elsewhere; WASTED are the tokens that were computed again for it, and
    while WASTE LEFT is not above 0, nothing is preempted. `forebay policies get fairness` shows the rules.

    \b
    Examples:
      forebay fairness
      forebay fairness smollm2
    """
    if model is None:
        found = admin.items(at("fairness"))
        report(found, as_json=as_json, text=lambda: listed(_MODELS, found, _model_row, none="no models"))
        return
    one = admin.value(admin.get(at("fairness", *model.split("/")), limit=_MOST))  # names may hold slashes
    report(one, as_json=as_json, text=lambda: _told(one))


_MOST = 50
_MODELS = [
    "MODEL",
    "POLICY",
    "WAITING",
    "TENANTS",
    "PREEMPTED",
    "MOVED",
    "DRAINED",
    "RECOVERED",
    "WASTED",
    "WASTE LEFT",
]
_TENANTS = ["TENANT", "WEIGHT", "WAITING", "RUNNING", "SERVED", "COUNTER", "CREDIT"]


def _model_row(one: dict[str, Any]) -> list[object]:
    return [
        one["model"],
        one["policy"],
        one["queued"],
        one["tenants"],
        one["preemptions"],
        one["migrations"],
        one["drained"],
        one["recovered"],
        one["wasted_tokens"],
        f"{one['waste_left']:.0f}",
    ]


def _told(one: dict[str, Any]) -> str:
    useful = one["useful_tokens"]
    share = f" ({one['wasted_tokens'] / useful:.1%} of {useful} useful ones)" if useful else ""
    facts = fields(
        {
            "model": one["model"],
            "policy": one["policy"],
            "decided by": f"gateway {one['holder']}, {one['age_s']:.1f} s ago" if one["holder"] else "this gateway",
            "waiting": one["queued"],
            "slots kept": one["reserved"],
            "preempted": one["preemptions"],
            "moved": f"{one['migrations']} to workers with less to do, {one['drained']} off draining ones",
            "recovered": f"{one['recovered']} after failures, {one['lost_tokens']} tokens computed again",
            "wasted tokens": f"{one['wasted_tokens']}{share}",
            "may be wasted": f"{one['waste_left']:.0f} tokens more",
        }
    )
    hidden = one["tenants"] - len(one["shares"])
    more = f"\nand {hidden} more, who wait for nothing" if hidden > 0 else ""
    return f"{facts}\n\n{listed(_TENANTS, one['shares'], _tenant_row, none='no tenants yet')}{more}"


def _tenant_row(one: dict[str, Any]) -> list[object]:
    return [
        one["tenant"],
        f"{one['weight']:g}",
        one["queued"],
        one["running"],
        f"{one['attained']:.0f}",
        f"{one['counter']:.0f}",
        f"{one['credit']:.0f}",
    ]
