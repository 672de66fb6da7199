"""Batches as a run knows them, and the lines of their files: requests on the way out, replies on the way in."""

import json
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from silkie_jax.endpoints import outcomes
from silkie_jax.endpoints.journal import Statement
from silkie_jax.endpoints.outcomes import EndpointReply, Scrubber
from silkie_jax.endpoints.store import RunStore

URL: Literal["/v1/chat/completions"] = "/v1/chat/completions"


@dataclass
class RemoteBatch:
    """A row of `batches` that is not done with."""

    id: int
    name: str
    state: str
    lines: int
    file_id: str | None
    batch_id: str | None


def unfinished(db: sqlite3.Connection, stage: str | None = None, agent: str | None = None) -> list[RemoteBatch]:
    """Batches whose replies are still to come: of an agent in a stage, or all of the run."""
    rows = db.execute(
        "SELECT id, name, state, lines, file_id, batch_id FROM batches WHERE coalesce(? = stage AND ? = agent, 1) "
        "AND state IN ('composed', 'uploaded', 'submitted', 'missing') ORDER BY id",
        (stage, agent),
    )
    return [RemoteBatch(*row) for row in rows]


def at_risk(db: sqlite3.Connection, batch: RemoteBatch) -> float:
    """USD that a batch counts for until its bill is in."""
    sql = "SELECT coalesce(sum(at_risk), 0) FROM attempts WHERE batch = ? AND outcome IS NULL"
    return db.execute(sql, (batch.id,)).fetchone()[0]


def release_unsent(run: RunStore, stage: str, names: Iterable[str]) -> None:
    """Takes requests out of files that never left this machine, so that they can be sent in another way."""
    for name in names:
        rows = run.db.execute(
            "SELECT id, name FROM batches WHERE stage = ? AND agent = ? AND state = 'composed'", (stage, name)
        ).fetchall()
        for number, file in rows:
            for sql, values in abandon(number, "never sent", outcomes.LOST):
                run.db.execute(sql, values)
            (run.path / "batches" / f"{file}.jsonl").unlink(missing_ok=True)


def abandon(batch: int, why: str, outcome: str, billed: bool = False) -> list[Statement]:
    """The statements for a batch that nothing comes of: its requests are open again, and it cost nothing unless it may
    have been `billed`."""
    end = (
        "UPDATE attempts SET outcome = ?, error = ?, finished = ?, at_risk = CASE WHEN ? THEN at_risk ELSE 0 END "
        "WHERE batch = ? AND outcome IS NULL"
    )
    return [
        (end, (outcome, outcomes.one_line(why), time.time(), billed, batch)),
        ("UPDATE batches SET state = 'failed', error = ? WHERE id = ?", (outcomes.one_line(why), batch)),
    ]


def make_line(attempt: int, body: bytes) -> bytes:
    """A line of an input file: an attempt's request."""
    head = json.dumps({"custom_id": f"attempt-{attempt}", "method": "POST", "url": URL})
    return head[:-1].encode() + b', "body": ' + body + b"}\n"


def read_line(line: bytes, scrub: Scrubber) -> tuple[int, EndpointReply]:
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
            return attempt, outcomes.read(status, scrub.error(raw) if status >= 400 else scrub(raw))
        words = outcomes.one_line(scrub.error(f"{error.get('code')}: {error.get('message')}"))
        outcome = outcomes.EXPIRED if error.get("code") == "batch_expired" else outcomes.SERVER_ERROR
        return attempt, EndpointReply(outcome, error=words)
    except (ValueError, TypeError, KeyError, AttributeError):
        return attempt, EndpointReply(outcomes.MALFORMED, error="the line is malformed", may_be_billed=True)
