"""The serving path: every call to a model goes through here. Implements ``core.completer.Completer``."""

from core.chat import Call
from core.errors import Draining
from engines.dispatcher import Dispatcher
from engines.run import Run


class ChatService:
    """Answers calls. Today a call goes straight to the scheduler; reuse, examples and routing will stand before it."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._is_draining = False

    def submit(self, call: Call, *, inline: bool = False) -> Run:
        """Queue the call; see ``Completer.submit``, and ``Run`` for ``inline``.

        Raises ``Draining`` once the server is shutting down.
        """
        if self._is_draining:
            raise Draining("the server is shutting down; try another one", retry_after=1.0)
        return self._dispatcher.submit(call, inline=inline)

    def drain(self) -> None:
        """Take no more calls; those under way go on."""
        self._is_draining = True

    @property
    def is_draining(self) -> bool:
        """Whether the server is shutting down."""
        return self._is_draining

    @property
    def num_open(self) -> int:
        """How many answers are under way."""
        return self._dispatcher.num_open
