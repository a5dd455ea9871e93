"""``forebay run``: from nothing to a model that answers, in one command."""

import asyncio
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from engines.worker import State
from gateway.app import Ready
from gateway.auth import new_admin_key, new_key
from gateway.cli import plan
from gateway.cli.common import (
    ADMIN_KEY,
    ADMIN_PORT,
    DATA_PORT,
    LOCAL_KEY,
    Fault,
    SettingsFault,
    kept_key,
    program,
    state_dir,
)
from gateway.cli.doctor import find_vllm
from gateway.cli.fetching import with_local_sources
from gateway.cli.http import Unreachable, ask
from gateway.cli.machine import Advice, advise, best_gpu, default_threads, gpus, num_cores, ram_gib
from gateway.cli.serving import ensure_ports_free, serve_settings
from gateway.cli.welcome import welcome
from gateway.live import Live
from gateway.settings import Declared, SettingsError, declare, environment

_PATIENCE_S = 30.0

_NO_VLLM = """no `vllm` program found. Install vLLM in an environment of its own and put it on PATH:
  python3 -m venv ~/vllm && ~/vllm/bin/pip install vllm && export PATH="$HOME/vllm/bin:$PATH"
Without a GPU, run a GGUF by llama.cpp instead: forebay run Qwen/Qwen2.5-1.5B-Instruct-GGUF"""


@click.command()
@click.argument("model", required=False)
@click.option(
    "--engine",
    type=click.Choice([plan.LLAMACPP, plan.VLLM]),
    help="What runs MODEL.  [default: llamacpp]",
)
@click.option("--base-url", help="Attach to this OpenAI-compatible server instead of starting an engine.")
@click.option("--key-env", metavar="NAME", help="The environment variable with that server's key.")
@click.option(
    "--model", "names", multiple=True, help="With --base-url: a model to offer; may be given again.  [default: all]"
)
@click.option("--port", default=DATA_PORT, show_default=True, type=click.IntRange(0, 65535), help="For applications.")
@click.option(
    "--admin-port", default=ADMIN_PORT, show_default=True, type=click.IntRange(0, 65535), help="For operators."
)
@click.option("--slots", type=click.IntRange(1, 4096), help="Requests at a time.  [default: 4; vllm: 64]")
@click.option(
    "--context", type=click.IntRange(64), help="Tokens per request, prompt and answer.  [default: 2048; vllm: 8192]"
)
@click.option("--threads", type=click.IntRange(1, 1024), help="For llama.cpp.  [default: half the cores]")
def run(  # noqa: PLR0917 - one parameter per option; click passes them by name
    model: str | None,
    engine: str | None,
    base_url: str | None,
    key_env: str | None,
    names: tuple[str, ...],
    port: int,
    admin_port: int,
    slots: int | None,
    context: int | None,
    threads: int | None,
) -> None:
    """Run MODEL and serve it: `smollm2` (the default), a .gguf file, or a hub repository.

    With --base-url, serve what a running vLLM or any OpenAI-compatible provider offers.

    \b
    Examples:
      forebay run
      forebay run ./my-model.gguf --context 8192
      forebay run Qwen/Qwen2.5-3B-Instruct-GGUF
      forebay run Qwen/Qwen2.5-7B-Instruct --engine vllm
      forebay run --base-url http://localhost:8000/v1
      forebay run --base-url https://api.openai.com/v1 --key-env OPENAI_API_KEY --model gpt-4o-mini
    """
    env = environment()
    advice = None
    if base_url is not None:
        _refuse_with_base_url(MODEL=model, engine=engine, context=context, threads=threads)
        section = _attach(base_url, key_env, list(names), slots, env)
    else:
        if key_env or names:
            raise click.UsageError(
                "--key-env and --model go with --base-url; a model to start is given without --model"
            )
        wanted = model or plan.DEFAULT_MODEL
        chosen = _plan(wanted, engine or plan.LLAMACPP, slots=slots, context=context, threads=threads)
        section = plan.launched(chosen)
        advice = _advice() if wanted == plan.DEFAULT_MODEL else None
    _serve(section, env, port=port, admin_port=admin_port, advice=advice)


def _refuse_with_base_url(**options: object) -> None:
    for name, value in options.items():
        if value is not None:
            shown = name if name.isupper() else f"--{name}"
            raise click.UsageError(
                f"{shown} does not go with --base-url: that server has its own; name models by --model"
            )


