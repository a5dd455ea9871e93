"""The admin port's application, put together."""

from importlib.metadata import version

from fastapi import FastAPI

from gateway.api.admin.audit import audit_routes
from gateway.api.admin.budgets import budget_routes
from gateway.api.admin.config import config_routes
from gateway.api.admin.document import describe
from gateway.api.admin.erasure import erasure_routes
from gateway.api.admin.fairness import fairness_routes
from gateway.api.admin.hosts import WithHostCheck
from gateway.api.admin.keys import key_routes
from gateway.api.admin.models import model_routes
from gateway.api.admin.policies import policy_routes
from gateway.api.admin.requests import request_routes
from gateway.api.admin.system import system_routes
from gateway.api.admin.tenants import tenant_routes
from gateway.api.admin.usage import usage_routes
from gateway.api.admin.workers import worker_routes
from gateway.api.common import WithRequestId, speak_our_errors
from gateway.api.health import health_routes
from gateway.services import Services

_RESOURCES = (
    system_routes,
    model_routes,
    worker_routes,
    tenant_routes,
    erasure_routes,
    key_routes,
    budget_routes,
    usage_routes,
    request_routes,
    config_routes,
    policy_routes,
    fairness_routes,
    audit_routes,
)


def admin_app(services: Services) -> WithRequestId:
    """Return the application of the admin port."""
    app = FastAPI(title="Forebay admin", version=version("forebay-server"), redoc_url=None, redirect_slashes=False)
    app.include_router(health_routes(services))
    for routes in _RESOURCES:
        app.include_router(routes(services))
    speak_our_errors(app)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    settings = services.live.settings.admin
    return WithRequestId(WithHostCheck(app, (settings.host, *settings.allowed_hosts)))
