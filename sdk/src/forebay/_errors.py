"""Everything this client raises, as one tree; it is drawn at ``ForebayError``."""


class ForebayError(Exception):
    """Anything that goes wrong between this client and a gateway.

    ::

        ForebayError
        ├── APIStatusError          the gateway answered with an error status
        │   ├── BadRequest          400, 413, 422: the request has to change
        │   ├── AuthenticationError 401: no key, or one that nobody issued
        │   ├── PermissionDenied    403: the key is known and may not do this
        │   ├── NotFound            404: no such model, or none that the key may see; no such route
        │   ├── Conflict            409: it does not fit what is there
        │   │   └── PreconditionFailed  412, 428: it has been changed since it was read, or was not read
        │   ├── RateLimited         429
        │   ├── TimedOut            408, 504: one of the gateway's named deadlines has passed; `code` says which
        │   └── ServerError         any other 5xx
        │       └── Unavailable     503: full, draining, or no healthy worker
        ├── ConnectionFailed        no answer came
        │   └── ClientTimeout       ... within the client's own `timeout`
        ├── StreamBroken            a stream began and did not end well; what was yielded until then is right
        ├── MalformedAnswer         an answer came that is not what this client knows
        └── WorkflowError           a workflow cannot be, or has no value
            ├── GraphError          what was written down is no graph; nothing of it has been sent
            └── NoValue             a variable will never have a value
                ├── CallFailed      a call failed: the variable's own, or one that it needs
                ├── CallSkipped     nothing was made: a branch not taken, or left out after a failure
                └── CallCancelled   nobody wanted it any more
    """


class APIStatusError(ForebayError):
    """The gateway answered with an error status. ``code`` is stable; branch on it or on the class, never on text.

    ``retry_after`` is the server's advice in seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        type: str | None = None,  # named as on the wire
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.type = type
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        where = f", request {self.request_id}" if self.request_id else ""
        return f"{self.message} (status {self.status}, code {self.code}{where})"


class BadRequest(APIStatusError):
    """The request is malformed, too large or not supported; ``param`` names the part."""


class AuthenticationError(APIStatusError):
    """No key was sent, or it is not a known one."""


class PermissionDenied(APIStatusError):
    """The key is valid and not allowed to do this."""


class NotFound(APIStatusError):
    """No such model or route, or none that this key may see."""


class Conflict(APIStatusError):
    """The change does not fit what is there, such as a second one of the same name."""


class PreconditionFailed(Conflict):
    """What was to be changed has been changed since it was read, or was not read: read it, and try again."""


class RateLimited(APIStatusError):
    """The caller has used up what it may use for now."""


class TimedOut(APIStatusError):
    """One of the gateway's deadlines has passed; ``code`` says which."""


class ServerError(APIStatusError):
    """The gateway or the engine behind it failed."""


class Unavailable(ServerError):
    """The gateway cannot take the request now."""


class ConnectionFailed(ForebayError):
    """No answer came: nothing listens, or the connection broke before the answer began."""


class ClientTimeout(ConnectionFailed):
    """No answer came within the ``timeout`` that this client was given. Not repeated: it may still be running."""


class StreamBroken(ForebayError):
    """A stream ended before its end. ``code`` is the gateway's, or ``connection_lost`` or ``stream_truncated``."""

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        type: str | None = None,  # named as on the wire
        param: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.type = type
        self.param = param
        self.request_id = request_id


class MalformedAnswer(ForebayError):
    """A successful answer that cannot be read; most likely the address is not a Forebay gateway's."""


class WorkflowError(ForebayError):
    """A workflow cannot be what was asked for."""


class GraphError(WorkflowError):
    """What the program wrote down is no graph. Nothing of it has been sent."""


class NoValue(WorkflowError):
    """The variable ``variable`` of the run ``run`` will never have a value.

    ``call``: the path of the call where it began, as ``part[3]``; ``code`` is stable: ``upstream_failed``,
    ``transform``, ``schema``, ``budget_exhausted``, ``deadline``, ``tool_failed``, or that of the engine's answer.
    """

    def __init__(
        self, message: str, *, run: str, variable: str, call: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.run = run
        self.variable = variable
        self.call = call
        self.code = code

    def __str__(self) -> str:
        began = f", began in call {self.call!r}" if self.call else ""
        code = f", code {self.code}" if self.code else ""
        return f"{self.message} (variable {self.variable!r}{began}{code}, run {self.run})"


class CallFailed(NoValue):
    """A call failed. Where a tool of this process raised, that is the ``__cause__``."""


class CallSkipped(NoValue):
    """The call was not made, as the graph says: a branch that was not taken, or ``on_error="skip"``."""


class CallCancelled(NoValue):
    """The call was cancelled, or the run."""
