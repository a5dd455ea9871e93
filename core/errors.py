"""Every error that Forebay reports, as one tree.

::

    ForebayError
    ├── InvalidRequest              the caller has to change the request
    │   ├── InvalidJson
    │   ├── UnsupportedParameter
    │   ├── ContextLengthExceeded
    │   ├── RequestTooLarge
    │   ├── UnknownModel
    │   ├── UnknownUrl
    │   ├── UnknownId
    │   ├── MethodNotAllowed
    │   ├── Conflict
    │   ├── PreconditionFailed
    │   └── PreconditionRequired
    ├── InvalidKey                  no key, one that nobody issued, or one that holds no longer
    ├── PermissionDenied            the key is known and may not do this
    │   ├── ModelNotAllowed
    │   ├── EndpointNotAllowed
    │   └── TenantSuspended
    ├── RateLimited                 the key, tenant or end user has used up what it may for now
    │   └── BudgetExceeded
    ├── Unavailable                 nothing wrong with the request; try again later
    │   ├── QueueFull
    │   ├── NoHealthyWorker
    │   ├── ConnectionLimit
    │   ├── KeysUnavailable
    │   ├── LimitsUnavailable
    │   ├── DatabaseUnavailable
    │   └── Draining
    ├── TimedOut                    one of the five named deadlines has passed
    │   ├── QueueTimeout
    │   ├── ConnectTimeout
    │   ├── FirstTokenTimeout
    │   ├── IdleTimeout
    │   ├── TotalTimeout
    │   └── ClientIdle
    ├── UpstreamError               a worker answered, and the answer is an error
    │   ├── UpstreamRefused         ... of the 4xx kind: the engine dislikes the request itself
    │   ├── UpstreamBusy            ... 429 or 503
    │   └── UpstreamBroken          ... anything else, or bytes that make no sense
    ├── WorkerLost                  the worker went away while it worked
    │   └── WorkerUnreachable       ... before it had seen the request
    └── InternalError               our own fault

HTTP statuses are not known here: ``gateway/errors.py`` holds the one table that maps a class to a status.
"""

from typing import ClassVar


class ForebayError(Exception):
    """Anything that is told to a caller. ``code`` is stable, ``retryable``: the same request may yet succeed."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.specific_code = code or type(self).code
        self.retry_after = retry_after


class InvalidRequest(ForebayError):
    """The request is malformed; the message says which part and what would be right."""

    code = "invalid_request"


class InvalidJson(InvalidRequest):
    """The body is not a JSON object."""

    code = "invalid_json"


class UnsupportedParameter(InvalidRequest):
    """A parameter that is unknown, or whose feature this server does not have."""

    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """The prompt does not fit the model's context."""

    code = "context_length_exceeded"


class RequestTooLarge(InvalidRequest):
    """The body has more bytes than the server accepts."""

    code = "request_too_large"


class UnknownModel(InvalidRequest):
    """No model has this name or alias."""

    code = "model_not_found"


class UnknownUrl(InvalidRequest):
    """No route has this path."""

    code = "unknown_url"


class MethodNotAllowed(InvalidRequest):
    """The route exists, for another method."""

    code = "method_not_allowed"


class UnknownId(InvalidRequest):
    """Nothing that the caller may see has this id."""

    code = "not_found"


class Conflict(InvalidRequest):
    """The change does not fit what is there."""

    code = "conflict"


class PreconditionFailed(InvalidRequest):
    """What was to be changed is no longer as the caller has seen it."""

    code = "precondition_failed"


class PreconditionRequired(InvalidRequest):
    """The change has to name the state that it was made from."""

    code = "precondition_required"


class InvalidKey(ForebayError):
    """No key was sent, or it is not a known one."""

    code = "invalid_api_key"


class PermissionDenied(ForebayError):
    """The key is valid and not allowed to do this."""

    code = "permission_denied"


class ModelNotAllowed(PermissionDenied):
    """The key's allow-list does not name the model."""

    code = "model_not_allowed"


class EndpointNotAllowed(PermissionDenied):
    """The key's allow-list does not name the route."""

    code = "endpoint_not_allowed"


class TenantSuspended(PermissionDenied):
    """An operator has suspended the tenant."""

    code = "tenant_suspended"


class RateLimited(ForebayError):
    """A limit has no room; ``retry_after`` says when it will. ``measure``: requests, tokens or parallel answers."""

    code = "rate_limit_exceeded"
    retryable = True
    measure: str | None = None
    limit: int = 0


class BudgetExceeded(RateLimited):
    """A budget is used up for its period: trying again soon does not help."""

    code = "insufficient_quota"
    retryable = False


class Unavailable(ForebayError):
    """The server cannot take the request now."""

    code = "unavailable"
    retryable = True


class QueueFull(Unavailable):
    """The model's queue has reached its bound."""

    code = "queue_full"


class NoHealthyWorker(Unavailable):
    """No worker of the model runs, nor will one soon."""

    code = "no_healthy_worker"


class ConnectionLimit(Unavailable):
    """The caller has as many undelivered answers open as one tenant may have."""

    code = "connection_limit"


class KeysUnavailable(Unavailable):
    """The key is not among those in memory, and the database that may know it cannot be reached."""

    code = "keys_unavailable"


class LimitsUnavailable(Unavailable):
    """The shared counts cannot be reached, and the operator has chosen to refuse rather than to count alone."""

    code = "limits_unavailable"


class DatabaseUnavailable(Unavailable):
    """The database that the answer needs cannot be reached."""

    code = "database_unavailable"


class Draining(Unavailable):
    """The server is shutting down."""

    code = "draining"


class TimedOut(ForebayError):
    """One of the named deadlines has passed."""

    code = "timeout"
    retryable = True


class QueueTimeout(TimedOut):
    """No worker became free within ``timeouts.queue``."""

    code = "queue_timeout"


class ConnectTimeout(TimedOut):
    """The worker's socket did not accept within ``timeouts.connect``."""

    code = "connect_timeout"


class FirstTokenTimeout(TimedOut):
    """The worker sent nothing within ``timeouts.first_token``."""

    code = "first_token_timeout"


class IdleTimeout(TimedOut):
    """The worker stopped sending for longer than ``timeouts.idle``."""

    code = "idle_timeout"


class TotalTimeout(TimedOut):
    """The answer was not complete within ``timeouts.total``."""

    code = "upstream_timeout"


class ClientIdle(TimedOut):
    """The client has not read what waits for it within ``client_idle``."""

    code = "client_idle"
    retryable = False


class UpstreamError(ForebayError):
    """A worker answered with an error. ``status`` is what it answered."""

    code = "upstream_error"

    def __init__(
        self,
        message: str,
        *,
        status: int,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code, retry_after=retry_after)
        self.status = status


class UpstreamRefused(UpstreamError):
    """The engine refused the request itself (4xx): another worker would refuse it too."""


class UpstreamBusy(UpstreamError):
    """The engine has no room now (429, 503); ``retry_after`` is its own advice in seconds."""

    code = "upstream_busy"
    retryable = True


class UpstreamBroken(UpstreamError):
    """The engine failed (5xx) or sent what no client could read."""

    retryable = True


class WorkerLost(ForebayError):
    """The connection to the worker broke before the answer was complete."""

    code = "worker_lost"
    retryable = True


class WorkerUnreachable(WorkerLost):
    """No connection to the worker could be made: it has not seen the request."""

    code = "worker_unreachable"


class InternalError(ForebayError):
    """A fault of Forebay itself; the log has the details under the request id."""

    code = "internal"
    retryable = True
