"""Which role each route of the admin port needs: all of it, in one place."""

from collections.abc import Mapping

from core.tenancy import Role

ACCESS: Mapping[str, Role] = {
    # look
    "show_version": "viewer",
    "show_health": "viewer",
    "metrics": "viewer",
    "list_models": "viewer",
    "show_model": "viewer",
    "list_workers": "viewer",
    "show_worker": "viewer",
    "list_tenants": "viewer",
    "show_tenant": "viewer",
    "list_keys": "viewer",
    "show_key": "viewer",
    "list_budgets": "viewer",
    "list_usage": "viewer",
    "list_requests": "viewer",
    "show_request": "viewer",
    "show_decision": "viewer",
    "list_fairness": "viewer",
    "show_fairness": "viewer",
    "show_config": "viewer",
    "diff_config": "viewer",
    "validate_config": "viewer",
    "list_config_revisions": "viewer",
    "show_policy": "viewer",
    "list_policy_revisions": "viewer",
    "diff_policy": "viewer",
    "validate_policy": "viewer",
    # steer workers
    "act_on_worker": "operator",
    "read_worker_log": "operator",
    # change how the gateway behaves
    "reload_config": "policy",
    "apply_config": "policy",
    "roll_back_config": "policy",
    "apply_policy": "policy",
    "canary_policy": "policy",
    "keep_policy": "policy",
    "roll_back_policy": "policy",
    # decide who may use it, and see who did what
    "create_tenant": "admin",
    "replace_tenant": "admin",
    "delete_tenant": "admin",
    "erase_tenant": "admin",
    "create_key": "admin",
    "change_key": "admin",
    "rotate_key": "admin",
    "revoke_key": "admin",
    "list_audit": "admin",
}
"""The role that a route needs at least, by the name of its handler. A route that is not here stops the start."""

CHANGES_NOTHING = frozenset({"validate_config", "diff_policy", "validate_policy"})
"""Routes that only look although they are no GETs: they are not recorded."""
