"""The models this gateway offers, by name and alias."""

from collections.abc import Mapping

import msgspec

from core.chat import Timeouts
from core.ids import ModelName


class Model(msgspec.Struct, frozen=True):
    """One model. ``fallbacks`` are tried in order when none of its workers could answer before the first byte."""

    name: ModelName
    aliases: tuple[str, ...] = ()
    fallbacks: tuple[ModelName, ...] = ()
    timeouts: Timeouts = Timeouts()
    created: int = 0
    context_tokens: int | None = None


class Catalog:
    """All models. Immutable."""

    def __init__(self, models: tuple[Model, ...]) -> None:
        self._models = {model.name: model for model in models}
        self._by_name: Mapping[str, Model] = {name: model for model in models for name in (model.name, *model.aliases)}

    def find(self, name: str) -> Model | None:
        """Return the model of this name or alias."""
        return self._by_name.get(name)

    def models(self) -> tuple[Model, ...]:
        """Return all models in the order of the file."""
        return tuple(self._models.values())

    def names(self) -> tuple[str, ...]:
        """Return every name and alias, for messages."""
        return tuple(self._by_name)
