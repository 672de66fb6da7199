"""The Batch API: requests as files, answered within a day at half the price.

A batch moves through states that are written down before and after each step: `composed` (its lines are recorded as
attempts, its file lies in RUN/batches), `uploaded`, `submitted`, then `collected` or `failed`. So another process, or
another day, goes on where this one ended. A batch whose submission was not confirmed is looked for at the server by
its name before it is submitted again, so that it is never paid twice. One that the server does not know (any more) is
`missing`: with another key it may be there yet, so the user is told, and the next command sends its requests again.
"""

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import httpx2
import openai

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
from silkie_jax.endpoints.batch_files import (
    URL,
    RemoteBatch,
    abandon,
    at_risk,
    make_line,
    read_line,
    unfinished,
)
from silkie_jax.endpoints.budget import Expectation, estimate, open_sizes
from silkie_jax.endpoints.client import Client
from silkie_jax.endpoints.journal import Statement
from silkie_jax.endpoints.limits import FIRST_WAIT
from silkie_jax.endpoints.outcomes import EndpointReply
from silkie_jax.errors import UserError

T = TypeVar("T")
_ENDED = ("completed", "failed", "expired", "cancelled")
_UPLOAD_SECONDS = 3600.0
_LINES_AT_ONCE = 200  # replies to a commit
_TOO_MUCH = "token_limit_exceeded"  # more tokens enqueued than the account may have
_FIRST = 0.02  # of what is left of a budget: what all agents' first files may cost by bounds that no bill confirms
_TIMES = 10  # their bounds are set aside until the bill is in
_CONFIRMED = 10  # replies of an agent after which it needs no small file first


async def run_batches(work: StageWork, agents: dict[str, Agent], clients: dict[str, Client], poll: float) -> None:
    """Sends what is open for these agents in batches and collects the replies, until all is done or the run stops."""
    folder = work.run.path / "batches"
    folder.mkdir(exist_ok=True)
    for leftover in (*folder.glob("*.tmp"), *folder.glob("*.out")):  # of a process that was killed
        leftover.unlink()
    first = _FIRST / max(1, len(agents))
    await asyncio.gather(*(BatchLane(work, name, agents[name], clients[name], poll, first).run() for name in agents))


