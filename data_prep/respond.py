"""Responses: every instruction is answered by several models of a pool, drawn beforehand and for good."""

import hashlib
import json
import math
import os
import random
from dataclasses import asdict, dataclass, replace

from data_prep.run import RESPOND, SEARCH, Instruction, Run
from data_prep.search import SearchConfig, Searcher, check_search
from silkie_jax.corpus.schema import MOST_RESPONSES
from silkie_jax.endpoints import outcomes
from silkie_jax.endpoints.agents import Agent, check_agent, check_same
from silkie_jax.endpoints.attempts import Request, Verdict, new_request
from silkie_jax.endpoints.journal import Statement
from silkie_jax.endpoints.messages import compose, image_tokens
from silkie_jax.endpoints.outcomes import EndpointReply
from silkie_jax.endpoints.progress import planning
from silkie_jax.endpoints.stage import Options, StageResult, run_stage
from silkie_jax.errors import UserError
from silkie_jax.yaml_files import load_yaml

DRAWS = ("balanced", "random")
_FREE = ("replace_failed",)  # may change within a run


@dataclass
class PoolModel(Agent):
    """A model of a pool."""

    samples: int | None = None  # answers to one instruction, each by a seed of its own; None: one, as `sampling` says
    search: SearchConfig | None = None  # answers grow sentence by sentence; None: each is one request


@dataclass
class Pool:
    """The models that answer, and how they are drawn for an instruction."""

    models: dict[str, PoolModel]
    models_per_instruction: int = 4
    draw: str = "balanced"  # every model equally often (by `weight`), or at random
    replace_failed: bool = True  # a model that refuses at its endpoint or rejects the request makes room for another
    seed: int = 0


def load_pool(path: str | os.PathLike[str]) -> Pool:
    """Reads and checks a pool.

    Raises:
        UserError: one line that names the file, the key and the mend.
    """
    pool = load_yaml(path, Pool)

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(f"{path}: {message}")

    need(bool(pool.models), "models is empty: name at least one model")
    need(all(map(str.strip, pool.models)), "models: a name is empty")
    need(pool.draw in DRAWS, f"draw: {pool.draw!r} is unknown; choose one of {', '.join(DRAWS)}")
    need(
        1 <= pool.models_per_instruction <= len(pool.models),
        f"models_per_instruction is {pool.models_per_instruction}, but there are {len(pool.models)} models",
    )
    need(
        pool.models_per_instruction <= MOST_RESPONSES,
        f"models_per_instruction is {pool.models_per_instruction}; training compares at most {MOST_RESPONSES}",
    )
    for name, agent in pool.models.items():
        key = f"models.{name}."
        check_agent(agent, path, key)
        samples = agent.samples
        need(samples is None or samples >= 1, f"{key}samples must be at least 1, not {samples}")
        need(samples is None or "seed" not in agent.sampling, f"{key}sampling.seed is set by samples; leave out one")
        need(
            (samples or 1) == 1 or agent.sampling.get("temperature") != 0,
            f"{key}samples is {samples}, but at temperature 0 all are the same: give it a temperature",
        )
        if agent.search is not None:
            check_search(agent.search, agent, path, f"{key}search.")
            need(samples is None, f"{key}samples has no meaning with search: a tree has many answers")
            need(len(pool.models) == 1 or not pool.replace_failed, "replace_failed: false is needed beside a search")
    most = sum(sorted(model.samples or 1 for model in pool.models.values())[-pool.models_per_instruction :])
    need(
        most <= MOST_RESPONSES,
        f"samples of {pool.models_per_instruction} models can be {most} responses; training compares at most "
        f"{MOST_RESPONSES}",
    )
    return pool


