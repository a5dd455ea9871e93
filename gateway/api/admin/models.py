"""Models: their price, names, workers, and how busy they are."""

from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import Field

from core.errors import UnknownId
from engines.worker import State
from gateway.api.admin.document import errors
from gateway.api.admin.guard import guarded
from gateway.api.admin.pages import After, Limit, Page, page_of
from gateway.api.admin.shapes import Shape, shown_usd
from gateway.services import Services
from gateway.tenants import price_of
from routing.catalog import Model

Decimal = Annotated[str, Field(pattern=r"^\d+(\.\d+)?$")]
_TOKENS_PRICED = 1_000_000


class PriceShape(Shape):
    """US dollars per million tokens. `cached_input_usd` null: a cached part of a prompt costs what any part does."""

    input_usd: Decimal
    output_usd: Decimal
    cached_input_usd: Decimal | None


class ModelShape(Shape):
    """A model on offer. `ready` and `healthy` count workers; `running` and `waiting` count requests, and `slots` how
    many can run at a time."""

    name: str
    aliases: list[str]
    fallbacks: list[str]
    price: PriceShape
    context_tokens: int | None
    workers: list[str]
    ready: int
    healthy: int
    running: int
    waiting: int
    slots: int


def model_routes(services: Services) -> APIRouter:
    """Return the routes of models."""
    router = APIRouter(prefix="/admin/v1/models", tags=["models"], route_class=guarded(services))

    @router.get("", responses=errors())
    async def list_models(limit: Limit = 50, after: After = None) -> Page[ModelShape]:
        """List the models on offer, by name."""
        page, following = page_of(services.live.catalog.models(), lambda model: model.name, after, limit)
        return Page(data=[_shown(model, services) for model in page], next=following)

    @router.get("/{model:path}", responses=errors(404))
    async def show_model(model: Annotated[str, Path(max_length=160)]) -> ModelShape:
        """Show one model, by its name or an alias; names may hold slashes."""
        found = services.live.catalog.find(model)
        if found is None:
            raise UnknownId(f"there is no model {model[:128]!r}; GET /admin/v1/models lists them", code="unknown_model")
        return _shown(found, services)

    return router


def _shown(model: Model, services: Services) -> ModelShape:
    workers = [status for status in services.supervisor.statuses() if status.model == model.name]
    ready = [status for status in workers if status.state is State.READY]
    contexts = [status.context_tokens for status in workers if status.context_tokens is not None]
    price = price_of(services.live.settings.models[model.name].price)
    cached = price.cached_input
    return ModelShape(
        name=model.name,
        aliases=list(model.aliases),
        fallbacks=list(model.fallbacks),
        price=PriceShape(
            input_usd=shown_usd(price.input * _TOKENS_PRICED),
            output_usd=shown_usd(price.output * _TOKENS_PRICED),
            cached_input_usd=None if cached is None else shown_usd(cached * _TOKENS_PRICED),
        ),
        context_tokens=min(contexts, default=None),
        workers=[status.id for status in workers],
        ready=len(ready),
        healthy=sum(status.healthy for status in ready),
        running=sum(services.dispatcher.num_running(status.id) for status in workers),
        waiting=services.dispatcher.num_waiting(model.name),
        slots=sum(status.max_inflight for status in ready),
    )
