"""Asking judges through `endpoints`: every request and reply is kept, and none is paid for twice.

A dialogue is known by what it first asks (the answer and the prompt are in it) and of whom; so an answer that changed
is asked about anew, and one that did not is not, whatever else was scored in between. The next request of a dialogue is
stored together with the reply that calls for it: a run killed at any moment goes on where it was.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from silkie_jax.endpoints import outcomes
from silkie_jax.endpoints.agents import Agent, check_agent
from silkie_jax.endpoints.attempts import Request, Verdict, new_request
from silkie_jax.endpoints.journal import Statement
from silkie_jax.endpoints.messages import compose
from silkie_jax.endpoints.outcomes import EndpointReply
from silkie_jax.endpoints.stage import Options, StageResult, run_stage
from silkie_jax.endpoints.store import RunStore, to_json
from silkie_jax.evaluation.benchmark import Answer, Ask, Dialogue, Exchange, Item, Replies, Settings
from silkie_jax.evaluation.table import find_benchmark
from silkie_jax.yaml_files import load_yaml, read_yaml

_ASIDE = "aside"  # the state of requests about answers that changed before they were sent
_CHUNK = 500


@dataclass
class Judge:
    """Who is asked. What a benchmark prescribes is sent unless the agent says otherwise: its `max_tokens` and `system`
    where they are set, and whatever stands in `sampling` (`temperature: null` leaves it out)."""

    agent: Agent
    name: str = ""  # by default the model's


class JudgeRun(RunStore):
    """A run's folder (see `RunStore`) with its dialogues: `asked` is the hash of the first request."""

    made_by = "silkie evaluate judge"
    tables = """
CREATE TABLE dialogues (
    number INTEGER PRIMARY KEY, benchmark TEXT NOT NULL, key TEXT NOT NULL, asked TEXT NOT NULL, run INTEGER NOT NULL,
    UNIQUE (benchmark, key, asked, run)
);
"""


def load_judge(path: Path) -> tuple[Judge, bool]:
    """Reads and checks a judge; also says whether the file sets max_tokens.

    Raises:
        UserError: one line that names the file, the key and the mend.
    """
    judge = load_yaml(path, Judge)
    check_agent(judge.agent, path, "agent.")
    judge.name = judge.name or judge.agent.model or Path(judge.agent.local or "").name
    return judge, "max_tokens" in (read_yaml(path).get("agent") or {})


def judge(
    benchmark_name: str,
    items: list[Item],
    answers: list[Answer],
    settings: Settings,
    config_path: Path,
    run_dir: Path,
    options: Options | None = None,
    runs: int = 1,
    report: Callable[[StageResult], None] | None = None,
) -> Replies:
    """Asks a judge what a benchmark wants to know about answers; the same call continues one that was interrupted.

    Args:
        config_path: a judge's YAML file.
        run_dir: where requests and replies are kept; several benchmarks, answers and judges may share one.
        runs: how often each dialogue is held.
        report: is told what was done, and what it cost.

    Returns:
        All replies; of a dry run, those that are there already.

    Raises:
        UserError, KeyboardInterrupt: as `run_stage`.
    """
    options = options or Options()
    judge_, own_length = load_judge(config_path)
    dialogues = find_benchmark(benchmark_name).dialogues(items, answers, settings)
    agent = judge_.agent
    firsts = {key: ask for key, dialogue in dialogues.items() if (ask := dialogue([])) is not None}
    if not own_length:
        # No reply is longer than the longest that is asked for: what a budget sets aside.
        agent = replace(
            agent, max_tokens=max((ask.max_tokens or agent.max_tokens for ask in firsts.values()), default=1)
        )
    with JudgeRun.create(run_dir) as run:
        talk = _Talk(run, benchmark_name, judge_.name, agent, own_length, dialogues)
        numbers: dict[tuple[str, int], int] = {}

        def plan() -> None:
            numbers.update(talk.plan(firsts, runs))

        if firsts:
            result = run_stage(run, benchmark_name, {judge_.name: agent}, plan, talk.review, options)
            if report:
                report(result)
        known = talk.find(firsts, runs) if options.dry_run else numbers
        return talk.replies(known)


