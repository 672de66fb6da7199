"""A run of data_prep: its instructions, the models' responses to them, and the judges' replies to those."""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from data_prep.sentences import Candidate, Search, Sentence, grow, paths, text_of
from silkie_jax.endpoints.store import RunStore, to_json
from silkie_jax.errors import UserError

RESPOND, RATE, SYNTHESIZE, SEARCH = "respond", "rate", "synthesize", "search"
"""The stages of a run, by the names of their verbs; of `respond` is `search`, too, whose `slot` is the number of the
sentence that is continued (`sentences`). A response's `slot` is its place, its `arrangement` names the
models that step in should it fail; a rating's `slot` is the number of the order, its `arrangement` the slots of the
responses as shown."""
_CHUNK = 256  # instructions read at a time


@dataclass(frozen=True)
class Instruction:
    """One instruction: `images` are SHA-256 of files added to the run, `number` its place in the run, from 1."""

    id: str
    prompt: str
    images: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    source: str = ""
    licence: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    number: int = 0


@dataclass(frozen=True)
class StoredResponse:
    """One response: `agent` is the pool's name of the model, `model` the name that its server reported."""

    slot: int
    agent: str
    model: str
    text: str
    outcome: str
    output_tokens: int | None


@dataclass(frozen=True)
class JudgeReply:
    """One settled request to a judge.

    Attributes:
        judge: its name in the configuration.
        order: which of the orders in which the responses were shown, from 0.
        arrangement: slots of the responses as shown: "Text n" is the response of slot `arrangement[n - 1]`.
        text: the raw reply; "" where there is none.
        outcome: one of `silkie_jax.endpoints.outcomes` or of the parser; "ok" for a usable reply.
        finish_reason, model: as reported.
    """

    judge: str
    order: int
    arrangement: tuple[int, ...]
    text: str
    outcome: str
    finish_reason: str
    model: str


@dataclass(frozen=True)
class TeacherReply:
    """One settled request to a teacher; fields as a judge's."""

    teacher: str
    text: str
    outcome: str
    finish_reason: str
    model: str


def similar_name(model: str) -> str:
    """The name under which the likeness of a searching model's sentences is filed."""
    return f"{model}: similarity"


def search_of(settings: Mapping[str, Any]) -> Search:
    """How a tree grows, from the settings of a pool's model."""
    return Search(**{field.name: settings[field.name] for field in fields(Search)})


def candidates_in(text: str) -> list[Candidate]:
    """The candidates of a search's reply, as `outcomes.read_candidates` writes them."""
    return [Candidate(one["text"], one["logprob"], one["finish"]) for one in json.loads(text)]


def similarities_in(text: str) -> list[float]:
    """100 x cosine of an image and each text, from a similarity reply; [] of one that says something else."""
    try:
        return [float(entry["similarity"]) for entry in json.loads(text)]
    except (ValueError, TypeError, KeyError):
        return []


@dataclass(frozen=True)
class Gathered:
    """All there is of an instruction: responses by slot, replies by judge and order, those of a teacher, and the trees
    of models that searched."""

    instruction: Instruction
    responses: tuple[StoredResponse, ...]
    replies: tuple[JudgeReply, ...]
    syntheses: tuple[TeacherReply, ...] = ()
    trees: Mapping[str, tuple[Sentence, ...]] = field(default_factory=dict)

    def way(self, response: StoredResponse) -> list[Sentence] | None:
        """The sentences of a response that a search made; None of another."""
        tree = self.trees.get(response.agent, ())
        return next((path for path in paths(tree) if slot_of(path) == response.slot), None)


def slot_of(path: Sequence[Sentence]) -> int:
    """The slot of a response that a search made: beyond those of responses that were asked for whole."""
    return SEARCHED + path[-1].number


SEARCHED = 1000


