"""Sending the open requests of a stage: one lane for each agent, many workers in a lane, one budget over all.

A worker takes a request, waits for its turn and for room in the budget, writes the attempt down, sends it, writes the
reply down, and only then counts it as done. So a kill loses what is in flight and nothing else.
"""

import asyncio
import random
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_prep import replies
from data_prep.agents import Agent
from data_prep.budget import Budget, BudgetReached, Expectation, usd
from data_prep.client import Client
from data_prep.journal import Journal, Statement
from data_prep.limits import FIRST_WAIT, Limiter
from data_prep.messages import Wire
from data_prep.progress import Progress
from data_prep.replies import Reply
from data_prep.stopping import Stop, give_up
from data_prep.store import Run
from silkie_jax.errors import UserError

_PAGE = 64  # requests read at a time
_HOPELESS = 10  # requests without one answer after which a lane gives up


class Request(NamedTuple):
    """A row of `requests` that is to be sent."""

    id: int
    instruction: int
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


Review = Callable[[str, Request, Reply, int], Verdict]
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
class Work:
    """What all lanes share."""

    run: Run
    stage: str
    review: Review
    budget: Budget
    journal: Journal
    stop: Stop
    progress: Progress
    ids: Ids
    batch_ids: Ids
    wire: Wire


def begin_attempt(attempt: int, request: int, at_risk: float, batch: int | None = None) -> Statement:
    """An attempt before it is sent: should nothing more be heard of it, it counts as spent at its bound."""
    return (
        "INSERT INTO attempts (id, request, batch, started, at_risk) VALUES (?, ?, ?, ?, ?)",
        (attempt, request, batch, time.time(), at_risk),
    )


def end_attempt(attempt: int, outcome: str, reply: Reply, cost: float, at_risk: float) -> Statement:
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


def mark_lost(run: Run) -> int:
    """Attempts that a killed process left in flight, outside batches, are lost; returns how many."""
    done = run.db.execute(
        "UPDATE attempts SET outcome = ?, error = 'in flight when the process ended' "
        "WHERE outcome IS NULL AND batch IS NULL",
        (replies.LOST,),
    )
    return done.rowcount


def bill(agent: Agent, reply: Reply, bound: float, batch: bool = False) -> tuple[float, float]:
    """(cost, at risk) of an attempt in USD."""
    if reply.input_tokens is not None and reply.output_tokens is not None:
        return agent.cost(reply.input_tokens, reply.output_tokens, batch), 0.0
    return 0.0, bound if reply.may_be_billed else 0.0


