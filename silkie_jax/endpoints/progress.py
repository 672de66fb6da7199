"""One line on stderr: how far a stage is, what it has cost and will cost, and what went wrong."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from tqdm import tqdm

from silkie_jax.endpoints import outcomes
from silkie_jax.endpoints.budget import usd

T = TypeVar("T")


def planning(items: Iterable[T], total: int, show: bool) -> Iterable[T]:
    """The items of a run, with a bar where they take long."""
    return tqdm(items, "planning", total=total, unit="row", delay=1.0, leave=False, disable=not show)


class Progress:
    """A tqdm bar over the requests of a stage.

    Args:
        total: requests of the stage.
        done: of them, settled before.
        spent: USD, of the run so far.

    Attributes:
        to_come: agent -> what gives the USD expected for its open requests, None where there is no price.
        note: what else there is to say.
    """

    def __init__(self, stage: str, total: int, done: int, spent: float, show: bool = True):
        self.spent = spent
        self.outcomes: Counter[str] = Counter()
        self.note = ""
        self.to_come: dict[str, Callable[[], float | None]] = {}
        self._drawn = 0.0
        self._bar: Any = tqdm(
            total=total, initial=done, desc=stage, unit="req", disable=not show, mininterval=0.5, dynamic_ncols=True
        )

    def attempt(self, outcome: str, cost: float) -> None:
        """After every attempt."""
        self.outcomes[outcome] += 1
        self.spent += cost
        self.refresh()

    def settled(self, count: int = 1) -> None:
        """After every request that is done with."""
        self._bar.total = max(self._bar.total, self._bar.n + count)  # a refused request made room for another
        self._bar.update(count)

    def refresh(self) -> None:
        """Writes the numbers anew, at most twice a second."""
        now = time.monotonic()
        if self._bar.disable or now - self._drawn < 0.5:
            return
        self._drawn = now
        amounts = [expected() for expected in self.to_come.values()]
        to_come = sum(amount for amount in amounts if amount is not None)
        refused = self.outcomes[outcomes.REFUSAL] + self.outcomes[outcomes.CONTENT_FILTER]
        errors = sum(self.outcomes[outcome] for outcome in outcomes.PASSING)
        parts = [
            f"{usd(self.spent)} so far",
            "price unknown" if None in amounts else f"{usd(to_come)} to come",
            f"refusals {refused}",
            *([f"errors {errors}"] if errors else []),
            *([self.note] if self.note else []),
        ]
        self._bar.set_postfix_str(", ".join(parts))

    def say(self, line: str) -> None:
        """A line of its own, which stays."""
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leaves the line as it is."""
        self._drawn = 0.0
        self.refresh()
        self._bar.close()
