"""Judges of kinds `rubric` and `verdict`: they see all responses of an instruction together, in a recorded order, and
rate each by a rubric, or name the best; a parser reads what they say."""

import math
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.judging.aggregate import Judgement, judge
from data_prep.judging.ratings import parse
from data_prep.judging.rubric import FORMS, Rubric, Scale, load_rubric
from data_prep.run import RATE, Gathered, Instruction, Run
from silkie_jax.endpoints import outcomes
from silkie_jax.endpoints.agents import Agent, check_agent
from silkie_jax.endpoints.attempts import Request, Verdict, new_request
from silkie_jax.endpoints.client import Route
from silkie_jax.endpoints.journal import Statement
from silkie_jax.endpoints.messages import compose, image_tokens
from silkie_jax.endpoints.outcomes import EndpointReply
from silkie_jax.errors import UserError
from silkie_jax.yaml_files import make

_OUTCOMES = {
    "complete": outcomes.OK,
    "missing": "incomplete",
    "refusal": outcomes.REFUSAL,
    "truncated": outcomes.TRUNCATED,
    "unparsable": "unparsable",
}


@dataclass
class Judge:
    """Who rates, by which rubric, in which orders."""

    agent: Agent
    name: str = ""  # by default the model's
    kind: str | None = None  # rubric or verdict; by default what its rubric is
    rubric: str = "vlfeedback"  # a rubric of this project, or a file
    form: str = "text"  # of the reply: text, or json where the endpoint supports structured output
    orders: int = 1  # orders of the responses that are rated and averaged; as many as responses: each at every place
    seed: int = 0
    parse_attempts: int = 2  # requests for a reply that can be parsed


class RubricJudge:
    """How it asks; see `kinds.Asking`."""

    free = ("orders", "parse_attempts")
    routes: Mapping[str, Route] = {}

    def __init__(self, given: Mapping[str, Any], path: str | os.PathLike[str]):
        judge = make(given, Judge, str(path))
        check_agent(judge.agent, path, "agent.")
        judge.name = judge.name or judge.agent.model or Path(judge.agent.local or "").name
        if judge.form not in FORMS:
            raise UserError(f"{path}: form: {judge.form!r} is unknown; choose {' or '.join(FORMS)}")
        for key in ("orders", "parse_attempts"):
            if getattr(judge, key) < 1:
                raise UserError(f"{path}: {key} must be at least 1, not {getattr(judge, key)}")
        self.judge, self.name, self.agents = judge, judge.name, {judge.name: judge.agent}
        self.rubric = load_rubric(judge.rubric, Path(path).parent)
        _check_kind(judge, self.rubric, path)

    def settings(self) -> dict[str, Any]:
        return asdict(self.judge) | {"rubric": asdict(self.rubric)}

    def requests(self, run: Run, gathered: Gathered, skipped: Counter[str]) -> Iterator[Statement]:
        if _planned(run, gathered, self.judge) >= self.judge.orders:
            return
        if self.rubric.reference and not reference_of(gathered.instruction):
            skipped["no reference"] += 1
            return
        for order, arrangement in enumerate(arrangements(self.judge, gathered)):
            yield self._request(run, gathered, order, arrangement)

    def _request(self, run: Run, gathered: Gathered, order: int, arrangement: tuple[int, ...]) -> Statement:
        judge, instruction = self.judge, gathered.instruction
        texts = {response.slot: response.text for response in gathered.responses}
        prompt = self.rubric.prompt(
            instruction.prompt,
            [texts[slot] for slot in arrangement],
            judge.form,  # type: ignore[arg-type]
            history=instruction.history,
            images=len(instruction.images),
            reference=reference_of(instruction),
        )
        schema = self.rubric.response_format(len(arrangement)) if judge.form == "json" else None
        body = compose(judge.agent, prompt, instruction.images, response_format=schema)
        tokens = image_tokens(judge.agent, [run.image_size(sha256) for sha256 in instruction.images])
        return new_request(RATE, instruction.number, judge.name, order, arrangement, body, tokens)

    def review(self, request: Request, reply: EndpointReply, number: int) -> Verdict:
        """The parser decides; a reply that it cannot use is asked for again where that can help."""
        if reply.status is None or reply.status >= 400 or reply.outcome in (outcomes.REFUSAL, outcomes.CONTENT_FILTER):
            return Verdict(reply.outcome, "failed")
        texts = request.arrangement.count(",") + 1 if request.arrangement else 0
        parsed = parse(reply.text, self.rubric, texts, finish_reason=reply.finish_reason)
        if parsed.retry and number < self.judge.parse_attempts:
            return Verdict(_OUTCOMES[parsed.kind], "again")
        return Verdict(_OUTCOMES[parsed.kind], "ok" if parsed.usable else "failed")