class Lane:
    """All open requests of one agent."""

    def __init__(self, work: Work, name: str, agent: Agent, client: Client):
        self.work = work
        self.name = name
        self.agent = agent
        self.client = client
        self.expectation = Expectation.of(work.run.db, work.stage, name, agent)
        self.limiter = Limiter(agent.concurrency, agent.requests_per_minute, agent.tokens_per_minute)
        # The first request goes alone: a wrong key or model is found out by one, and a first bill known before others.
        self.limiter.width = 1.0
        self.open, self.text_bytes, self.image_tokens = work.run.db.execute(
            "SELECT count(*), coalesce(sum(text_bytes), 0), coalesce(sum(image_tokens), 0) FROM requests "
            "WHERE stage = ? AND agent = ? AND state = 'open'",
            (work.stage, name),
        ).fetchone()
        self._page: list[Request] = []
        self._last = 0
        self._answers = 0
        self._unanswered = 0  # requests given up in a row
        self._heard = time.monotonic()  # when anything but a refusal for its rate came back
        self._idle: set[asyncio.Task[Any]] = set()

    def to_come(self) -> float | None:
        """USD expected for what is open; None where the price is unknown."""
        if self.agent.price is None:
            return 0.0 if self.agent.free else None
        return self.agent.cost(*self.expectation.expected(self.open, self.text_bytes, self.image_tokens))

    async def run(self) -> None:
        """Works until nothing is open, or the run stops and what was in flight is stored."""
        workers = {asyncio.create_task(self._worker()) for _ in range(min(self.agent.concurrency, max(self.open, 1)))}
        stopped = asyncio.create_task(self.work.stop.event.wait())
        pending = set(workers)
        try:
            while pending:
                done, _ = await asyncio.wait({*pending, stopped}, return_when=asyncio.FIRST_COMPLETED)
                for task in done & pending:
                    if not task.cancelled() and (error := task.exception()):
                        self.work.stop.set(error)
                pending -= done
                if stopped in done:
                    for task in self._idle & pending:  # those that wait for a turn, for money or for time
                        task.cancel()
                    if pending:
                        await asyncio.wait(pending)
                    for task in pending:
                        if not task.cancelled() and (error := task.exception()):
                            self.work.stop.set(error)
                    return
        finally:
            for task in (*workers, stopped):
                task.cancel()

    async def _worker(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._idle.add(task)
        while not self.work.stop and (request := self._next()):
            await self._settle(request, task)

    def _next(self) -> Request | None:
        """The next open request that is not in a batch."""
        if not self._page:
            rows = self.work.run.db.execute(
                "SELECT id, instruction, slot, arrangement, body, text_bytes, image_tokens FROM requests r "
                "WHERE stage = ? AND agent = ? AND state = 'open' AND id > ? AND NOT EXISTS "
                "(SELECT 1 FROM attempts a WHERE a.request = r.id AND a.outcome IS NULL) ORDER BY id LIMIT ?",
                (self.work.stage, self.name, self._last, _PAGE),
            ).fetchall()
            if not rows:
                return None
            self._page = [Request(*row) for row in reversed(rows)]
            self._last = rows[-1][0]
        return self._page.pop()

    async def _settle(self, request: Request, task: "asyncio.Task[Any]") -> None:
        """Attempts until the request is done with, or the run stops."""
        work, failures, reviewed = self.work, 0, 0
        while not work.stop:
            bound = self.expectation.bound(request.text_bytes, request.image_tokens)
            turn = await self.limiter.acquire(sum(bound))
            most = self.agent.cost(*self.expectation.bound(request.text_bytes, request.image_tokens))  # bills teach
            try:
                await work.budget.reserve(most)
            except BaseException as error:
                self.limiter.release(turn, 0)
                if isinstance(error, BudgetReached):
                    work.stop.set(budget_reached(work.budget))
                    return
                raise
            if work.stop:  # while it waited
                self.limiter.release(turn, 0)
                work.budget.settle(most, 0.0)
                return
            self._idle.discard(task)
            attempt = work.ids()
            sent = time.monotonic()
            try:
                await work.journal.write(begin_attempt(attempt, request.id, most))
                reply, headers = await self.client.chat(work.wire.body(request.body))
            except BaseException:
                self.limiter.release(turn, None)
                raise
            cost, at_risk = bill(self.agent, reply, most)
            known = reply.input_tokens is not None and reply.output_tokens is not None
            if known:
                self.expectation.observe(
                    request.text_bytes, request.image_tokens, reply.input_tokens, reply.output_tokens  # type: ignore[arg-type]
                )  # fmt: skip
            self.limiter.release(turn, (reply.input_tokens + reply.output_tokens) if known else None)  # type: ignore[operator]
            work.budget.settle(most, cost + at_risk)
            passing = reply.outcome in replies.PASSING
            reviewed += not passing and reply.outcome != replies.RATE_LIMITED
            verdict, pause = self._judge(request, reply, headers, reviewed, failures, sent)
            failures += passing
            statements = [end_attempt(attempt, verdict.outcome, reply, cost, at_risk), *verdict.also]
            if verdict.state != "again":
                statements.append(end_request(request.id, verdict.state, attempt))
            await work.journal.write(*statements)
            work.progress.attempt(verdict.outcome, cost + at_risk)
            self._idle.add(task)
            if verdict.state != "again":
                self._count(request, verdict, reply)
                return
            if pause:
                await work.stop.sleep(pause)

    def _judge(
        self, request: Request, reply: Reply, headers: Any, number: int, failures: int, sent: float
    ) -> tuple[Verdict, float]:
        """What becomes of the request, and how long to wait before another attempt."""
        now = time.monotonic()
        outcome = reply.outcome
        if outcome == replies.RATE_LIMITED:
            self.limiter.refused(headers, sent)
            if now - self._heard > self.agent.patience:
                self.work.stop.set(
                    UserError(
                        f"{self.name}: its endpoint has answered nothing but 'too many requests' for "
                        f"{self.agent.patience:g} s: run the same command again later"
                    )
                )
            return Verdict(outcome, "again"), 0.0
        if outcome in replies.STOPPING:
            self.work.stop.set(stopped_by(self.name, self.agent, reply))
            return Verdict(outcome, "again"), 0.0
        self.limiter.answered(headers)
        self._heard = now
        if outcome in replies.PASSING:
            if failures + 1 >= self.agent.attempts:
                return Verdict(outcome, "postponed"), 0.0
            return Verdict(outcome, "again"), FIRST_WAIT * 2**failures * random.uniform(0.75, 1.25)
        if self._answers == 0:
            self.limiter.width = float(self.agent.concurrency)
        self._answers += 1
        return self.work.review(self.name, request, reply, number), 0.0

    def _count(self, request: Request, verdict: Verdict, reply: Reply) -> None:
        self.open = max(self.open - 1, 0)
        self.text_bytes = max(self.text_bytes - request.text_bytes, 0)
        self.image_tokens = max(self.image_tokens - request.image_tokens, 0)
        self.work.progress.settled()
        if reply.outcome in replies.PASSING or reply.outcome == replies.REJECTED:
            self._unanswered += 1
            if self._unanswered >= _HOPELESS:
                why = reply.error or "replies without any text"
                self.work.stop.set(give_up(self.name, self._unanswered, why))
        else:
            self._unanswered = 0


async def send_all(work: Work, agents: dict[str, Agent], clients: dict[str, Client]) -> None:
    """Sends what is open for these agents. When the run is stopped, everything in flight has been stored."""
    lanes = [Lane(work, name, agents[name], clients[name]) for name in agents]
    work.progress.to_come.update({lane.name: lane.to_come for lane in lanes})
    await asyncio.gather(*(lane.run() for lane in lanes if lane.open))


def budget_reached(budget: Budget) -> UserError:
    """The reason for a stop at the limit."""
    return UserError(
        f"stopped before the budget of {usd(budget.limit or 0)} could be passed, with {usd(budget.spent)} spent: "
        "run the same command with a larger --budget to continue"
    )


def stopped_by(name: str, agent: Agent, reply: Reply) -> UserError:
    """The reason for a stop that every other request would meet too."""
    match reply.outcome:
        case replies.QUOTA:
            mend = "its account has no credit left: add some, then run the same command again"
        case replies.UNAUTHORIZED:
            mend = f"its endpoint refuses the key: check {agent.api_key_env or 'api_key_env'}"
        case _:
            mend = f"its endpoint does not know the model {agent.model!r} or the path: check model and base_url"
    return UserError(f"{name}: {mend} ({reply.error})")
