"""Ids of responses: each is that of its run under another name, so nothing has to be looked up."""

import re

from core.errors import UnknownId

_ID = re.compile(r"resp_([0-9a-f]{32})")
_RUN = "run_"


def is_id(text: str) -> bool:
    """Whether a text looks like the id of a response of ours."""
    return _ID.fullmatch(text) is not None


def id_of(run: str) -> str:
    """Return the id of the response that a run is."""
    return "resp_" + run.removeprefix(_RUN)


def run_of(response: str, param: str | None = None) -> str:
    """Return the id of the run that a response is. Raises ``UnknownId`` where it can be none."""
    found = _ID.fullmatch(response)
    if found is None:
        raise unknown(response, param)
    return _RUN + found[1]


def message_of(run: str) -> str:
    """Return the id of the message that a response answers with."""
    return "msg_" + run.removeprefix(_RUN)


def unknown(response: str, param: str | None = None) -> UnknownId:
    """Return the error for an id that nobody has, or another tenant."""
    return UnknownId(f"there is no response {response[:64]!r}", param=param)
