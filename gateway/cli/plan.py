"""From the options of ``forebay run`` to a settings tree. Pure: nothing is fetched or asked here."""

import re
from pathlib import Path
from typing import Any

import msgspec

DEFAULT_MODEL = "smollm2"
LLAMACPP = "llamacpp"
VLLM = "vllm"
MAX_ATTACHED = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
# Names of 4-bit and other quantisations, as files and repositories bear them at the end.
_QUANTISATION = re.compile(r"[-._]((i?q\d\w*)|[bf]\d\d|gguf)$", re.IGNORECASE)


class Plan(msgspec.Struct, frozen=True):
    """One model to launch. ``context`` is per request."""

    name: str
    engine: str
    source: str
    slots: int
    context: int
    threads: int | None
    aliases: tuple[str, ...] = ()
    gpus: tuple[int, ...] = ()


def model_name(source: str) -> str:
    """Return a short lower-case name for a source: a file's, or a repository's, without its quantisation."""
    tail = re.split(r"==", source.removeprefix("pypi:"))[0].rstrip("/").rsplit("/", 1)[-1].split(":")[0]
    tail = re.sub(r"\.gguf$", "", tail, flags=re.IGNORECASE)
    while shorter := _QUANTISATION.sub("", tail):
        if shorter == tail:
            break
        tail = shorter
    return re.sub(r"[^a-z0-9._-]+", "-", tail.lower()).strip("-._")[:100] or "model"


def plan_launch(
    model: str,
    engine: str,
    *,
    slots: int | None,
    context: int | None,
    threads: int | None,
    gpus: tuple[int, ...],
) -> Plan:
    """Return what to launch for MODEL, with the engine's own defaults for what was not said.

    vLLM shares its memory between requests, so that many slots and a longer context cost nothing; llama.cpp reserves
    the product of the two.
    """
    name = model_name(model)
    is_vllm = engine == VLLM
    is_hub_id = "/" in model and not Path(model).exists() and _NAME.fullmatch(model) is not None
    return Plan(
        name=name,
        engine=engine,
        source=model,
        slots=slots or (64 if is_vllm else 4),
        context=context or (8192 if is_vllm else 2048),
        threads=threads,
        aliases=(model,) if is_hub_id and model != name else (),
        gpus=gpus if is_vllm else (),
    )


def launched(plan: Plan) -> dict[str, Any]:
    """Return the ``models`` section that launches the plan."""
    launch: dict[str, Any] = {"source": plan.source, "slots": plan.slots, "context": plan.context}
    if plan.threads is not None:
        launch["threads"] = plan.threads
    if plan.gpus:
        launch["gpus"] = list(plan.gpus)
    worker = {"engine": plan.engine, "launch": launch}
    return {plan.name: {"aliases": list(plan.aliases), "workers": [worker]}}


def attached(url: str, models: list[str], *, key_env: str | None, max_inflight: int | None) -> dict[str, Any]:
    """Return the ``models`` section that passes these models on to ``url``; the key stays in the environment."""
    worker: dict[str, Any] = {"engine": "openai", "url": url}
    if max_inflight is not None:
        worker["max_inflight"] = max_inflight
    if key_env:
        worker["key"] = f"${{{key_env}}}"
    return {name: {"workers": [{**worker, "served_name": name}]} for name in models}


def usable_models(listed: object) -> list[str]:
    """Return the names in an answer to ``GET /v1/models`` that can be offered, at most ``MAX_ATTACHED``."""
    data = listed.get("data") if isinstance(listed, dict) else None
    entries = data if isinstance(data, list) else []
    names = [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    return [name for name in dict.fromkeys(names) if _NAME.fullmatch(name)][:MAX_ATTACHED]


def tree(
    models: dict[str, Any],
    *,
    state: Path,
    local_key: str,
    admin_key: str,
    port: int,
    admin_port: int,
) -> dict[str, Any]:
    """Return the whole settings tree of ``forebay run``: loopback ports, one local tenant, these models."""
    return {
        "state_dir": str(state),
        "server": {"port": port},
        "admin": {"port": admin_port},
        "admin_key": admin_key,
        "keys": [{"name": "local", "tenant": "local", "key": local_key}],
        "log": {"level": "warning"},
        "models": models,
    }
