"""The Batch API: requests as files, answered within a day at half the price.

A batch moves through states that are written down before and after each step: `composed` (its lines are recorded as
attempts, its file lies in RUN/batches), `uploaded`, `submitted`, then `collected` or `failed`. So another process, or
another day, goes on where this one ended. A batch whose submission was not confirmed is looked for at the server by
its name before it is submitted again, so that it is never paid twice.
"""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
from silkie_jax.endpoints.budget import Expectation, estimate
from silkie_jax.endpoints.client import Client
from silkie_jax.endpoints.journal import Statement
from silkie_jax.endpoints.limits import FIRST_WAIT
from silkie_jax.endpoints.outcomes import EndpointReply
from silkie_jax.endpoints.store import RunStore
from silkie_jax.errors import UserError

T = TypeVar("T")
_ENDED = ("completed", "failed", "expired", "cancelled")
_UPLOAD_SECONDS = 3600.0
_LINES_AT_ONCE = 200  # replies to a commit
_TOO_MUCH = "token_limit_exceeded"  # more tokens enqueued than the account may have


@dataclass
class RemoteBatch:
    """A row of `batches` that is not done with."""

    id: int
    name: str
    state: str
    lines: int
    file_id: str | None
    batch_id: str | None


async def run_batches(work: StageWork, agents: dict[str, Agent], clients: dict[str, Client], poll: float) -> None:
    """Sends what is open for these agents in batches and collects the replies, until all is done or the run stops."""
    folder = work.run.path / "batches"
    folder.mkdir(exist_ok=True)
    for leftover in (*folder.glob("*.tmp"), *folder.glob("*.out")):  # of a process that was killed
        leftover.unlink()
    await asyncio.gather(*(BatchLane(work, name, agents[name], clients[name], poll).run() for name in agents))


def release_unsent(run: RunStore, stage: str, names: Iterable[str]) -> None:
    """Takes requests out of files that never left this machine, so that they can be sent in another way."""
    for name in names:
        rows = run.db.execute(
            "SELECT id, name FROM batches WHERE stage = ? AND agent = ? AND state = 'composed'", (stage, name)
        ).fetchall()
        for number, file in rows:
            for sql, values in _abandon(number, "never sent", outcomes.LOST):
                run.db.execute(sql, values)
            (run.path / "batches" / f"{file}.jsonl").unlink(missing_ok=True)


def _abandon(batch: int, why: str, outcome: str) -> list[Statement]:
    """The statements for a batch that was not worked on: it cost nothing, and its requests are open again."""
    end = "UPDATE attempts SET outcome = ?, error = ?, finished = ?, at_risk = 0 WHERE batch = ? AND outcome IS NULL"
    return [
        (end, (outcome, outcomes.one_line(why), time.time(), batch)),
        ("UPDATE batches SET state = 'failed', error = ? WHERE id = ?", (outcomes.one_line(why), batch)),
    ]