def _check_kind(judge: Judge, rubric: Rubric, path: str | os.PathLike[str]) -> None:
    """Refuses a judge whose kind or form is not its rubric's."""
    kind = "verdict" if rubric.verdict else "rubric"
    if judge.kind not in (None, kind):
        mend = f"rubric {rubric.name} has {'no ' if not rubric.verdict else ''}verdict: true"
        raise UserError(f"{path}: kind: {judge.kind!r} is not {kind!r}: {mend}")
    if judge.form not in rubric.forms:
        raise UserError(f"{path}: form: a verdict is asked for as a text: leave out form: {judge.form}")


def reference_of(instruction: Instruction) -> str:
    """The answer that an instruction's source gave; "" for none."""
    found = instruction.extra.get("reference")
    return found if isinstance(found, str) else ""


def _planned(run: Run, gathered: Gathered, judge: Judge) -> int:
    key = (RATE, gathered.instruction.number, judge.name)
    sql = "SELECT count(*) FROM requests WHERE stage = ? AND instruction = ? AND agent = ?"
    return run.db.execute(sql, key).fetchone()[0]


def arrangements(judge: Judge, gathered: Gathered) -> list[tuple[int, ...]]:
    """The orders in which a judge sees the responses, as slots: the same for the same seed, judge and instruction.

    A shuffled order and its rotations: with as many orders as responses, each response stands once at every place.
    Beyond that come another shuffle and its rotations, and none is repeated while there are others.
    """
    slots = [response.slot for response in gathered.responses]
    lots = random.Random(f"{judge.seed} {judge.name} {gathered.instruction.id}")
    orders: list[tuple[int, ...]] = []
    used: set[tuple[int, ...]] = set()
    while len(orders) < judge.orders:
        lots.shuffle(slots)
        rotations = [(*slots[turn:], *slots[:turn]) for turn in range(len(slots))]
        if min(rotations) in used and len(used) < math.factorial(len(slots) - 1):
            continue
        used.add(min(rotations))
        orders += rotations
    return orders[: judge.orders]


@dataclass(frozen=True)
class RubricReading:
    """What its replies come to; see `kinds.Reading`."""

    judge: str
    rubric: Rubric = field(compare=False)

    @classmethod
    def of(cls, judge: str, kept: Mapping[str, Any]) -> "RubricReading":
        return cls(judge, make(kept, Rubric, f"judge {judge}"))

    @staticmethod
    def kept(settings: Mapping[str, Any]) -> dict[str, Any]:
        return asdict(make(settings["rubric"], Rubric, "the rubric of a run's judge"))  # as this version writes it

    @property
    def names(self) -> list[str]:
        return self.rubric.names

    @property
    def weights(self) -> dict[str, float]:
        return self.rubric.weights

    @property
    def scale(self) -> Scale | None:
        return self.rubric.scale

    @property
    def verdict(self) -> bool:
        return self.rubric.verdict

    @property
    def asked(self) -> tuple[str, ...]:
        return (self.judge,)

    def judgements(self, gathered: Gathered) -> list[Judgement]:
        places = {response.slot: index for index, response in enumerate(gathered.responses)}
        mine = [reply for reply in gathered.replies if reply.judge == self.judge]
        return [judge(reply, self.rubric, places, len(gathered.responses)) for reply in mine]
