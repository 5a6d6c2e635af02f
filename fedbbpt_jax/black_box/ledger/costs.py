"""What queries cost, what may be spent, and where it has gone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fedbbpt_jax.errors import BudgetExceededError


class Cost(NamedTuple):
    """What queries cost.

    Attributes:
      num_requests: prompt × example.
      num_tokens: that the server bills, 0 where it does not count them.
    """

    num_requests: int
    num_tokens: int = 0


class Price(NamedTuple):
    """What a server asks for, in any one currency."""

    per_request: float = 0.0
    per_million_tokens: float = 0.0

    def of(self, cost: Cost) -> float:
        """Returns the money for `cost`: for a sum at once, so that rounding does not add up.

        Example:
          >>> Price(per_million_tokens=0.5).of(Cost(num_requests=10, num_tokens=4_000_000))
          2.0
        """
        return cost.num_requests * self.per_request + cost.num_tokens * self.per_million_tokens / 1e6


class Budget(NamedTuple):
    """What may be spent, evaluation included; None is no limit.

    Attributes:
      num_requests: prompt × example.
      num_tokens: that the server bills.
      money: in the currency of the price.
    """

    num_requests: int | None = None
    num_tokens: int | None = None
    money: float | None = None


FREE, UNLIMITED = Price(), Budget()


class Balance(NamedTuple):
    """Where the budget has gone.

    Attributes:
      answered: paid, and the answer came.
      in_doubt: sent, and perhaps billed, but no answer came; counts as spent.
      reserved: not decided yet.
    """

    answered: Cost = Cost(0)
    in_doubt: Cost = Cost(0)
    reserved: Cost = Cost(0)

    @property
    def spent(self) -> Cost:
        """What is paid, or must be taken for paid."""
        return total([self.answered, self.in_doubt])

    @property
    def charged(self) -> Cost:
        """All that counts against the budget."""
        return total(self)


def total(costs: Iterable[Cost]) -> Cost:
    """Returns the sum of costs.

    Example:
      >>> total([Cost(2, 30), Cost(1)])
      Cost(num_requests=3, num_tokens=30)
    """
    columns = list(zip(*costs, strict=True))
    return Cost(*map(sum, columns)) if columns else Cost(0)


def check_budget(budget: Budget, price: Price, balance: Balance, more: Cost) -> None:
    """Checks that a budget pays for `more`, beside all that is spent and reserved.

    Raises:
      BudgetExceededError: it does not.
    """
    after = total([balance.charged, more])
    for unit, limit, of in (
        ("requests", budget.num_requests, lambda cost: cost.num_requests),
        ("tokens", budget.num_tokens, lambda cost: cost.num_tokens),
        ("in money", budget.money, price.of),
    ):
        if limit is not None and of(after) > limit:
            raise BudgetExceededError(
                f"the budget of {limit:.12g} {unit} does not pay for {of(more):.12g} more: {of(balance.spent):.12g} "
                f"are spent and {of(balance.reserved):.12g} reserved"
            )