class BatchLane:
    """All batches of one agent in one stage."""

    def __init__(self, work: StageWork, name: str, agent: Agent, client: Client, poll: float):
        self.work = work
        self.name = name
        self.agent = agent
        self.client = client
        self.poll = poll
        self.folder = work.run.path / "batches"
        self.share = 1.0  # of the largest file, where the server takes less at once
        self.expectation = Expectation.of(work.run.db, work.stage, name, agent)

    def to_come(self) -> float | None:
        """USD expected for what has no answer yet; None where the price is unknown."""
        found = estimate(self.work.run.db, self.work.stage, {self.name: self.agent}, batch=True)
        return found[0].cost

    async def run(self) -> None:
        self.work.progress.to_come[self.name] = self.to_come
        try:
            for batch in self._unfinished():
                if batch.state != "submitted":
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
        rows = self.work.run.db.execute(
            "SELECT id, name, state, lines, file_id, batch_id FROM batches WHERE stage = ? AND agent = ? "
            "AND state IN ('composed', 'uploaded', 'submitted') ORDER BY id",
            (self.work.stage, self.name),
        )
        return [RemoteBatch(*row) for row in rows]

    def _file(self, batch: RemoteBatch, suffix: str = ".jsonl") -> Path:
        return self.folder / (batch.name + suffix)

    # Composing

    async def _compose_all(self) -> None:
        """Files for all open requests, as far as the budget goes; each is submitted before the next is composed."""
        requests = self._open()
        held: list[Request] = []  # the one that did not fit the last file
        while not self.work.stop:
            batch = await self._compose(requests, held)
            if batch is None:
                return
            await self._submit(batch, first=True)

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
        size, reserved, out_of_money = 0, 0.0, False
        temporary = self._file(batch, ".tmp")
        with open(temporary, "wb") as file:
            while batch.lines < most_lines and (request := held.pop() if held else next(requests, None)):
                bound = self.expectation.bound(request.text_bytes, request.image_tokens)
                most = self.agent.cost(*bound, batch=True)
                if not budget.fits(reserved + most):
                    out_of_money = True
                    break
                attempt = self.work.ids()
                head = json.dumps({"custom_id": f"attempt-{attempt}", "method": "POST", "url": "/v1/chat/completions"})
                body = self.work.wire.body(request.body)
                line = head[:-1].encode() + b', "body": ' + body + b"}\n"
                if size + len(line) > most_bytes and batch.lines:
                    held.append(request)
                    break
                file.write(line)
                size += len(line)
                reserved += most
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
        budget.settle(0.0, reserved)  # until the bill is in
        os.replace(temporary, self._file(batch))
        row = (batch.id, self.work.stage, self.name, batch.state, now, batch.lines, batch.name)
        insert = "INSERT INTO batches (id, stage, agent, state, created, lines, name) VALUES (?, ?, ?, ?, ?, ?, ?)"
        await self.work.journal.write((insert, row), *statements)
        return batch

    def _waiting(self) -> bool:
        """Whether any batch of the run may still turn out cheaper than its bound."""
        states = "('composed', 'uploaded', 'submitted')"
        return bool(self.work.run.db.execute(f"SELECT 1 FROM batches WHERE state IN {states} LIMIT 1").fetchone())

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
                        endpoint="/v1/chat/completions",
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
        if batch.state != "submitted":
            await self._submit(batch, first=False)
        found = await self._call(lambda: self.client.api.batches.retrieve(batch.batch_id or ""))
        counts = found.request_counts
        if found.status not in _ENDED:
            done = f" {counts.completed}/{counts.total}" if counts else ""
            self.work.progress.note = f"batch {batch.batch_id} {found.status}{done}"
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

    async def _call(self, what: Callable[[], Awaitable[T]]) -> T:
        """Calls the server, again after errors that pass.

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
            attempt: (Request(*row), at_risk)
            for attempt, at_risk, *row in self.work.run.db.execute(
                "SELECT a.id, a.at_risk, r.id, r.instruction, r.slot, r.arrangement, '', r.text_bytes, r.image_tokens "
                "FROM attempts a JOIN requests r ON r.id = a.request WHERE a.batch = ? AND a.outcome IS NULL",
                (batch.id,),
            )
        }
        statements: list[Statement] = []
        for file_id in file_ids:
            file = self._file(batch, ".out")
            await self._call(lambda file_id=file_id, file=file: self._download(file_id, file))  # type: ignore[misc]
            with open(file, "rb") as lines:
                for line in lines:
                    attempt, reply = _read_line(line, self.client)
                    if attempt in waiting:
                        statements += self._settle(attempt, *waiting.pop(attempt), reply)
                    if len(statements) >= _LINES_AT_ONCE:
                        await self.work.journal.write(*statements)
                        statements = []
            file.unlink()
        for attempt, (request, at_risk) in waiting.items():
            reply = EndpointReply(outcomes.EXPIRED, error="the batch ended without an answer to this line")
            statements += self._settle(attempt, request, at_risk, reply)
        batch.state = "collected"
        await self.work.journal.write(*statements)
        await self._save(batch)

    async def _download(self, file_id: str, file: Path) -> None:
        slow = self.client.api.with_options(timeout=_UPLOAD_SECONDS)
        async with slow.files.with_streaming_response.content(file_id) as response:
            with open(file, "wb") as out:
                async for data in response.iter_bytes():
                    out.write(data)

    def _settle(self, attempt: int, request: Request, bound: float, reply: EndpointReply) -> list[Statement]:
        """The statements for one line, and what it means for budget and progress."""
        cost, at_risk = bill(self.agent, reply, bound, batch=True)
        self.work.budget.settle(0.0, cost + at_risk - bound)
        verdict = self._verdict(request, reply)
        self.work.progress.attempt(verdict.outcome, cost + at_risk)
        if reply.input_tokens is not None and reply.output_tokens is not None:
            self.expectation.observe(request.text_bytes, request.image_tokens, reply.input_tokens, reply.output_tokens)
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
        freed = self.work.run.db.execute(
            "SELECT coalesce(sum(at_risk), 0) FROM attempts WHERE batch = ? AND outcome IS NULL", (batch.id,)
        ).fetchone()[0]
        self.work.budget.settle(0.0, -freed)
        await self.work.journal.write(*_abandon(batch.id, why, outcome))
        self._file(batch).unlink(missing_ok=True)


class _Stopped(Exception):
    """Leaves an agent's batches as they are: the run stops."""


def _read_line(line: bytes, client: Client) -> tuple[int, EndpointReply]:
    """A line of an output or error file: the attempt that it answers (0: none of ours) and the reply."""
    try:
        entry = json.loads(line)
        attempt = int(entry["custom_id"].removeprefix("attempt-"))
    except (ValueError, TypeError, KeyError, AttributeError):
        return 0, EndpointReply(outcomes.MALFORMED)
    try:
        response, error = entry.get("response"), entry.get("error") or {}
        if response and response.get("body") is not None:
            raw = json.dumps(response["body"], ensure_ascii=True, separators=(",", ":"))
            status = int(response["status_code"])
            return attempt, outcomes.read(status, client.scrub.error(raw) if status >= 400 else client.scrub(raw))
        words = outcomes.one_line(client.scrub.error(f"{error.get('code')}: {error.get('message')}"))
        outcome = outcomes.EXPIRED if error.get("code") == "batch_expired" else outcomes.SERVER_ERROR
        return attempt, EndpointReply(outcome, error=words)
    except (ValueError, TypeError, KeyError, AttributeError):
        return attempt, EndpointReply(outcomes.MALFORMED, error="the line is malformed", may_be_billed=True)
