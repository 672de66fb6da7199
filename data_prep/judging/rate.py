"""Ratings: judges of several kinds look at the responses of each instruction, and what they say is kept."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from data_prep.judging.kinds import SOURCES, Asking, as_written_now, in_scope, load_judge, load_sources
from data_prep.run import RATE, RESPOND, SEARCH, Gathered, Run
from silkie_jax.endpoints.agents import check_same
from silkie_jax.endpoints.attempts import Request, Verdict
from silkie_jax.endpoints.outcomes import EndpointReply
from silkie_jax.endpoints.progress import planning
from silkie_jax.endpoints.stage import Options, StageResult, run_stage
from silkie_jax.errors import UserError


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
    judges: dict[str, Asking] = {}
    asked: dict[str, Asking] = {}
    sources: dict[str, dict[str, list[str]]] = {}  # judge -> what limits it
    for judge_path in judge_paths:
        judge = load_judge(judge_path)
        if judge.name in judges or judge.agents.keys() & asked.keys():
            raise UserError(f"{judge_path}: there are two judges {judge.name!r}: give each a name of its own")
        judges[judge.name] = judge
        sources[judge.name] = {SOURCES: named} if (named := load_sources(judge_path)) else {}
        asked |= dict.fromkeys(judge.agents, judge)
    with Run.open(path, write=True) as run:
        if not run.settings("pool"):
            raise UserError(f"the run {path} holds no responses: make some with `silkie corpus respond`")
        for name, limits in sources.items():
            _check_sources(run, name, limits.get(SOURCES, []))
        for name, judge in judges.items():
            if before := run.settings(f"judge:{name}"):
                check_same(as_written_now(before), judge.settings() | sources[name], f"judge {name}", judge.free)
        skipped = Counter[str]()

        def plan() -> None:
            for name, judge in judges.items():
                run.save_settings(f"judge:{name}", judge.settings() | sources[name])
            for gathered in ready(planning(run.gathered(), run.count(), options.progress), run, allow_missing, skipped):
                for name, judge in judges.items():
                    if not in_scope(sources[name], gathered.instruction):
                        continue
                    for request in judge.requests(run, gathered, skipped):
                        run.db.execute(*request)

        def review(name: str, request: Request, reply: EndpointReply, number: int) -> Verdict:
            return asked[name].review(request, reply, number)

        agents = {name: agent for judge in judges.values() for name, agent in judge.agents.items()}
        routes = {name: route for judge in judges.values() for name, route in judge.routes.items()}
        outcome = run_stage(run, RATE, agents, plan, review, options, routes)
        return StageResult(**{**vars(outcome), "notes": tuple(_notes(skipped))})


def _check_sources(run: Run, judge: str, wanted: list[str]) -> None:
    """Refuses sources that a run does not have: such a judge would be asked nothing, or less than is meant."""
    known = [source for (source,) in run.db.execute("SELECT DISTINCT source FROM instructions ORDER BY 1")]
    for source in wanted:
        if source not in known:
            have = ", ".join(name or "(unnamed)" for name in known)
            raise UserError(f"judge {judge}: sources: the run has no instructions of {source!r}; it has {have}")


def ready(every: Iterable[Gathered], run: Run, allow_missing: bool, skipped: Counter[str]) -> Iterator[Gathered]:
    """Instructions whose responses are all settled and at least two; counts the others."""
    open_states = "('open', 'postponed')"
    for gathered in every:
        waiting = run.db.execute(
            f"SELECT 1 FROM requests WHERE stage IN (?, ?) AND instruction = ? AND state IN {open_states} LIMIT 1",
            (RESPOND, SEARCH, gathered.instruction.number),
        ).fetchone()
        if waiting and not allow_missing:
            skipped["waiting"] += 1
        elif len(gathered.responses) < 2:
            skipped["too few"] += 1
        else:
            yield gathered


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
    if skipped["no tree"]:
        yield (
            f"{skipped['no tree']:,} times a similarity judge was not asked: their instructions have no image, or no "
            "model of the pool searched (search: in the pool's file)"
        )
