"""Ratings: judges see the responses of an instruction together, in a recorded order, and rate each by a rubric."""

import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.judging.ratings import parse
from data_prep.judging.rubric import FORMS, Rubric, load_rubric
from data_prep.run import RATE, RESPOND, Gathered, Instruction, Run
from silkie_jax.endpoints import outcomes
from silkie_jax.endpoints.agents import Agent, check_agent, check_same
from silkie_jax.endpoints.attempts import Request, Verdict, new_request
from silkie_jax.endpoints.journal import Statement
from silkie_jax.endpoints.messages import compose, image_tokens
from silkie_jax.endpoints.outcomes import EndpointReply
from silkie_jax.endpoints.progress import planning
from silkie_jax.endpoints.stage import Options, StageResult, run_stage
from silkie_jax.errors import UserError
from silkie_jax.yaml_files import load_yaml, make

_FREE = ("orders", "parse_attempts")  # may change within a run
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


def load_judge(path: str | os.PathLike[str]) -> Judge:
    """Reads and checks a judge.

    Raises:
        UserError: one line that names the file, the key and the mend.
    """
    judge = load_yaml(path, Judge)
    check_agent(judge.agent, path, "agent.")
    judge.name = judge.name or judge.agent.model or Path(judge.agent.local or "").name
    if judge.form not in FORMS:
        raise UserError(f"{path}: form: {judge.form!r} is unknown; choose {' or '.join(FORMS)}")
    for key in ("orders", "parse_attempts"):
        if getattr(judge, key) < 1:
            raise UserError(f"{path}: {key} must be at least 1, not {getattr(judge, key)}")
    return judge


def rate(
    path: str | os.PathLike[str],
    judge_paths: Sequence[str | os.PathLike[str]],
    options: Options | None = None,
    *,
    allow_missing: bool = False,
) -> StageResult:
    """Asks judges about the responses of a run; run the same call again to continue where one ended.

    Args:
        path: the run.
        judge_paths: a YAML file for each judge.
        allow_missing: also rate instructions some of whose responses are still to come.

    Raises:
        UserError, KeyboardInterrupt: as `run_stage`.
    """
    options = options or Options()
    judges: dict[str, tuple[Judge, Rubric]] = {}
    for judge_path in judge_paths:
        judge = load_judge(judge_path)
        if judge.name in judges:
            raise UserError(f"{judge_path}: there are two judges {judge.name!r}: give each a name of its own")
        rubric = load_rubric(judge.rubric, Path(judge_path).parent)
        _check_kind(judge, rubric, judge_path)
        judges[judge.name] = judge, rubric
    with Run.open(path, write=True) as run:
        if not run.settings("pool"):
            raise UserError(f"the run {path} holds no responses: make some with `silkie corpus respond`")
        configs = {name: asdict(judge) | {"rubric": asdict(rubric)} for name, (judge, rubric) in judges.items()}
        for name, config in configs.items():
            if before := run.settings(f"judge:{name}"):
                before["rubric"] = asdict(make(before["rubric"], Rubric))  # with the defaults of keys that are newer
                check_same(before, config, f"judge {name}", _FREE)
        skipped = Counter[str]()

        def plan() -> None:
            for name, config in configs.items():
                run.save_settings(f"judge:{name}", config)
            for gathered in ready(planning(run.gathered(), run.count(), options.progress), run, allow_missing, skipped):
                for judge, rubric in judges.values():
                    if _planned(run, gathered, judge) >= judge.orders:
                        continue
                    if rubric.reference and not reference_of(gathered.instruction):
                        skipped["no reference"] += 1
                        continue
                    for order, arrangement in enumerate(arrangements(judge, gathered)):
                        run.db.execute(*_request(run, gathered, judge, rubric, order, arrangement))

        agents = {name: judge.agent for name, (judge, _) in judges.items()}
        outcome = run_stage(run, RATE, agents, plan, _reviewer(judges), options)
        return StageResult(**{**vars(outcome), "notes": tuple(_notes(skipped))})


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


def ready(every: Iterable[Gathered], run: Run, allow_missing: bool, skipped: Counter[str]) -> Iterator[Gathered]:
    """Instructions whose responses are all settled and at least two; counts the others."""
    open_states = "('open', 'postponed')"
    for gathered in every:
        waiting = run.db.execute(
            f"SELECT 1 FROM requests WHERE stage = ? AND instruction = ? AND state IN {open_states} LIMIT 1",
            (RESPOND, gathered.instruction.number),
        ).fetchone()
        if waiting and not allow_missing:
            skipped["waiting"] += 1
        elif len(gathered.responses) < 2:
            skipped["too few"] += 1
        else:
            yield gathered


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


def _request(
    run: Run, gathered: Gathered, judge: Judge, rubric: Rubric, order: int, arrangement: tuple[int, ...]
) -> Statement:
    instruction = gathered.instruction
    texts = {response.slot: response.text for response in gathered.responses}
    prompt = rubric.prompt(
        instruction.prompt,
        [texts[slot] for slot in arrangement],
        judge.form,  # type: ignore[arg-type]
        history=instruction.history,
        images=len(instruction.images),
        reference=reference_of(instruction),
    )
    schema = rubric.response_format(len(arrangement)) if judge.form == "json" else None
    body = compose(judge.agent, prompt, instruction.images, response_format=schema)
    tokens = image_tokens(judge.agent, [run.image_size(sha256) for sha256 in instruction.images])
    return new_request(RATE, instruction.number, judge.name, order, arrangement, body, tokens)


def _reviewer(judges: dict[str, tuple[Judge, Rubric]]) -> Callable[[str, Request, EndpointReply, int], Verdict]:
    def review(name: str, request: Request, reply: EndpointReply, number: int) -> Verdict:
        """The parser decides; a reply that it cannot use is asked for again where that can help."""
        if reply.status is None or reply.status >= 400 or reply.outcome in (outcomes.REFUSAL, outcomes.CONTENT_FILTER):
            return Verdict(reply.outcome, "failed")
        judge, rubric = judges[name]
        texts = request.arrangement.count(",") + 1 if request.arrangement else 0
        parsed = parse(reply.text, rubric, texts, finish_reason=reply.finish_reason)
        if parsed.retry and number < judge.parse_attempts:
            return Verdict(_OUTCOMES[parsed.kind], "again")
        return Verdict(_OUTCOMES[parsed.kind], "ok" if parsed.usable else "failed")

    return review


def _notes(skipped: Counter[str]) -> Iterator[str]:
    if skipped["waiting"]:
        yield (
            f"{skipped['waiting']:,} instructions wait for responses: finish `silkie corpus respond` first, "
            "or add --allow-missing"
        )
    if skipped["too few"]:
        yield f"{skipped['too few']:,} instructions have fewer than two responses and are not rated"
    if skipped["no reference"]:
        yield (
            f"{skipped['no reference']:,} times a judge that is shown the right answer was not asked: "
            "their instructions have no `reference`"
        )
