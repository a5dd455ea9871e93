"""llama.cpp's own HTTP server in a process of its own: ``python -m engines.drivers.llamacpp_server --model …``.

A child process, because a failed assertion in native code kills the process it runs in. The bearer key comes from
the environment variable ``FOREBAY_WORKER_KEY``: an argument could be read by every user of the machine. What is
wrong with the command line, the model file or the port ends it with one line on stderr and exit code 2.
"""

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from engines import gguf

KEY_VARIABLE = "FOREBAY_WORKER_KEY"
_FILES = "/proc/self/fd/"
_FIRST_FILE = 300
REFUSED = 2


class StartError(Exception):
    """The server cannot start as it was told to; the message is one line for the operator."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line. ``--context`` is what one slot may use: the engine is given the product."""
    parser = argparse.ArgumentParser(prog="llamacpp_server", description="llama.cpp's HTTP server, as a worker")
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, default=4, help="requests that run at a time")
    parser.add_argument("--context", type=int, default=2048, help="tokens of one slot, prompt and answer together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alias", help="the model's name on the wire")
    parser.add_argument("--embeddings", action="store_true", help="serve /v1/embeddings too (mean pooling)")
    parser.add_argument("--slot-files", type=int, default=0, help="slots that can be saved at a time, in memory alone")
    parser.add_argument("--batch", type=int, default=256, help="tokens per prefill step")
    parser.add_argument("--chat-template", type=Path, help="Jinja file used in place of the model's own template")
    parser.add_argument("--gpu-layers", type=int, default=-1, help="layers on the GPU, where there is one")
    return parser.parse_args(argv)


def slot_files(num: int) -> tuple[str, ...]:
    """Return the names under which a server started with ``--slot-files num`` saves slots."""
    return tuple(str(_FIRST_FILE + index) for index in range(num))


def _make_slot_files(num: int) -> None:
    """Make files that have no place in any file system: nobody else can open them, and they end with the process."""
    for name in slot_files(num):
        made = os.memfd_create("slot")
        os.dup2(made, int(name), inheritable=False)
        os.close(made)


def check(args: argparse.Namespace) -> None:
    """Raise ``StartError`` for what llama.cpp would report as a page of log, or not at all."""
    for name in ("slots", "context", "threads", "batch"):
        if getattr(args, name) < 1:
            raise StartError(f"--{name} must be at least 1")
    if problem := gguf.problem_with(args.model):
        raise StartError(problem)
    if args.chat_template and not args.chat_template.is_file():
        raise StartError(f"there is no chat template {args.chat_template}")
    _check_port(args.host, args.port)


def _check_port(host: str, port: int) -> None:
    # SO_REUSEADDR as the server itself does it: a socket in TIME_WAIT must not look like a port in use.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise StartError(f"cannot listen on {host}:{port}: {error}") from error


def common_params(args: argparse.Namespace, key: str | None) -> Any:
    """Return llama.cpp's parameters for the command line."""
    import xllamacpp  # noqa: PLC0415 - takes 0.1 s and loads native code: not for a command line that is wrong

    params = xllamacpp.CommonParams()
    params.model.path = str(args.model)
    params.hostnames = [args.host]
    params.port = args.port
    params.n_parallel = args.slots
    params.n_ctx = args.slots * args.context
    params.cpuparams.n_threads = args.threads
    params.cpuparams_batch.n_threads = args.threads
    # A client that goes away is noticed between two steps: short steps make that a matter of a second, not of twenty.
    params.n_batch = params.n_ubatch = args.batch
    params.n_gpu_layers = args.gpu_layers
    # No tenant may learn from a cache what another has asked. The engine's cache of prompts that have lost their slot
    # serves all slots alike, so there is none; a slot's own is used by requests alone that ask for it, which the
    # driver lets them (see ``llamacpp_slots``), and similarity finds nobody a slot.
    params.cache_ram_mib = 0
    params.cache_idle_slots = False
    params.cache_prompt = False
    params.slot_prompt_similarity = 0.0
    params.endpoint_metrics = params.endpoint_slots = params.endpoint_props = True
    params.verbosity = 1  # errors: its warnings and its account of requests quote what these hold (S13)
    params.ui = False
    params.cors_origins = ""
    if key:
        params.api_keys = [key]
    if args.alias:
        params.model_alias = {args.alias}
    if args.chat_template:
        params.chat_template = args.chat_template.read_text()
    if args.slot_files:
        params.slot_save_path = _FILES
    if args.embeddings:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return params


def serve(args: argparse.Namespace, key: str | None) -> NoReturn:
    """Run until SIGTERM or SIGINT. While the model loads, a signal ends the process by its default action."""
    import xllamacpp  # noqa: PLC0415

    _make_slot_files(args.slot_files)
    params = common_params(args, key)
    stops = {signal.SIGTERM, signal.SIGINT}
    try:
        server = xllamacpp.Server(params)
    except Exception as error:
        raise StartError(f"llama.cpp did not start with {args.model}: {error}") from error
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    print(f"listening on {server.listening_address}", file=sys.stderr, flush=True)  # noqa: T201
    signal.sigwait(stops)
    # Not by the destructor: that waits for the step in progress, and there is nothing to save.
    os._exit(0)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, serve; exit code 2 with one line where that cannot be."""
    args = parse_args(argv)
    try:
        check(args)
        serve(args, os.environ.get(KEY_VARIABLE))
    except StartError as error:
        print(f"llamacpp_server: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
