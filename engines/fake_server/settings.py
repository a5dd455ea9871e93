"""The command line of the fake engine."""

import argparse
import os
from dataclasses import dataclass
from typing import Any

import msgspec

from engines.fake_server.faults import Faults, parse_faults


@dataclass(frozen=True, slots=True)
class Settings:
    """How this engine was started."""

    host: str
    port: int
    models: tuple[str, ...]
    tokens: int
    max_model_len: int
    slots: int | None
    ttft_s: float
    itl_s: float
    prefill_s_per_token: float
    start_delay_s: float
    api_key: str | None
    salt: str
    glyphs: bool
    begins_anew: bool
    dims: int
    exit_at_start: int | None
    ignore_sigterm: bool
    spawn_child: bool
    exit_on_stdin_eof: bool
    faults: Faults


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engines.fake_server", description="a deterministic fake engine")
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=0, help="0 takes a free one; the ready line tells which")
    add("--model", action="append", help="a served model name; may be repeated")
    add("--tokens", type=int, default=32, help="length of an answer that nothing else ends")
    add("--max-model-len", type=int, default=32768)
    add("--slots", type=int, help="requests that run at once; others queue")
    add("--ttft-ms", type=float, default=0.0)
    add("--itl-ms", type=float, default=0.0)
    add("--prefill-us-per-token", type=float, default=0.0, help="added to TTFT for each token not in the prefix cache")
    add("--start-delay-s", type=float, default=0.0, help="503 everywhere until then")
    add("--api-key", default=os.environ.get("FAKE_API_KEY"))
    add("--salt", default="", help="engines with different salts answer differently")
    add("--glyphs", action="store_true", help="answers have words whose characters are spread over tokens")
    add("--begins-anew", action="store_true", help="an answer that is given to be continued is written from its start")
    add("--dims", type=int, default=64, help="length of an embedding")
    add("--exit-at-start", type=int, metavar="CODE")
    add("--ignore-sigterm", action="store_true")
    add("--spawn-child", action="store_true", help="start a sleeping process that outlives this one")
    add("--exit-on-stdin-eof", action="store_true", help="die with the process that holds the other end of stdin")
    return parser


def _add_fault_flags(parser: argparse.ArgumentParser) -> list[str]:
    group = parser.add_argument_group("faults", "see engines/fake_server/faults.py")
    names = []
    for field in msgspec.structs.fields(Faults):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            group.add_argument(flag, action="store_true", default=argparse.SUPPRESS)
        else:
            group.add_argument(flag, type=_scalar(field.type), default=argparse.SUPPRESS)
        names.append(field.name)
    return names


def _scalar(annotation: Any) -> type:
    if annotation is str:
        return str
    return int if annotation == int | None else float


def parse_args(argv: list[str]) -> Settings:
    """Return the settings of a command line; exits with a usage message if it is wrong."""
    parser = _parser()
    fault_names = _add_fault_flags(parser)
    given = vars(parser.parse_args(argv))
    faults = parse_faults({name: given.pop(name) for name in fault_names if name in given})
    return Settings(
        models=tuple(given.pop("model") or ["fake"]),
        ttft_s=given.pop("ttft_ms") / 1e3,
        itl_s=given.pop("itl_ms") / 1e3,
        prefill_s_per_token=given.pop("prefill_us_per_token") / 1e6,
        faults=faults,
        **given,
    )
