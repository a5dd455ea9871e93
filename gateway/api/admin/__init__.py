"""The admin port, ``/admin/v1``: always with a key and a role, on loopback too.

One module per resource. ``access.py`` says which role each route needs; ``guard.py`` holds every route to it, bounds
bodies and records changes; ``hosts.py`` keeps pages of other sites out; ``document.py`` makes the document exact.
"""

from gateway.api.admin.app import admin_app

__all__ = ["admin_app"]