def respond(
    path: str | os.PathLike[str], pool_path: str | os.PathLike[str], options: Options | None = None
) -> StageResult:
    """Asks the models of a pool; run the same call again to continue where one ended.

    Args:
        path: the run.
        pool_path: the pool's YAML file.

    Raises:
        UserError, KeyboardInterrupt: as `run_stage`.
    """
    options = options or Options()
    pool = load_pool(pool_path)
    with Run.open(path, write=True) as run:
        run.check_instructions()
        config = asdict(pool)  # it holds names of environment variables, never keys
        if before := run.settings("pool"):
            check_same(before, config, "pool", _FREE)

        searching = {name: (model, model.search) for name, model in pool.models.items() if model.search is not None}
        searcher = Searcher(run, searching, pool.seed)

        def plan() -> None:
            if before and run.settings("responses planned") == run.count():
                run.save_settings("pool", config)
                return
            run.save_settings("pool", config)
            deal = Deal(pool)
            for instruction in planning(run.instructions(), run.count(), options.progress):
                drawn, spares = deal(instruction.id)
                slots = [name for name in drawn for _ in range(pool.models[name].samples or 1)]
                for slot, name in enumerate(slots):
                    if name in searching:
                        run.db.execute(*next(searcher.next_requests(instruction, name)))
                        continue
                    run.db.execute(*_request(run, pool, instruction, slot, [name, *spares[slot :: len(slots)]]))
            run.save_settings("responses planned", run.count())

        def review(name: str, request: Request, reply: EndpointReply, number: int) -> Verdict:
            if reply.outcome in (outcomes.OK, outcomes.TRUNCATED):
                return Verdict(reply.outcome, "ok")
            spares = json.loads(request.arrangement or "[]") if pool.replace_failed else []
            if not spares:
                return Verdict(reply.outcome, "failed")
            instruction = next(run.instructions(request.item, request.item))
            return Verdict(reply.outcome, "failed", (_request(run, pool, instruction, request.slot, spares),))

        whole = {name: model for name, model in pool.models.items() if name not in searching}
        result = run_stage(run, RESPOND, {**whole}, plan, review, options)
        if not searching:
            return result
        if options.dry_run:
            return replace(result, notes=("a search asks node by node: what it will cost is not known beforehand",))
        return run_stage(
            run, SEARCH, searcher.agents, searcher.go_on, searcher.review, options, searcher.routes
        )  # fmt: skip


class Deal:
    """Draws models, instruction by instruction: the same ones for the same pool and sequence of instructions.

    Balanced: those drawn least so far by their weight, ties by lot, so that all end equally often. Random: by lot, as
    weights say (Efraimidis and Spirakis 2006).
    """

    def __init__(self, pool: Pool):
        self._pool = pool
        self._counts = dict.fromkeys(pool.models, 0)

    def __call__(self, id: str) -> tuple[list[str], list[str]]:
        """The models drawn for an instruction, by slot, and the others in the order in which they may step in.

        Spares belong to a slot from the start (the first to the first slot, and so on), so that it does not matter
        whose failure is known first.
        """
        pool = self._pool
        lots = random.Random(f"{pool.seed} {id}")  # text seeds are the same in every process

        def key(name: str) -> tuple[float, float]:
            lot, weight = lots.random(), pool.models[name].weight
            if pool.draw == "balanced":
                return self._counts[name] / weight, lot
            return -math.log(1 - lot) / weight, 0.0

        keys = {name: key(name) for name in pool.models}
        wanted = sorted(pool.models, key=lambda name: keys[name])
        drawn = wanted[: pool.models_per_instruction]
        for name in drawn:
            self._counts[name] += 1
        lots.shuffle(drawn)  # the slot says nothing about how often a model was drawn
        return drawn, wanted[pool.models_per_instruction :]


def _request(run: Run, pool: Pool, instruction: Instruction, slot: int, names: list[str]) -> Statement:
    """A request to the first of `names`; the others are kept with it, to step in."""
    agent = pool.models[names[0]]
    body = compose(agent, instruction.prompt, instruction.images, instruction.history)
    if agent.samples is not None:
        body["seed"] = sample_seed(pool.seed, instruction.id, slot)
    tokens = image_tokens(agent, [run.image_size(sha256) for sha256 in instruction.images])
    return new_request(RESPOND, instruction.number, names[0], slot, names[1:], body, tokens)


def sample_seed(seed: int, id: str, slot: int) -> int:
    """The seed of one answer to an instruction, in [0, 2^31): the same whenever it is asked for."""
    return int.from_bytes(hashlib.sha256(f"{seed} {id} {slot}".encode()).digest()[:4], "big") >> 1
