"""Ratings: judges see the responses of an instruction together, in a recorded order, and rate each by a rubric."""

import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from data_prep import replies
from data_prep.agents import Judge, check_same, load_judge, snapshot
from data_prep.live import Request, Verdict
from data_prep.messages import compose, image_tokens, text_bytes
from data_prep.progress import planning
from data_prep.ratings import parse
from data_prep.replies import Reply
from data_prep.rubric import Rubric, load_rubric
from data_prep.stage import Options, Outcome, run_stage
from data_prep.store import Gathered, Run, to_json
from silkie_jax.errors import UserError

STAGE = "rate"
_INSERT = (
    "INSERT OR IGNORE INTO requests (stage, instruction, agent, slot, arrangement, body, text_bytes, image_tokens) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
_OUTCOMES = {
    "complete": replies.OK,
    "missing": "incomplete",
    "refusal": replies.REFUSAL,
    "truncated": replies.TRUNCATED,
    "unparsable": "unparsable",
}


def rate(
    path: str | os.PathLike[str],
    judge_paths: Sequence[str | os.PathLike[str]],
    options: Options | None = None,
    *,
    allow_missing: bool = False,
) -> Outcome:
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
        judges[judge.name] = judge, load_rubric(judge.rubric, Path(judge_path).parent)
    with Run.open(path, write=True) as run:
        if not run.settings("pool"):
            raise UserError(f"the run {path} holds no responses: make some with `silkie corpus respond`")
        configs = {name: snapshot(judge) | {"rubric": asdict(rubric)} for name, (judge, rubric) in judges.items()}
        for name, config in configs.items():
            if before := run.settings(f"judge:{name}"):
                check_same(before, config, f"judge {name}")
        skipped = {"waiting": 0, "too few": 0}

        def plan() -> None:
            for name, config in configs.items():
                run.save_settings(f"judge:{name}", config)
            for gathered in ready(planning(run.gathered(), run, options.progress), run, allow_missing, skipped):
                for judge, rubric in judges.values():
                    if _planned(run, gathered, judge) >= judge.orders:
                        continue
                    for order, arrangement in enumerate(arrangements(judge, gathered)):
                        run.db.execute(_INSERT, _values(run, gathered, judge, rubric, order, arrangement))

        agents = {name: judge.agent for name, (judge, _) in judges.items()}
        outcome = run_stage(run, STAGE, agents, plan, _reviewer(judges), options)
        return Outcome(**{**vars(outcome), "notes": tuple(_notes(skipped))})


def ready(every: Iterable[Gathered], run: Run, allow_missing: bool, skipped: dict[str, int]) -> Iterator[Gathered]:
    """Instructions whose responses are all settled and at least two; counts the others."""
    open_states = "('open', 'postponed')"
    for gathered in every:
        waiting = run.db.execute(
            f"SELECT 1 FROM requests WHERE stage = 'respond' AND instruction = ? AND state IN {open_states} LIMIT 1",
            (gathered.instruction.number,),
        ).fetchone()
        if waiting and not allow_missing:
            skipped["waiting"] += 1
        elif len(gathered.responses) < 2:
            skipped["too few"] += 1
        else:
            yield gathered


def _planned(run: Run, gathered: Gathered, judge: Judge) -> int:
    key = (STAGE, gathered.instruction.number, judge.name)
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


def _values(
    run: Run, gathered: Gathered, judge: Judge, rubric: Rubric, order: int, arrangement: tuple[int, ...]
) -> tuple[object, ...]:
    instruction = gathered.instruction
    texts = {response.slot: response.text for response in gathered.responses}
    prompt = rubric.prompt(
        instruction.prompt,
        [texts[slot] for slot in arrangement],
        judge.form,  # type: ignore[arg-type]
        history=instruction.history,
        images=len(instruction.images),
    )
    schema = rubric.response_format(len(arrangement)) if judge.form == "json" else None
    body = compose(judge.agent, prompt, instruction.images, response_format=schema)
    tokens = image_tokens(judge.agent, [run.image_size(sha256) for sha256 in instruction.images])
    return (
        *(STAGE, instruction.number, judge.name, order, to_json(arrangement)),
        *(to_json(body), text_bytes(body), tokens),
    )


def _reviewer(judges: dict[str, tuple[Judge, Rubric]]) -> Callable[[str, Request, Reply, int], Verdict]:
    def review(name: str, request: Request, reply: Reply, number: int) -> Verdict:
        """The parser decides; a reply that it cannot use is asked for again where that can help."""
        if reply.status is None or reply.status >= 400 or reply.outcome in (replies.REFUSAL, replies.CONTENT_FILTER):
            return Verdict(reply.outcome, "failed")
        judge, rubric = judges[name]
        texts = request.arrangement.count(",") + 1 if request.arrangement else 0
        parsed = parse(reply.text, rubric, texts, finish_reason=reply.finish_reason)
        if parsed.retry and number < judge.parse_attempts:
            return Verdict(_OUTCOMES[parsed.kind], "again")
        return Verdict(_OUTCOMES[parsed.kind], "ok" if parsed.usable else "failed")

    return review


def _notes(skipped: dict[str, int]) -> Iterator[str]:
    if skipped["waiting"]:
        yield (
            f"{skipped['waiting']:,} instructions wait for responses: finish `silkie corpus respond` first, "
            "or add --allow-missing"
        )
    if skipped["too few"]:
        yield f"{skipped['too few']:,} instructions have fewer than two responses and are not rated"