def _plan(model: str, engine: str, *, slots: int | None, context: int | None, threads: int | None) -> plan.Plan:
    device: tuple[int, ...] = ()
    if engine == plan.VLLM:
        if model == plan.DEFAULT_MODEL or model.startswith("pypi:") or model.endswith(".gguf"):
            raise SettingsFault(f"vLLM wants a hub repository or a folder with safetensors, not {model!r}")
        if find_vllm() is None:
            raise Fault(_NO_VLLM)
        best = best_gpu(gpus())
        device = () if best is None else (best.index,)
    elif threads is None:
        threads = default_threads(num_cores())
    return plan.plan_launch(model, engine, slots=slots, context=context, threads=threads, gpus=device)


def _advice() -> Advice:
    return advise(memory_gib=ram_gib(), cores=num_cores(), found=gpus())


def _attach(
    base_url: str, key_env: str | None, names: list[str], slots: int | None, env: Mapping[str, str]
) -> dict[str, Any]:
    key = env.get(key_env) if key_env else None
    if key_env and not key:
        raise SettingsFault(f"the environment variable {key_env} is not set; `export {key_env}=…` first")
    offered = names or _offered(base_url, key)
    return plan.attached(base_url, offered, key_env=key_env, max_inflight=slots)


def _offered(base_url: str, key: str | None) -> list[str]:
    """Return the models that a server says it has. Raises ``Fault``."""
    url = base_url.rstrip("/").removesuffix("/v1") + "/v1/models"
    try:
        answer = ask("GET", url, key)
    except Unreachable as error:
        raise Fault(f"nobody answers at {url}: {error}. Is the server running?") from error
    if answer.status in {401, 403}:
        raise Fault(f"{url} wants another key ({answer.error_message()}). Name its variable by --key-env.")
    if answer.status != 200:
        raise Fault(f"{url} answers with status {answer.status}. Name the models by --model NAME.")
    models = plan.usable_models(answer.json())
    if not models:
        raise Fault(f"{url} lists no models. Name them by --model NAME.")
    return models


def _serve(
    section: dict[str, Any], env: Mapping[str, str], *, port: int, admin_port: int, advice: Advice | None
) -> None:
    state = state_dir(env)
    key = kept_key(state, LOCAL_KEY, new_key)
    declared = _declared(section, env, state=state, key=key, port=port, admin_port=admin_port)
    ensure_ports_free(declared.settings)

    def text(ready: Ready) -> str:
        return welcome(
            data_url=ready.data_url,
            admin_url=ready.admin_url,
            key=key,
            models=list(section),
            advice=advice,
            program=program(),
        )

    with_local_sources(declared.settings, env)
    click.echo(f"Starting {', '.join(list(section)[:8])} ...", err=True)
    announcer = Announcer(text)
    serve_settings(Live(declared), on_ready=announcer)
    if announcer.failure is not None:
        raise Fault(announcer.failure)


class Announcer:
    """Prints a text once every worker is ready; ends the server, with ``failure`` set, if one fails to start."""

    def __init__(self, text: Callable[[Ready], str]) -> None:
        self._text = text
        self._task: asyncio.Task[None] | None = None
        self.failure: str | None = None

    def __call__(self, ready: Ready) -> None:
        """Begin to wait for the workers; called in the server's event loop."""
        self._task = asyncio.get_running_loop().create_task(self._announce(ready))

    async def _announce(self, ready: Ready) -> None:
        supervisor = ready.services.supervisor
        settled = asyncio.gather(*(supervisor.settled(status.id) for status in supervisor.statuses()))
        while True:
            done, _ = await asyncio.wait([settled], timeout=_PATIENCE_S)
            if done:
                break
            waiting = [status.id for status in supervisor.statuses() if status.state is not State.READY]
            click.echo(f"Not ready yet: {', '.join(waiting[:8])}; see `forebay workers logs {waiting[0]}`", err=True)
        failed = next((status for status in settled.result() if status.state is State.FAILED), None)
        if failed is None:
            click.echo(self._text(ready))
            return
        self.failure = f"{failed.id} did not start: {failed.last_error or 'no reason given'}"
        signal.raise_signal(signal.SIGTERM)  # the orderly way out


def _declared(
    section: dict[str, Any], env: Mapping[str, str], *, state: Path, key: str, port: int, admin_port: int
) -> Declared:
    tree = plan.tree(
        section,
        state=state,
        local_key=key,
        admin_key=kept_key(state, ADMIN_KEY, new_admin_key),
        port=port,
        admin_port=admin_port,
    )
    try:
        return declare(tree, env, origin="forebay run")
    except SettingsError as error:
        raise SettingsFault(str(error)) from error
