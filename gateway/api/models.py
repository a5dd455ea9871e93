"""The lighter routes of the data port: models, tokens, and their counts."""

from typing import Any

from fastapi import APIRouter, Request

from core.errors import NoHealthyWorker, UnknownModel
from engines.driver import Driver
from engines.worker import State
from gateway.api.common import read_body
from gateway.auth import Principal
from gateway.requests import find_model, parse_body
from gateway.services import Services
from routing.catalog import Model


def model_routes(services: Services) -> APIRouter:
    """Return the routes. Each needs a key and shows only what the key may use."""
    router = APIRouter(tags=["models"])

    def identify(request: Request) -> Principal:
        return services.directory.keyring.identify(dict(request.scope["headers"]), services.clock.wall())

    async def list_models(request: Request) -> dict[str, Any]:
        """List the models that the key may use."""
        principal = identify(request)
        models = [model for model in services.catalog.models() if principal.may_use(model.name)]
        return {"object": "list", "data": [_described(model, services) for model in models]}

    async def retrieve_model(model_id: str, request: Request) -> dict[str, Any]:
        """Describe one model, by name or alias; names may hold slashes."""
        principal = identify(request)
        model = services.catalog.find(model_id)
        if model is None or not principal.may_use(model.name):
            raise UnknownModel(f"the model {model_id[:128]!r} does not exist; GET /v1/models lists those that do")
        return _described(model, services)

    async def asked(request: Request) -> tuple[dict[str, Any], Driver]:
        principal = identify(request)
        body = parse_body(await read_body(request, services.settings.server.max_body))
        body.pop("forebay", None)
        model = find_model(body, services.catalog, principal)
        await services.egress.fill(body)
        return {**body, "model": model.name}, _driver_of(model, services)

    async def tokenize(request: Request) -> dict[str, Any]:
        """Return the tokens of `prompt` or `messages`: `{tokens, count, max_model_len}`."""
        body, driver = await asked(request)
        return await driver.tokenize(body)

    async def detokenize(request: Request) -> dict[str, Any]:
        """Return the text of `tokens`: `{prompt}`."""
        body, driver = await asked(request)
        return await driver.detokenize(body)

    async def count_tokens(request: Request) -> dict[str, Any]:
        """Return how many tokens an Anthropic messages body has: `{input_tokens}`."""
        body, driver = await asked(request)
        return await driver.count_tokens(body)

    for prefix in ("/v1", ""):
        in_document = prefix == "/v1"
        router.get(f"{prefix}/models", include_in_schema=in_document)(list_models)
        router.get(f"{prefix}/models/{{model_id:path}}", include_in_schema=in_document)(retrieve_model)
        router.post(f"{prefix}/messages/count_tokens", include_in_schema=in_document)(count_tokens)
        router.post(f"{prefix}/tokenize", include_in_schema=not in_document)(tokenize)
        router.post(f"{prefix}/detokenize", include_in_schema=not in_document)(detokenize)
    return router


def _described(model: Model, services: Services) -> dict[str, Any]:
    workers = [status for status in services.supervisor.statuses() if status.model == model.name]
    contexts = [status.context_tokens for status in workers if status.context_tokens is not None]
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "forebay",
        "max_model_len": min(contexts, default=None),
        "aliases": list(model.aliases),
        "forebay": {"workers": len(workers), "ready": sum(status.state is State.READY for status in workers)},
    }


def _driver_of(model: Model, services: Services) -> Driver:
    for status in services.supervisor.statuses():
        driver = services.supervisor.driver_of(status.id) if status.model == model.name else None
        if driver is not None:
            return driver
    raise NoHealthyWorker(f"no worker of {str(model.name)!r} is running", retry_after=1.0)
