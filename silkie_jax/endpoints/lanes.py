"""Sending the open requests of a stage: one lane for each agent, many workers in a lane, one budget over all.

A worker takes a request, waits for its turn and for room in the budget, writes the attempt down, sends it, writes the
reply down, and only then counts it as done. So a kill loses what is in flight and nothing else.
"""

import asyncio
import random
import time
from typing import Any

from silkie_jax.endpoints import outcomes
from silkie_jax.endpoints.agents import Agent
from silkie_jax.endpoints.attempts import (
    Request,
    StageWork,
    Verdict,
    begin_attempt,
    bill,
    budget_reached,
    end_attempt,
    end_request,
    open_requests,
    stopped_by,
)
from silkie_jax.endpoints.budget import BudgetReached, Expectation, open_sizes
from silkie_jax.endpoints.client import Client
from silkie_jax.endpoints.limits import FIRST_WAIT, Limiter
from silkie_jax.endpoints.outcomes import EndpointReply
from silkie_jax.endpoints.stopping import give_up
from silkie_jax.errors import UserError

_HOPELESS = 10  # requests without one answer after which a lane gives up


class Lane:
    """All open requests of one agent."""

    def __init__(self, work: StageWork, name: str, agent: Agent, client: Client):
        self.work = work
        self.name = name
        self.agent = agent
        self.client = client
        self.expectation = Expectation.of(work.run.db, work.stage, name, agent)
        self.limiter = Limiter(agent.concurrency, agent.requests_per_minute, agent.tokens_per_minute)
        # The first request goes alone: a wrong key or model is found out by one, and a first bill known before others.
        self.limiter.width = 1.0
        self.open, self.text_bytes, self.image_tokens = open_sizes(work.run.db, work.stage, name)
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
            self._page = open_requests(self.work.run.db, self.work.stage, self.name, self._last)[::-1]
            if not self._page:
                return None
            self._last = self._page[0].id
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
                reply, headers = await self.client.ask(work.wire.body(request.body))
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
            passing = reply.outcome in outcomes.PASSING
            reviewed += not passing and reply.outcome != outcomes.RATE_LIMITED
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
        self, request: Request, reply: EndpointReply, headers: Any, number: int, failures: int, sent: float
    ) -> tuple[Verdict, float]:
        """What becomes of the request, and how long to wait before another attempt."""
        now = time.monotonic()
        outcome = reply.outcome
        if outcome == outcomes.RATE_LIMITED:
            self.limiter.refused(headers, sent)
            if now - self._heard > self.agent.patience:
                self.work.stop.set(
                    UserError(
                        f"{self.name}: its endpoint has answered nothing but 'too many requests' for "
                        f"{self.agent.patience:g} s: run the same command again later"
                    )
                )
            return Verdict(outcome, "again"), 0.0
        if outcome in outcomes.STOPPING:
            self.work.stop.set(stopped_by(self.name, self.agent, reply))
            return Verdict(outcome, "again"), 0.0
        self.limiter.answered(headers)
        self._heard = now
        if outcome in outcomes.PASSING:
            if failures + 1 >= self.agent.attempts:
                return Verdict(outcome, "postponed"), 0.0
            return Verdict(outcome, "again"), FIRST_WAIT * 2**failures * random.uniform(0.75, 1.25)
        if self._answers == 0:
            self.limiter.width = float(self.agent.concurrency)
        self._answers += 1
        return self.work.review(self.name, request, reply, number), 0.0

    def _count(self, request: Request, verdict: Verdict, reply: EndpointReply) -> None:
        self.open = max(self.open - 1, 0)
        self.text_bytes = max(self.text_bytes - request.text_bytes, 0)
        self.image_tokens = max(self.image_tokens - request.image_tokens, 0)
        self.work.progress.settled()
        if reply.outcome in outcomes.PASSING or reply.outcome == outcomes.REJECTED:
            self._unanswered += 1
            if self._unanswered >= _HOPELESS:
                why = reply.error or "replies without any text"
                self.work.stop.set(give_up(self.name, self._unanswered, why))
        else:
            self._unanswered = 0


async def send_all(work: StageWork, agents: dict[str, Agent], clients: dict[str, Client]) -> None:
    """Sends what is open for these agents. When the run is stopped, everything in flight has been stored."""
    lanes = [Lane(work, name, agents[name], clients[name]) for name in agents]
    work.progress.to_come.update({lane.name: lane.to_come for lane in lanes})
    await asyncio.gather(*(lane.run() for lane in lanes if lane.open))
