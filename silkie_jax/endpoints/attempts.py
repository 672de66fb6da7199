"""Requests and their attempts: the rows that a stage plans, sends and settles, and what a reply makes of them."""

import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from silkie_jax.endpoints import outcomes
from silkie_jax.endpoints.agents import Agent
from silkie_jax.endpoints.budget import Budget, usd
from silkie_jax.endpoints.journal import Journal, Statement
from silkie_jax.endpoints.messages import Wire, text_bytes
from silkie_jax.endpoints.outcomes import EndpointReply
from silkie_jax.endpoints.progress import Progress
from silkie_jax.endpoints.stopping import Stop
from silkie_jax.endpoints.store import RunStore, to_json
from silkie_jax.errors import UserError

_PAGE = 64  # requests read at a time


class Request(NamedTuple):
    """A row of `requests` that is to be sent; `item` is the number of what it is about, the stage's own."""

    id: int
    item: int
    slot: int
    arrangement: str | None
    body: str
    text_bytes: int
    image_tokens: int


@dataclass(frozen=True)
class Verdict:
    """What a stage makes of a reply.

    Attributes:
        outcome: recorded with the attempt.
        state: of the request: "ok", "failed", or "again" for another attempt.
        also: statements to commit with it.
    """

    outcome: str
    state: str
    also: tuple[Statement, ...] = ()


Review = Callable[[str, Request, EndpointReply, int], Verdict]
"""(agent, request, reply, number of such replies so far, from 1) -> verdict; for replies with a text and for errors
that would repeat themselves."""


class Ids:
    """Numbers for new rows of a table. The lock of the run makes this process the only one that gives them out."""

    def __init__(self, db: sqlite3.Connection, table: str):
        self._next = db.execute(f"SELECT coalesce(max(id), 0) FROM {table}").fetchone()[0]

    def __call__(self) -> int:
        self._next += 1
        return self._next


@dataclass
class StageWork:
    """What all lanes share."""

    run: RunStore
    stage: str
    review: Review
    budget: Budget
    journal: Journal
    stop: Stop
    progress: Progress
    ids: Ids
    batch_ids: Ids
    wire: Wire


def new_request(
    stage: str, item: int, agent: str, slot: int, arrangement: Any, body: dict[str, Any], image_tokens: int
) -> Statement:
    """A request that is to be sent; nothing where the agent has one for this item and slot already."""
    return (
        "INSERT OR IGNORE INTO requests (stage, instruction, agent, slot, arrangement, body, text_bytes, image_tokens) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (stage, item, agent, slot, to_json(arrangement), to_json(body), text_bytes(body), image_tokens),
    )


def open_requests(db: sqlite3.Connection, stage: str, agent: str, after: int) -> list[Request]:
    """Some requests of an agent that are open and in no batch, with the lowest ids beyond `after`; [] for no more."""
    rows = db.execute(
        "SELECT id, instruction, slot, arrangement, body, text_bytes, image_tokens FROM requests r "
        "WHERE stage = ? AND agent = ? AND state = 'open' AND id > ? AND NOT EXISTS "
        "(SELECT 1 FROM attempts a WHERE a.request = r.id AND a.outcome IS NULL) ORDER BY id LIMIT ?",
        (stage, agent, after, _PAGE),
    )
    return [Request(*row) for row in rows]


def begin_attempt(attempt: int, request: int, at_risk: float, batch: int | None = None) -> Statement:
    """An attempt before it is sent: should nothing more be heard of it, it counts as spent at its bound."""
    return (
        "INSERT INTO attempts (id, request, batch, started, at_risk) VALUES (?, ?, ?, ?, ?)",
        (attempt, request, batch, time.time(), at_risk),
    )


def end_attempt(attempt: int, outcome: str, reply: EndpointReply, cost: float, at_risk: float) -> Statement:
    """An attempt with its reply."""
    return (
        "UPDATE attempts SET finished = ?, outcome = ?, http_status = ?, reply = ?, error = ?, text = ?, "
        "finish_reason = ?, model = ?, input_tokens = ?, output_tokens = ?, cost = ?, at_risk = ? WHERE id = ?",
        (
            *(time.time(), outcome, reply.status, reply.raw, reply.error, reply.text, reply.finish_reason),
            *(reply.model or None, reply.input_tokens, reply.output_tokens, cost, at_risk, attempt),
        ),
    )


def end_request(request: int, state: str, attempt: int) -> Statement:
    """A request with the attempt that decided it."""
    return ("UPDATE requests SET state = ?, attempt = ? WHERE id = ?", (state, attempt, request))


def mark_lost(run: RunStore) -> int:
    """Attempts that a killed process left in flight, outside batches, are lost; returns how many."""
    done = run.db.execute(
        "UPDATE attempts SET outcome = ?, error = 'in flight when the process ended' "
        "WHERE outcome IS NULL AND batch IS NULL",
        (outcomes.LOST,),
    )
    return done.rowcount


def bill(agent: Agent, reply: EndpointReply, bound: float, batch: bool = False) -> tuple[float, float]:
    """(cost, at risk) of an attempt in USD."""
    if reply.input_tokens is not None and reply.output_tokens is not None:
        return agent.cost(reply.input_tokens, reply.output_tokens, batch), 0.0
    return 0.0, bound if reply.may_be_billed else 0.0


def budget_reached(budget: Budget) -> UserError:
    """The reason for a stop at the limit."""
    return UserError(
        f"stopped before the budget of {usd(budget.limit or 0)} could be passed, with {usd(budget.spent)} spent: "
        "run the same command with a larger --budget to continue"
    )


def stopped_by(name: str, agent: Agent, reply: EndpointReply) -> UserError:
    """The reason for a stop that every other request would meet too."""
    match reply.outcome:
        case outcomes.QUOTA:
            mend = "its account has no credit left: add some, then run the same command again"
        case outcomes.UNAUTHORIZED:
            mend = f"its endpoint refuses the key: check {agent.api_key_env or 'api_key_env'}"
        case _:
            mend = f"its endpoint does not know the model {agent.model!r} or the path: check model and base_url"
    return UserError(f"{name}: {mend} ({reply.error})")
