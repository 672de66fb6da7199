"""Money: what a request will cost, what it can cost at most, and a limit that is never passed.

A request is sent only when its upper bound fits beside everything billed so far and the bounds of everything in flight.
The bound counts every byte of text as a token, every image by the agent's rule, and the reply as long as allowed; if
a server ever bills more, that ratio is learned and applied to all further bounds. So an agent whose bills are not known
is first sent little: live one request, in a batch as much as would be bearable at many times its bound. What a server
may have billed without saying so (a time-out, a kill) stays counted at its bound.
"""

import asyncio
import math
import re
import sqlite3
from dataclasses import dataclass

from silkie_jax.endpoints.agents import Agent
from silkie_jax.endpoints.messages import BYTES_PER_TOKEN
from silkie_jax.errors import UserError

_AMOUNT = re.compile(r"\$?\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:USD|\$)?", re.IGNORECASE)
_FEW = 5  # replies from which lengths are learned


def parse_usd(text: str) -> float:
    """`200USD`, `$200`, `200` or `0.5 usd` in USD.

    Raises:
        UserError: it says something else.
    """
    match = _AMOUNT.fullmatch(text.strip())
    if not match:
        raise UserError(f"budget {text!r}: write an amount such as 200USD")
    return float(match[1])


class BudgetReached(Exception):
    """The next request might pass the limit, and nothing in flight can make room for it."""


class Budget:
    """The limit for a run, in USD; None: no limit. Within one event loop."""

    def __init__(self, limit: float | None, spent: float):
        self.limit = limit
        self.spent = spent
        self.reserved = 0.0
        self._changed = asyncio.Event()

    async def reserve(self, most: float) -> None:
        """Sets `most` USD aside, waiting for requests in flight to settle where it does not fit yet.

        Raises:
            BudgetReached: it will not fit.
        """
        while not self.fits(most):
            if self.reserved < 1e-12:
                raise BudgetReached
            self._changed.clear()
            await self._changed.wait()
        self.reserved += most

    @property
    def left(self) -> float:
        """USD that are neither spent nor set aside."""
        return math.inf if self.limit is None else self.limit - self.spent - self.reserved

    def fits(self, most: float) -> bool:
        return most <= self.left + 1e-12

    def settle(self, reserved: float, cost: float) -> None:
        """Replaces what was set aside by what was spent."""
        self.reserved = max(0.0, self.reserved - reserved)
        self.spent += cost
        self._changed.set()


@dataclass
class Expectation:
    """Tokens of an agent's requests in one stage: the bound, and the expectation, corrected by what was billed."""

    agent: Agent
    replies: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    guessed: float = 0.0  # of the same replies' input, before correction
    factor: float = 1.0  # by which a bill passed the bound of the input at most
    longer: float = 1.0  # and that of the reply: some servers do not count a model's thoughts in max_tokens

    @classmethod
    def of(cls, db: sqlite3.Connection, stage: str, name: str, agent: Agent) -> "Expectation":
        """With what the run knows already."""
        self = cls(agent)
        replies, tokens_in, tokens_out, text, images, factor, longest = db.execute(
            "SELECT count(*), sum(input_tokens), sum(output_tokens), sum(text_bytes), sum(image_tokens), "
            "max(1.0 * input_tokens / (text_bytes + image_tokens + 1)), max(output_tokens) "
            "FROM requests r JOIN attempts a ON a.request = r.id "
            "WHERE r.stage = ? AND r.agent = ? AND a.input_tokens IS NOT NULL",
            (stage, name),
        ).fetchone()
        if replies:
            self.replies, self.input_tokens, self.output_tokens = replies, tokens_in, tokens_out
            self.guessed, self.factor = text / BYTES_PER_TOKEN + images, max(1.0, factor)
            self.longer = max(1.0, longest / agent.max_tokens)
        return self

    def observe(self, text_bytes: int, image_tokens: int, input_tokens: int, output_tokens: int) -> None:
        """Learns from one bill."""
        self.replies += 1
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens
        self.guessed += text_bytes / BYTES_PER_TOKEN + image_tokens
        self.factor = max(self.factor, input_tokens / (text_bytes + image_tokens + 1))
        self.longer = max(self.longer, output_tokens / self.agent.max_tokens)

    def bound(self, text_bytes: int, image_tokens: int) -> tuple[float, float]:
        """Input and output tokens at most."""
        return self.factor * (text_bytes + image_tokens + 1), self.longer * self.agent.max_tokens

    def expected(self, requests: int, text_bytes: float, image_tokens: float) -> tuple[float, float]:
        """Input and output tokens of several requests, from their sums."""
        known = self.replies >= _FEW
        ratio = self.input_tokens / self.guessed if known and self.guessed else 1.0
        length = self.output_tokens / self.replies if known else min(self.agent.expected_tokens, self.agent.max_tokens)
        return ratio * (text_bytes / BYTES_PER_TOKEN + image_tokens), requests * length


@dataclass(frozen=True)
class Estimate:
    """What open requests of one agent are expected to take; `cost` in USD, None where no price is configured."""

    agent: str
    requests: int
    input_tokens: float
    output_tokens: float
    cost: float | None


def open_sizes(db: sqlite3.Connection, stage: str, agent: str) -> tuple[int, int, int]:
    """How many requests of an agent are open, and the sums of their text's bytes and images' tokens."""
    return db.execute(
        "SELECT count(*), coalesce(sum(text_bytes), 0), coalesce(sum(image_tokens), 0) FROM requests "
        "WHERE stage = ? AND agent = ? AND state = 'open'",
        (stage, agent),
    ).fetchone()


def estimate(db: sqlite3.Connection, stage: str, agents: dict[str, Agent], batch: bool) -> list[Estimate]:
    """For every agent, what its open requests are expected to take."""
    table = []
    for name, agent in agents.items():
        requests, text, images = open_sizes(db, stage, name)
        tokens = Expectation.of(db, stage, name, agent).expected(requests, text, images)
        cost = 0.0 if agent.free else None if agent.price is None else agent.cost(*tokens, batch=batch)
        table.append(Estimate(name, requests, *tokens, cost))
    return table


def check_prices(agents: dict[str, Agent]) -> None:
    """A budget needs to know what every request can cost.

    Raises:
        UserError: names the agents without a price.
    """
    unknown = [name for name, agent in agents.items() if agent.price is None and not agent.free]
    if unknown:
        raise UserError(
            f"a budget needs the price of {', '.join(unknown)}: set price.input and price.output in USD for a million "
            "tokens (0 for a server of your own)"
        )


def usd(amount: float) -> str:
    """An amount for people: cents, and more digits where it is less than that."""
    return f"${amount:,.2f}" if amount >= 1 or amount == 0 else f"${amount:.4f}"
