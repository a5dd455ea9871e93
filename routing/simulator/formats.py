"""The files that traces come in: Azure's and BurstGPT's CSV, Mooncake's and the 27 tenants' JSONL. Lines in, trace out.

Files are opened elsewhere. All readers raise ``BadTrace`` with the number of the line that is wrong.
"""

import csv
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

import msgspec

from core.ids import TenantId
from routing.simulator.trace import Arrival, BadTrace, Trace, trace, zipf_tenants

NUM_TENANTS = 27
"""Tenants that requests without one are spread over: as many as the one public trace with tenants has."""


def azure(lines: Iterable[str], num_tenants: int = NUM_TENANTS, seed: int = 1) -> Trace:
    """Read ``TIMESTAMP,ContextTokens,GeneratedTokens``; tenants by Zipf(1.0) with the seed, as the file names none."""
    draw = zipf_tenants(num_tenants, seed)

    def row(one: dict[str, str]) -> Arrival:
        return Arrival(
            at=_seconds(one["TIMESTAMP"]),
            tenant=draw(),
            prompt=_at_least_one(one["ContextTokens"]),
            output=int(one["GeneratedTokens"]),
        )

    note = f"Azure LLM inference trace; {num_tenants} tenants assigned by Zipf(1.0), seed {seed}"
    return trace("azure", _csv("azure", lines, row), note)


def burstgpt(lines: Iterable[str], num_tenants: int = NUM_TENANTS, seed: int = 1) -> Trace:
    """Read BurstGPT's columns: Timestamp, Session ID, Request tokens, Response tokens. A response of 0 is a failure.

    A session is one program of one tenant, drawn by Zipf(1.0) with the seed; rows without a session are one each.
    """
    draw = zipf_tenants(num_tenants, seed)
    owners: dict[str, TenantId] = {}

    def row(one: dict[str, str]) -> Arrival:
        session = one.get("Session ID", "").strip()
        tenant = _owner(owners, session, draw) if session else draw()
        return Arrival(
            at=_seconds(one["Timestamp"]),
            tenant=tenant,
            prompt=_at_least_one(one["Request tokens"]),
            output=int(float(one["Response tokens"])),
            program=session,
        )

    note = f"BurstGPT's schema; {num_tenants} tenants assigned to sessions by Zipf(1.0), seed {seed}"
    return trace("burstgpt", _csv("burstgpt", lines, row), note)


def mooncake(lines: Iterable[str], num_tenants: int = NUM_TENANTS, seed: int = 1) -> Trace:
    """Read ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids`` of blocks of 512 tokens.

    All requests share the first block; where the second is the same, so is the conversation. A conversation is one
    program of one tenant, drawn by Zipf(1.0) with the seed.
    """
    draw = zipf_tenants(num_tenants, seed)
    owners: dict[str, TenantId] = {}

    def row(one: dict[str, Any]) -> Arrival:
        blocks = tuple(one["hash_ids"])
        conversation = str(blocks[1] if len(blocks) > 1 else blocks[:1])
        return Arrival(
            at=one["timestamp"] / 1000,
            tenant=_owner(owners, conversation, draw),
            prompt=max(1, one["input_length"]),
            output=one["output_length"],
            blocks=blocks[: one["input_length"] // 512],  # the last one is not full: nobody shares it
            program=conversation,
        )

    note = f"Mooncake conversations; {num_tenants} tenants assigned to them by Zipf(1.0), seed {seed}"
    return trace("mooncake", _jsonl("mooncake", lines, row), note)


def tenants(lines: Iterable[str]) -> Trace:
    """Read ``t_s``, ``tenant``, ``prompt_tokens``, ``output_tokens``: the tenants are the file's own."""

    def row(one: dict[str, Any]) -> Arrival:
        return Arrival(
            at=float(one["t_s"]),
            tenant=TenantId(one["tenant"]),
            prompt=max(1, one["prompt_tokens"]),
            output=one["output_tokens"],
        )

    return trace("tenants", _jsonl("tenants", lines, row), "tenants, arrivals and lengths as in the file")


_WITH_DRAWN_TENANTS = {"azure": azure, "burstgpt": burstgpt, "mooncake": mooncake}

NAMES = (*_WITH_DRAWN_TENANTS, "tenants")
"""The formats that are read here."""


def read(name: str, lines: Iterable[str], seed: int) -> Trace:
    """Return the trace in lines of the format of this name (``NAMES``); ``seed``: for tenants that have to be drawn."""
    return tenants(lines) if name == "tenants" else _WITH_DRAWN_TENANTS[name](lines, seed=seed)


def recognise(first_line: str) -> str | None:
    """Return the name of the reader for a file that begins so; None if it is of none."""
    for name, mark in (("azure", "ContextTokens"), ("burstgpt", "Request tokens"), ("mooncake", '"hash_ids"')):
        if mark in first_line:
            return name
    return "tenants" if '"t_s"' in first_line else None


def _csv(name: str, lines: Iterable[str], row: Callable[[dict[str, str]], Arrival]) -> Iterator[Arrival]:
    for number, one in enumerate(csv.DictReader(lines), start=2):
        try:
            yield row(one)
        except (KeyError, TypeError, ValueError) as error:
            raise BadTrace(f"{name}: line {number} is not of the format: {error}") from error


def _jsonl(name: str, lines: Iterable[str], row: Callable[[dict[str, Any]], Arrival]) -> Iterator[Arrival]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield row(msgspec.json.decode(line))
        except (KeyError, TypeError, ValueError, msgspec.DecodeError) as error:
            raise BadTrace(f"{name}: line {number} is not of the format: {error}") from error


def _seconds(text: str) -> float:
    """Seconds as a number, or a date and time; Azure's has seven digits after the point."""
    try:
        return float(text)
    except ValueError:
        whole, _, fraction = text.partition(".")
        return (datetime.fromisoformat(whole) - datetime(2000, 1, 1)).total_seconds() + float(f"0.{fraction or 0}")


def _at_least_one(text: str) -> int:
    return max(1, int(float(text)))


def _owner(owners: dict[str, TenantId], key: str, draw: Callable[[], TenantId]) -> TenantId:
    if key not in owners:
        owners[key] = draw()
    return owners[key]
