"""A variable's text, put together from what a stream tells of it."""

import json

from forebay.events import CallStarted, Event, VarDelta, VarDone
from forebay.workflows._feed import Told
from forebay.workflows._var import Piece


class Pieces:
    """Says what to hand on after each event, so that what was handed on is the variable's text.

    Pieces are told once. So those of an attempt whose beginning was missed are kept back: the rest comes at the end.
    """

    def __init__(self, variable: str) -> None:
        self._variable = variable
        self._attempt: int | None = None  # that was heard from its beginning
        self._given = ""

    def after(self, told: Told) -> Piece | None:
        """Return the piece that is due now; None if there is none."""
        if told.is_anew:
            self._attempt = None
        return self._due(told.event)

    def _due(self, event: Event) -> Piece | None:
        match event:
            case CallStarted(call=self._variable, attempt=attempt):  # a retry is told too, and maybe later
                self._attempt = attempt
                return self._restart("") if self._given else None
            case VarDelta(variable=self._variable, text=text) if text and event.attempt == self._attempt:
                self._given += text
                return Piece(text)
            case VarDone(variable=self._variable, value=value):
                return self._rest(value)
        return None

    def _rest(self, value: object) -> Piece | None:
        if not isinstance(value, str):
            return None if self._given else Piece(json.dumps(value, ensure_ascii=False))
        if not value.startswith(self._given):
            return self._restart(value)
        return Piece(rest) if (rest := value[len(self._given) :]) else None

    def _restart(self, text: str) -> Piece:
        self._given = text
        return Piece(text, restarts=True)
