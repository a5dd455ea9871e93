"""What a run may use: reserved before a call starts, settled when it ends; a fan-out shares one pool."""

import msgspec

from semantic_vars.calls import Budget


class Spent(msgspec.Struct, frozen=True):
    """Tokens, and money in the currency of the operator's prices."""

    tokens: int = 0
    cost: float = 0.0

    def plus(self, other: "Spent", sign: int = 1) -> "Spent":
        """Return the sum, or with a ``sign`` of -1 the difference."""
        return Spent(self.tokens + sign * other.tokens, self.cost + sign * other.cost)


class Pool:
    """A run's budget. What is ``reserved`` is not yet spent, and cannot be given to another."""

    def __init__(self, budget: Budget, spent: Spent) -> None:
        self._budget = budget
        self.spent = spent
        self.reserved = Spent()

    def reserve(self, amount: Spent) -> bool:
        """Set so much aside; False if there is not so much left."""
        if amount != Spent() and not self._allows(self.spent.plus(self.reserved).plus(amount)):
            return False  # what uses nothing is always allowed
        self.reserved = self.reserved.plus(amount)
        return True

    def settle(self, reserved: Spent, spent: Spent) -> None:
        """Give back what was set aside, and book what was really used."""
        self.reserved = self.reserved.plus(reserved, -1)
        self.spent = self.spent.plus(spent)

    def told(self, amount: Spent) -> str:
        """Return what is to be said of an amount that is more than is left."""
        tokens = self._budget.tokens
        if tokens is not None and self.spent.tokens + amount.tokens > tokens:
            left = max(0, tokens - self.spent.tokens)
            return f"it may use {amount.tokens} tokens, and the run's budget of {tokens} has {left} left"
        cost = self._budget.cost or 0.0
        left_over = max(0.0, cost - self.spent.cost)
        return f"it may cost {amount.cost:g}, and the run's budget of {cost:g} has {left_over:g} left"

    def _allows(self, amount: Spent) -> bool:
        tokens, cost = self._budget.tokens, self._budget.cost
        return (tokens is None or amount.tokens <= tokens) and (cost is None or amount.cost <= cost)
