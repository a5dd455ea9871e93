"""What an operator writes of tenants and keys, turned into the core's values."""

import difflib

from core.errors import InvalidRequest
from core.ids import ModelName
from gateway.tenants import models_of
from routing.catalog import Catalog


def models_in(names: list[str], catalog: Catalog) -> frozenset[ModelName] | None:
    """Return the models of an allow-list, aliases resolved; None for ``*``. Raises ``InvalidRequest``."""
    for name in names:
        if name != "*" and catalog.find(name) is None:
            near = difflib.get_close_matches(name, catalog.names(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; GET /admin/v1/models lists them"
            raise InvalidRequest(f"no model is called {name!r}{hint}", param="models", code="unknown_model")
    return models_of(names, catalog)
