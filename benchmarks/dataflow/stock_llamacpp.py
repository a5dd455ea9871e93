"""llama.cpp's server as its users start it: the same build and flags as Forebay's, with llama.cpp's own defaults.

Forebay starts it without the caches that would let one tenant learn what another has asked, and chooses the slots
itself. Whoever talks to the engine directly has the caches that it comes with: prompts are looked for in slots, and a
request gets the slot that holds most of its prompt.

    python -m benchmarks.dataflow.stock_llamacpp --model FILE --port PORT ...     as engines.drivers.llamacpp_server
"""

import argparse
import sys
from typing import Any

from engines.drivers import llamacpp_server

_OWN = ("cache_ram_mib", "cache_idle_slots", "cache_prompt", "slot_prompt_similarity")
_SAFE = llamacpp_server.common_params


def _stock(args: argparse.Namespace, key: str | None) -> Any:
    import xllamacpp  # noqa: PLC0415 - loads native code: not for a command line that is wrong

    params, stock = _SAFE(args, key), xllamacpp.CommonParams()
    for name in _OWN:
        setattr(params, name, getattr(stock, name))
    return params


def main() -> None:
    """Serve until SIGTERM."""
    llamacpp_server.common_params = _stock
    llamacpp_server.main(sys.argv[1:])


if __name__ == "__main__":
    main()