class Run(RunStore):
    """A run's folder (see `RunStore`) with its instructions and what came of them."""

    made_by = "silkie corpus instructions"
    tables = """
CREATE TABLE instructions (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, history TEXT NOT NULL,
    images TEXT NOT NULL, source TEXT NOT NULL, licence TEXT NOT NULL, extra TEXT NOT NULL
);
"""

    # Instructions

    def write_instructions(self, instructions: Iterable[Instruction], settings: Mapping[str, Any]) -> int:
        """Stores all instructions of the run at once, or leaves those that the same settings gave before.

        Returns:
            how many there are.

        Raises:
            UserError: requests were planned for other instructions, or an id comes twice.
        """
        if self.settings("instructions") == json.loads(to_json(settings)):
            return self.count()
        with self.transaction():
            if self.db.execute("SELECT 1 FROM requests LIMIT 1").fetchone():
                raise UserError(
                    f"the run {self.path} has requests for the instructions that it holds: "
                    "make a new run for other instructions"
                )
            self.db.execute("DELETE FROM instructions")
            rows = (_to_row(number, instruction) for number, instruction in enumerate(instructions, start=1))
            try:
                self.db.executemany("INSERT INTO instructions VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            except sqlite3.IntegrityError as error:
                raise UserError(f"two instructions share an id ({error}): give each its own") from None
            self.save_settings("instructions", settings)
        return self.count()

    def count(self) -> int:
        """The number of instructions."""
        return self.db.execute("SELECT count(*) FROM instructions").fetchone()[0]

    def check_instructions(self) -> None:
        """Refuses a run that has none.

        Raises:
            UserError: says how to add some.
        """
        if not self.count():
            raise UserError(f"the run {self.path} holds no instructions: add some with `silkie corpus instructions`")

    def instructions(self, first: int = 1, last: int | None = None) -> Iterator[Instruction]:
        """Instructions from number `first` to `last`, in order; memory stays flat."""
        end = 2**62 if last is None else last
        while first <= end:
            rows = self.db.execute(
                "SELECT * FROM instructions WHERE number BETWEEN ? AND ? ORDER BY number LIMIT ?", (first, end, _CHUNK)
            ).fetchall()
            if not rows:
                return
            yield from map(_from_row, rows)
            first = rows[-1][0] + 1

    # What came of them

    def gathered(self, first: int = 1, last: int | None = None) -> Iterator[Gathered]:
        """Instructions with their responses and the judges' replies, in order; memory stays flat.

        The same replies give the same sequence, however often the run was interrupted or an attempt repeated.
        """
        chunk: list[Instruction] = []
        for instruction in self.instructions(first, last):
            chunk.append(instruction)
            if len(chunk) == _CHUNK:
                yield from self._gather(chunk)
                chunk = []
        yield from self._gather(chunk)

    def _gather(self, chunk: list[Instruction]) -> Iterator[Gathered]:
        if not chunk:
            return
        between = chunk[0].number, chunk[-1].number
        responses: dict[int, list[StoredResponse]] = {}
        for number, *values in self.db.execute(
            "SELECT r.instruction, r.slot, r.agent, a.model, a.text, a.outcome, a.output_tokens "
            "FROM requests r JOIN attempts a ON a.id = r.attempt "
            "WHERE r.stage = ? AND r.state = 'ok' AND r.instruction BETWEEN ? AND ? ORDER BY 1, 2",
            (RESPOND, *between),
        ):
            responses.setdefault(number, []).append(StoredResponse(*values))
        replies: dict[int, list[JudgeReply]] = {}
        for number, judge, order, arrangement, *values in self.db.execute(
            "SELECT r.instruction, r.agent, r.slot, r.arrangement, coalesce(a.text, ''), a.outcome, "
            "coalesce(a.finish_reason, ''), coalesce(a.model, '') "
            "FROM requests r JOIN attempts a ON a.id = r.attempt "
            "WHERE r.stage = ? AND r.state IN ('ok', 'failed') AND r.instruction BETWEEN ? AND ? ORDER BY 1, 2, 3",
            (RATE, *between),
        ):
            replies.setdefault(number, []).append(JudgeReply(judge, order, tuple(json.loads(arrangement)), *values))
        syntheses: dict[int, list[TeacherReply]] = {}
        for number, *values in self.db.execute(
            "SELECT r.instruction, r.agent, coalesce(a.text, ''), a.outcome, coalesce(a.finish_reason, ''), "
            "coalesce(a.model, '') FROM requests r JOIN attempts a ON a.id = r.attempt "
            "WHERE r.stage = ? AND r.state IN ('ok', 'failed') AND r.instruction BETWEEN ? AND ? ORDER BY 1, 2",
            (SYNTHESIZE, *between),
        ):
            syntheses.setdefault(number, []).append(TeacherReply(*values))
        trees = self._trees(between)
        for instruction in chunk:
            of = instruction.number
            found = responses.get(of, [])
            for agent, (tree, model) in trees.get(of, {}).items():
                ways: dict[str, Sequence[Sentence]] = {}
                for path in paths(tree):
                    ways.setdefault(text_of(path), path)  # a text that several ways make is one response
                found += [
                    StoredResponse(slot_of(path), agent, model, text, "ok", None) for text, path in ways.items() if text
                ]
            yield Gathered(
                instruction, tuple(found), tuple(replies.get(of, ())), tuple(syntheses.get(of, ())),
                {agent: tree for agent, (tree, _) in trees.get(of, {}).items()},
            )  # fmt: skip

    def _trees(self, between: tuple[int, int]) -> dict[int, dict[str, tuple[tuple[Sentence, ...], str]]]:
        """Number of an instruction -> agent -> the tree of its search and the model that was reported."""
        pool = self.settings("pool") or {}
        searches = {name: model["search"] for name, model in pool.get("models", {}).items() if model.get("search")}
        if not searches:
            return {}
        asked: dict[tuple[int, str], tuple[dict[int, list[Candidate]], dict[int, list[float]], str]] = {}
        names = {name: (name, 0) for name in searches} | {similar_name(name): (name, 1) for name in searches}
        for number, agent, slot, state, text, model in self.db.execute(
            "SELECT r.instruction, r.agent, r.slot, r.state, coalesce(a.text, ''), coalesce(a.model, '') "
            "FROM requests r JOIN attempts a ON a.id = r.attempt "
            "WHERE r.stage = ? AND r.state IN ('ok', 'failed') AND r.instruction BETWEEN ? AND ? ORDER BY 1, 2, 3",
            (SEARCH, *between),
        ):
            name, kind = names[agent]
            replies, likeness, reported = asked.setdefault((number, name), ({}, {}, model))
            if kind == 0:
                replies[slot] = candidates_in(text) if state == "ok" else []
            else:
                likeness[slot] = similarities_in(text) if state == "ok" else []
        found: dict[int, dict[str, tuple[tuple[Sentence, ...], str]]] = {}
        for (number, name), (replies, likeness, reported) in asked.items():
            grown = grow(search_of(searches[name]), replies, likeness)
            found.setdefault(number, {})[name] = grown.tree, reported
        return found


def _to_row(number: int, instruction: Instruction) -> tuple[Any, ...]:
    return (
        number,
        instruction.id,
        instruction.prompt,
        to_json(instruction.history),
        to_json(instruction.images),
        instruction.source,
        instruction.licence,
        to_json(dict(instruction.extra)),
    )


def _from_row(row: tuple[Any, ...]) -> Instruction:
    number, id, prompt, history, images, source, licence, extra = row
    return Instruction(
        id=id,
        prompt=prompt,
        images=tuple(json.loads(images)),
        history=tuple((user, assistant) for user, assistant in json.loads(history)),
        source=source,
        licence=licence,
        extra=json.loads(extra),
        number=number,
    )
