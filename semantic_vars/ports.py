"""What the executor has to be told from outside."""

from typing import Protocol

from semantic_vars.budget import Spent
from semantic_vars.calls import Call
from semantic_vars.events import Work


class Estimate(Protocol):
    """What calls cost, before they are made."""

    def most(self, work: Work) -> Spent:
        """Return the most that a call may use: its prompt and the longest answer that it allows."""

    def seconds(self, call: Call) -> float:
        """Return about how long a call takes, once it runs."""
