"""What tenants and keys may use, as options on a command line, and as text."""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from gateway.cli.admin import money
from gateway.units import count, num_bytes

F = TypeVar("F", bound=Callable[..., Any])

_NONE = "none"
_BUDGET = re.compile(r"(\d+(?:\.\d+)?) *([kMG]?) *(usd|tokens)/(day|week|month|total)")
_RATES = ("rpm", "tpm", "parallel")
_SIZES = ("body", "schema_size", "pattern")
_CEILINGS = (*_SIZES, "depth", "prompt_tokens", "choices", "top_logprobs", "grammars")
_SWITCHES = {"yes": True, "no": False}


class _Limit(click.ParamType[int | str]):
    name = "number|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if isinstance(value, int):
            return value
        if value == _NONE:
            return _NONE
        try:
            return int(str(count(value)))
        except ValueError:
            return self.fail(f"{value!r} is neither a number such as 60 or 200k, nor `none`", param, ctx)


class _Budget(click.ParamType[dict[str, object] | str]):
    name = "amount/period"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, object] | str:
        if isinstance(value, dict):
            return value
        if value == _NONE:
            return _NONE
        match = _BUDGET.fullmatch(value)
        if match is None or (match[3] == "usd" and match[2]):
            return self.fail(
                f"{value!r} is neither a budget such as 5usd/day or 2Mtokens/month, nor `none`", param, ctx
            )
        amount, factor, unit, period = match.groups()
        return {unit: amount if unit == "usd" else count(amount + factor), "per": period}


class _Ceiling(click.ParamType[tuple[str, int | bool] | str]):
    name = "name=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int | bool] | str:
        if isinstance(value, tuple):
            return value
        if value == _NONE:
            return _NONE
        name, _, text = value.partition("=")
        if name not in _CEILINGS:
            near = difflib.get_close_matches(name, _CEILINGS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_CEILINGS)}"
            return self.fail(f"no ceiling is called {name!r}; {hint}", param, ctx)
        if name == "grammars" and text in _SWITCHES:
            return name, _SWITCHES[text]
        try:
            return name, int(str((num_bytes if name in _SIZES else count)(text)))
        except ValueError:
            example = "grammars=yes" if name == "grammars" else f"{name}={'8MiB' if name in _SIZES else '20'}"
            return self.fail(f"{value!r} makes no sense; write it such as {example}, or `none` for all", param, ctx)


def of_rates(command: F) -> F:
    """Give a verb the options of limits and budgets."""
    options = (
        click.option("--rpm", type=_Limit(), help="Requests in any 60 seconds."),
        click.option("--tpm", type=_Limit(), help="Tokens in any 60 seconds."),
        click.option("--parallel", type=_Limit(), help="Answers open at a time."),
        click.option(
            "--budget", "budgets", type=_Budget(), multiple=True, help="5usd/day, 2Mtokens/month; may be repeated."
        ),
        click.option("--model", "models", multiple=True, help="A model that may be used; may be repeated; '*': all."),
        click.option("--endpoint", "endpoints", multiple=True, help="Likewise: chat, embeddings, …"),
        click.option("--max-class", type=click.Choice(["interactive", "standard", "batch"]), help="The best class."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def of_end_users(command: F) -> F:
    """Give a verb the options of limits of each end user."""
    options = (
        click.option("--end-user-rpm", type=_Limit(), help="Requests of each end user in any 60 seconds."),
        click.option("--end-user-tpm", type=_Limit(), help="Tokens of each end user in any 60 seconds."),
        click.option("--end-user-parallel", type=_Limit(), help="Answers open at a time for each end user."),
        click.option("--end-user-budget", "end_user_budgets", type=_Budget(), multiple=True, help="As --budget."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def of_tenants(command: F) -> F:
    """Give a verb the options that only tenants have: their share, and the largest request."""
    options = (
        click.option(
            "--weight",
            type=click.FloatRange(0.001, 1000),
            help="Its share of an engine, beside the others' (1 each).",
        ),
        click.option(
            "--ceiling",
            "ceilings",
            type=_Ceiling(),
            multiple=True,
            help=f"The largest request: body=8MiB, choices=4, grammars=yes, …; none: the defaults. "
            f"There are {', '.join(_CEILINGS)}.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def terms_from(given: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Return the terms that the options ask for and only these, as the API takes them; ``old``: those until now."""
    terms: dict[str, Any] = {}
    for name in ("models", "endpoints"):
        if given.get(name):
            terms[name] = list(given[name])
    if given.get("max_class"):
        terms["max_class"] = given["max_class"]
    if given.get("weight") is not None:
        terms["weight"] = given["weight"]
    if ceilings := given.get("ceilings"):
        of_its_own = {**(old.get("ceilings") or {}), **dict(one for one in ceilings if one != _NONE)}
        terms["ceilings"] = None if _NONE in ceilings else of_its_own
    terms |= _bounds(given, old, "")
    end_users = old.get("end_users") or {}
    if changed := _bounds(given, end_users, "end_user_"):
        terms["end_users"] = {**end_users, **changed}
    return terms


def _bounds(given: Mapping[str, Any], old: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    bounds: dict[str, Any] = {}
    rates = {name: value for name in _RATES if (value := given.get(prefix + name)) is not None}
    if rates:
        new = {name: None if value == _NONE else value for name, value in rates.items()}
        bounds["limits"] = {**(old.get("limits") or {}), **new}
    if budgets := given.get(f"{prefix}budgets"):
        bounds["budgets"] = [budget for budget in budgets if budget != _NONE]
    return bounds


def limits_text(limits: Mapping[str, Any] | None) -> str:
    """Return limits in a line; empty where there are none."""
    return ", ".join(f"{limits[name]} {name}" for name in _RATES if limits and limits.get(name) is not None)


def budgets_text(budgets: list[dict[str, Any]]) -> str:
    """Return budgets in a line; empty where there are none."""
    return ", ".join(f"{amount_text(budget)}/{budget['per']}" for budget in budgets)


def ceilings_text(ceilings: Mapping[str, Any] | None) -> str:
    """Return the largest request in a line; empty where the defaults say it."""
    return ", ".join(f"{name}={_written(value)}" for name, value in (ceilings or {}).items())


def amount_text(amount: Mapping[str, Any]) -> str:
    """Return an amount of tokens or of dollars with its unit."""
    tokens = amount.get("tokens")
    return f"{tokens} tokens" if tokens is not None else f"{money(amount.get('usd'))} USD"


def _written(value: int | bool) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