class BatchLane:
    """All batches of one agent in one stage."""

    def __init__(self, work: StageWork, name: str, agent: Agent, client: Client, poll: float, first: float):
        self.work = work
        self.name = name
        self.agent = agent
        self.client = client
        self.poll = poll
        self.folder = work.run.path / "batches"
        self.share = 1.0  # of the largest file, where the server takes less at once
        self.first = first  # of what is left of the budget, for a file without confirmed bounds
        self._held = 0.0  # USD that are set aside beyond its bounds
        self.expectation = Expectation.of(work.run.db, work.stage, name, agent)
        self._confirmed = self.expectation.replies >= _CONFIRMED

    @property
    def _on_trial(self) -> bool:
        """Whether a small file comes first: a large one could cost many times its bounds before anybody knew."""
        return self.work.budget.limit is not None and self.agent.cost(1, 1) > 0 and not self._confirmed

    def to_come(self) -> float | None:
        """USD expected for what has no answer yet; None where the price is unknown."""
        found = estimate(self.work.run.db, self.work.stage, {self.name: self.agent}, batch=True)
        return found[0].cost

    async def run(self) -> None:
        self.work.progress.to_come[self.name] = self.to_come
        try:
            begun = self._unfinished()
            self._hold(sum(at_risk(self.work.run.db, batch) for batch in begun))
            for batch in begun:
                if batch.state in ("composed", "uploaded"):
                    await self._submit(batch, first=False)
            while not self.work.stop:
                await self._compose_all()
                batches = self._unfinished()
                if not batches:
                    return
                for batch in batches:
                    await self._look(batch)
                if self._unfinished() and not self.work.stop:
                    await self.work.stop.sleep(self.poll)
        except _Stopped:
            pass
        except Exception as error:
            self.work.stop.set(error)

    def _unfinished(self) -> list[RemoteBatch]:
        return unfinished(self.work.run.db, self.work.stage, self.name)

    def _hold(self, bound: float) -> None:
        """Sets aside what a file on trial may cost beyond its bound, lest other agents spend it meanwhile."""
        if self._on_trial:
            held = min((_TIMES - 1) * bound, max(self.work.budget.left, 0.0))
            self._held += held
            self.work.budget.reserved += held

    def _release(self) -> None:
        self.work.budget.settle(self._held, 0.0)
        self._held = 0.0

    def _file(self, batch: RemoteBatch, suffix: str = ".jsonl") -> Path:
        return self.folder / (batch.name + suffix)

    # Composing

    async def _compose_all(self) -> None:
        """Files for all open requests, as far as the budget goes; each is submitted before the next is composed."""
        requests: Iterator[Request] = islice(self._open(), 0, None, self._step())
        held: list[Request] = []  # the one that did not fit the last file
        while not self.work.stop:
            if self._on_trial and self._unfinished():
                return  # its bill comes first
            batch = await self._compose(requests, held)
            if batch is None:
                return
            await self._submit(batch, first=True)

    def _step(self) -> int:
        """1; on trial, how far apart the requests of a file are taken, so that they stand for all of them."""
        most_usd = self.first * self.work.budget.left
        if not self._on_trial or most_usd <= 0:
            return 1
        count, text, images = open_sizes(self.work.run.db, self.work.stage, self.name)
        tokens_in, tokens_out = self.expectation.bound(text + count, images)
        every = self.agent.cost(tokens_in, count * tokens_out, batch=True)
        return max(1, min(count, math.ceil(every / most_usd)))

    def _open(self) -> Iterator[Request]:
        """Open requests that are in no batch, read page by page."""
        last = 0
        while page := open_requests(self.work.run.db, self.work.stage, self.name, last):
            yield from page
            last = page[-1].id

    async def _compose(self, requests: Iterator[Request], held: list[Request]) -> RemoteBatch | None:
        """One file of as many requests as it may hold; None where there are none, or no money for one."""
        budget, now = self.work.budget, time.time()
        number = self.work.batch_ids()
        most_lines = max(1, int(self.agent.batch_lines * self.share))
        most_bytes = self.agent.batch_bytes * self.share
        batch = RemoteBatch(number, f"{self.work.run.settings('run id')}-{number}", "composed", 0, None, None)
        statements: list[Statement] = []
        most_usd = self.first * budget.left if self._on_trial else math.inf
        size, reserved, out_of_money = 0, 0.0, False
        temporary = self._file(batch, ".tmp")
        with open(temporary, "wb") as file:
            while batch.lines < most_lines and (request := held.pop() if held else next(requests, None)):
                bound = self.expectation.bound(request.text_bytes, request.image_tokens)
                most = self.agent.cost(*bound, batch=True)
                if not budget.fits(most):
                    out_of_money = True
                    break
                if batch.lines and reserved + most > most_usd:
                    break
                attempt = self.work.ids()
                line = make_line(attempt, self.work.wire.body(request.body))
                if size + len(line) > most_bytes and batch.lines:
                    held.append(request)
                    break
                file.write(line)
                size += len(line)
                reserved += most
                budget.settle(0.0, most)  # until the bill is in; at once, since other agents compose theirs meanwhile
                batch.lines += 1
                statements.append(begin_attempt(attempt, request.id, most, number))
                if batch.lines % 100 == 0:
                    await asyncio.sleep(0)  # other agents may have something to do
            file.flush()
            os.fsync(file.fileno())
        if not batch.lines:
            temporary.unlink()
            if out_of_money and not self._waiting():
                self.work.stop.set(budget_reached(budget))
            return None
        os.replace(temporary, self._file(batch))
        self._hold(reserved)
        row = (batch.id, self.work.stage, self.name, batch.state, now, batch.lines, batch.name)
        insert = "INSERT INTO batches (id, stage, agent, state, created, lines, name) VALUES (?, ?, ?, ?, ?, ?, ?)"
        await self.work.journal.write((insert, row), *statements)
        return batch

    def _waiting(self) -> bool:
        """Whether any batch of the run may still turn out cheaper than its bound."""
        return bool(unfinished(self.work.run.db))

    # Talking to the server

    async def _submit(self, batch: RemoteBatch, first: bool) -> None:
        """Uploads and submits a batch, from wherever it stands."""
        api = self.client.api
        if batch.state == "composed":
            if not self._file(batch).exists():
                await self._abandon(batch, "its file is missing", outcomes.LOST)
                return

            async def upload() -> Any:
                with open(self._file(batch), "rb") as file:
                    slow = api.with_options(timeout=_UPLOAD_SECONDS)
                    return await slow.files.create(file=(f"{batch.name}.jsonl", file), purpose="batch")

            batch.file_id = (await self._call(upload)).id
            batch.state = "uploaded"
            await self._save(batch)
        known = None if first else await self._call(lambda: self._find(batch))

        async def create() -> Any:
            nonlocal known
            if known is None:
                try:
                    known = await api.batches.create(
                        input_file_id=batch.file_id or "",
                        endpoint=URL,
                        completion_window="24h",
                        metadata={"silkie_batch": batch.name},
                    )
                except (openai.APIConnectionError, openai.InternalServerError):
                    known = await self._find(batch)  # it may have been made all the same
                    if known is None:
                        raise
            return known

        batch.batch_id = (await self._call(create)).id
        batch.state = "submitted"
        await self._save(batch)
        self._file(batch).unlink(missing_ok=True)

    async def _find(self, batch: RemoteBatch) -> Any:
        """The batch at the server by our name for it; None where it is not there."""
        created = self.work.run.db.execute("SELECT created FROM batches WHERE id = ?", (batch.id,)).fetchone()[0]
        async for found in self.client.api.batches.list(limit=100):
            if (found.metadata or {}).get("silkie_batch") == batch.name or found.input_file_id == batch.file_id:
                return found
            if 0 < (found.created_at or 0) < created - 86400:
                break
        return None

    async def _look(self, batch: RemoteBatch) -> None:
        """Collects a batch that has ended; otherwise says how far it is."""
        if batch.state in ("composed", "uploaded"):
            await self._submit(batch, first=False)
        found = await self._call(lambda: self.client.api.batches.retrieve(batch.batch_id or ""), absent=True)
        if found is None and (found := await self._call(lambda: self._find(batch))) is None:
            await self._miss(batch)
            return
        counts = found.request_counts
        if found.status not in _ENDED:
            if batch.state == "missing":
                batch.state = "submitted"
                await self._save(batch)
            done = f" {counts.completed}/{counts.total}" if counts else ""
            first = ", a small one whose bill comes first" if self._on_trial else ""
            self.work.progress.note = f"batch {batch.batch_id} {found.status}{done}{first}"
            self.work.progress.refresh()
            return
        if found.status == "failed":
            errors = list(found.errors.data or []) if found.errors else []
            codes = {error.code for error in errors}
            why = self.client.scrub.error(errors[0].message or str(errors[0].code)) if errors else "no reason given"
            if _TOO_MUCH in codes:
                self.share /= 2
                await self._abandon(batch, why, outcomes.RATE_LIMITED)
                return
            await self._abandon(batch, why, outcomes.REJECTED)
            self.work.stop.set(UserError(f"{self.name}: batch {batch.batch_id} was refused ({outcomes.one_line(why)})"))
            return
        await self._collect(batch, [id for id in (found.output_file_id, found.error_file_id) if id])
        if found.status == "cancelled":
            self.work.stop.set(
                UserError(
                    f"{self.name}: batch {batch.batch_id} was cancelled; what it had answered is stored: "
                    "run the same command again to send the rest"
                )
            )

    async def _miss(self, batch: RemoteBatch) -> None:
        """The server does not know a batch, or the file with its replies: says so, and the next time gives it up."""
        count = self.work.run.db.execute(
            "SELECT count(*) FROM attempts WHERE batch = ? AND outcome IS NULL", (batch.id,)
        ).fetchone()[0]
        if batch.state == "missing":
            self.work.progress.say(
                f"{self.name}: batch {batch.batch_id} is still not there: its {count} requests are open again, and "
                "what they may have cost stays counted"
            )
            self._release()
            await self.work.journal.write(
                *abandon(batch.id, "its endpoint does not know the batch any more", outcomes.LOST, billed=True)
            )
            return
        batch.state = "missing"
        await self._save(batch)
        self.work.stop.set(
            UserError(
                f"{self.name}: its endpoint does not know batch {batch.batch_id}, or has deleted its replies: check "
                "that key and base_url are those that made it; if they are, run the same command again, and its "
                f"{count} requests are sent again"
            )
        )

    @overload
    async def _call(self, what: Callable[[], Awaitable[T]]) -> T: ...
    @overload
    async def _call(self, what: Callable[[], Awaitable[T]], absent: Literal[True]) -> T | None: ...
    async def _call(self, what: Callable[[], Awaitable[T]], absent: bool = False) -> T | None:
        """Calls the server, again after errors that pass; with `absent`, None for what it does not have.

        Raises:
            _Stopped: the run stops; for errors that do not pass, for a reason set here.
        """
        for failures in range(self.agent.attempts):
            try:
                return await what()
            except openai.APIStatusError as error:
                reply = outcomes.read(error.status_code, self.client.scrub.error(error.response.text))
            except (openai.OpenAIError, httpx2.HTTPError, OSError, ValueError) as error:
                cause = error.__cause__ or error
                words = outcomes.one_line(self.client.scrub.error(f"{type(cause).__name__}: {cause}"))
                reply = EndpointReply(outcomes.CONNECTION, error=words)
            if absent and reply.status in (404, 410):
                return None
            if reply.outcome == outcomes.NOT_FOUND:
                self.work.stop.set(
                    UserError(
                        f"{self.name}: its endpoint has no Batch API (set batch: false for it), or does not know this "
                        f"batch (its key and base_url must be those that made it) ({reply.error})"
                    )
                )
            elif reply.outcome in outcomes.STOPPING:
                self.work.stop.set(stopped_by(self.name, self.agent, reply))
            elif reply.outcome not in outcomes.PASSING and reply.outcome != outcomes.RATE_LIMITED:
                break
            await self.work.stop.sleep(FIRST_WAIT * 2**failures)
            if self.work.stop:
                raise _Stopped
        self.work.stop.set(UserError(f"{self.name}: the Batch API does not answer as it should ({reply.error})"))
        raise _Stopped

    async def _save(self, batch: RemoteBatch) -> None:
        sql = "UPDATE batches SET state = ?, file_id = ?, batch_id = ? WHERE id = ?"
        await self.work.journal.write((sql, (batch.state, batch.file_id, batch.batch_id, batch.id)))

    # Collecting

    async def _collect(self, batch: RemoteBatch, file_ids: list[str]) -> None:
        """Stores all lines of a batch; what has no line is asked for again. Doing it twice does no harm."""
        waiting: dict[int, tuple[Request, float]] = {
            attempt: (Request(*row), bound)
            for attempt, bound, *row in self.work.run.db.execute(
                "SELECT a.id, a.at_risk, r.id, r.instruction, r.slot, r.arrangement, '', r.text_bytes, r.image_tokens "
                "FROM attempts a JOIN requests r ON r.id = a.request WHERE a.batch = ? AND a.outcome IS NULL",
                (batch.id,),
            )
        }
        statements: list[Statement] = []
        for file_id in file_ids:
            file = self._file(batch, ".out")
            if not await self._call(partial(self._download, file_id, file), absent=True):
                await self.work.journal.write(*statements)
                await self._miss(batch)
                return
            with open(file, "rb") as lines:
                for line in lines:
                    attempt, reply = read_line(line, self.client.scrub)
                    if attempt in waiting:
                        statements += self._settle(attempt, *waiting.pop(attempt), reply)
                    if len(statements) >= _LINES_AT_ONCE:
                        await self.work.journal.write(*statements)
                        statements = []
            file.unlink()
        for attempt, (request, bound) in waiting.items():
            reply = EndpointReply(outcomes.EXPIRED, error="the batch ended without an answer to this line")
            statements += self._settle(attempt, request, bound, reply)
        self._release()
        batch.state = "collected"
        await self.work.journal.write(*statements)
        await self._save(batch)

    async def _download(self, file_id: str, file: Path) -> bool:
        slow = self.client.api.with_options(timeout=_UPLOAD_SECONDS)
        async with slow.files.with_streaming_response.content(file_id) as response:
            with open(file, "wb") as out:
                async for data in response.iter_bytes():
                    out.write(data)
        return True

    def _settle(self, attempt: int, request: Request, bound: float, reply: EndpointReply) -> list[Statement]:
        """The statements for one line, and what it means for budget and progress."""
        cost, at_risk = bill(self.agent, reply, bound, batch=True)
        self.work.budget.settle(0.0, cost + at_risk - bound)
        verdict = self._verdict(request, reply)
        self.work.progress.attempt(verdict.outcome, cost + at_risk)
        if reply.input_tokens is not None and reply.output_tokens is not None:
            self.expectation.observe(request.text_bytes, request.image_tokens, reply.input_tokens, reply.output_tokens)
        self._confirmed |= reply.status == 200
        statements = [end_attempt(attempt, verdict.outcome, reply, cost, at_risk), *verdict.also]
        if verdict.state != "again":
            statements.append(end_request(request.id, verdict.state, attempt))
            self.work.progress.settled()
        return statements

    def _verdict(self, request: Request, reply: EndpointReply) -> Verdict:
        if reply.outcome in outcomes.STOPPING:
            self.work.stop.set(stopped_by(self.name, self.agent, reply))
            return Verdict(reply.outcome, "again")
        passing = reply.outcome in outcomes.PASSING
        if reply.outcome == outcomes.RATE_LIMITED:
            return Verdict(reply.outcome, "again")
        marks = ", ".join("?" * len(outcomes.PASSING))
        before = self.work.run.db.execute(
            f"SELECT count(*) FROM attempts WHERE request = ? AND outcome {'' if passing else 'NOT'} IN ({marks})",
            (request.id, *outcomes.PASSING),
        ).fetchone()[0]
        if passing:
            return Verdict(reply.outcome, "postponed" if (before + 1) % self.agent.attempts == 0 else "again")
        return self.work.review(self.name, request, reply, before + 1)

    async def _abandon(self, batch: RemoteBatch, why: str, outcome: str) -> None:
        self.work.budget.settle(0.0, -at_risk(self.work.run.db, batch))
        self._release()
        await self.work.journal.write(*abandon(batch.id, why, outcome))
        self._file(batch).unlink(missing_ok=True)


class _Stopped(Exception):
    """Leaves an agent's batches as they are: the run stops."""