@dataclass
class _Talk:
    """The dialogues of one call."""

    run: RunStore
    benchmark: str
    name: str
    agent: Agent
    own_length: bool
    dialogues: Mapping[str, Dialogue]

    def __post_init__(self) -> None:
        self._keys: dict[int, str] = {}  # number of a dialogue of this call -> key

    def plan(self, firsts: Mapping[str, Ask], runs: int) -> dict[tuple[str, int], int]:
        """Stores what is to be asked now, and sets aside what waits to be asked about other answers."""
        db = self.run.db
        for key, run, asked in self._wanted(firsts, runs):
            row = (self.benchmark, key, asked, run)
            db.execute("INSERT OR IGNORE INTO dialogues (benchmark, key, asked, run) VALUES (?, ?, ?, ?)", row)
        numbers = self.find(firsts, runs)
        db.execute(
            "UPDATE requests SET state = ? WHERE stage = ? AND state IN ('open', 'postponed')", (_ASIDE, self.benchmark)
        )
        for (key, _), number in numbers.items():
            self._keys[number] = key
            db.execute(
                "UPDATE requests SET state = 'open' WHERE stage = ? AND instruction = ? AND agent = ? AND state = ?",
                (self.benchmark, number, self.name, _ASIDE),
            )
            texts = self._texts(number)
            if texts is not None and (ask := self.dialogues[key](texts)) is not None:
                db.execute(*self._request(number, len(texts), ask))
        return numbers

    def find(self, firsts: Mapping[str, Ask], runs: int) -> dict[tuple[str, int], int]:
        """(key, run) -> number of the dialogue, of those that were stored."""
        found = {}
        for key, run, asked in self._wanted(firsts, runs):
            row = self.run.db.execute(
                "SELECT number FROM dialogues WHERE benchmark = ? AND key = ? AND asked = ? AND run = ?",
                (self.benchmark, key, asked, run),
            ).fetchone()
            if row:
                found[key, run] = row[0]
        return found

    def _wanted(self, firsts: Mapping[str, Ask], runs: int) -> list[tuple[str, int, str]]:
        asked = {key: self._hash(ask) for key, ask in firsts.items()}
        return [(key, run, asked[key]) for run in range(runs) for key in firsts]

    def _hash(self, ask: Ask) -> str:
        """Of what is sent, and of whom it is asked."""
        return hashlib.sha256(to_json([self.name, self.agent.local, self._body(ask)]).encode()).hexdigest()

    def _body(self, ask: Ask) -> dict[str, Any]:
        length = self.agent.max_tokens if self.own_length else ask.max_tokens or self.agent.max_tokens
        agent = replace(self.agent, max_tokens=length, system=self.agent.system or ask.system)
        body = compose(agent, ask.user, ())
        body = {key: value for key, value in ({"temperature": ask.temperature} | body).items() if value is not None}
        # JSON can spell lone surrogates, which nothing can store or send.
        return json.loads(to_json(body).encode("utf-8", "replace"))

    def _request(self, number: int, step: int, ask: Ask) -> Statement:
        return new_request(self.benchmark, number, self.name, step, None, self._body(ask), 0)

    def _texts(self, number: int, before: int = 2**31) -> list[str] | None:
        """The replies of a dialogue so far, up to a step; None where one is open or failed."""
        rows = self.run.db.execute(
            "SELECT r.slot, r.state, a.text FROM requests r LEFT JOIN attempts a ON a.id = r.attempt "
            "WHERE r.stage = ? AND r.agent = ? AND r.instruction = ? AND r.slot < ? ORDER BY 1",
            (self.benchmark, self.name, number, before),
        ).fetchall()
        return [text or "" for _, _, text in rows] if all(state == "ok" for _, state, _ in rows) else None

    def review(self, name: str, request: Request, reply: EndpointReply, number: int) -> Verdict:
        """Every text is a reply; what the dialogue asks next is stored with it."""
        if reply.outcome not in (outcomes.OK, outcomes.TRUNCATED):
            return Verdict(reply.outcome, "failed")
        key = self._keys.get(request.item)
        before = self._texts(request.item, request.slot)
        if key is None or before is None:  # of a batch that was sent about another answer
            return Verdict(reply.outcome, "ok")
        ask = self.dialogues[key]([*before, reply.text])
        also = (self._request(request.item, request.slot + 1, ask),) if ask is not None else ()
        return Verdict(reply.outcome, "ok", also)

    def replies(self, numbers: Mapping[tuple[str, int], int]) -> Replies:
        """What there is of these dialogues, in their order."""
        rows: dict[int, list[tuple[Any, ...]]] = {}
        wanted = list(numbers.values())
        for start in range(0, len(wanted), _CHUNK):
            chunk = wanted[start : start + _CHUNK]
            for number, *row in self.run.db.execute(
                "SELECT r.instruction, r.state, a.outcome, a.text, a.model FROM requests r LEFT JOIN attempts a "
                f"ON a.id = r.attempt WHERE r.stage = ? AND r.agent = ? AND r.instruction IN ({_marks(chunk)}) "
                "ORDER BY r.instruction, r.slot",
                (self.benchmark, self.name, *chunk),
            ):
                rows.setdefault(number, []).append(tuple(row))
        exchanges = []
        for (key, run), number in numbers.items():
            found = rows.get(number, [])
            said = [row for row in found if row[0] == "ok"]
            lost = [outcome for state, outcome, _, _ in found if state == "failed"]
            if found and (lost or len(said) == len(found)):
                texts, models = tuple(row[2] or "" for row in said), tuple(row[3] or "" for row in said)
                exchanges.append(Exchange(key, run, texts, models, lost[0] if lost else "ok"))
        return Replies.of(exchanges)


def _marks(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))
