"""Responses: every instruction is answered by several models of a pool, drawn beforehand and for good."""

import json
import math
import os
import random

from data_prep import replies
from data_prep.agents import Pool, check_same, load_pool, snapshot
from data_prep.live import Request, Verdict
from data_prep.messages import compose, image_tokens, text_bytes
from data_prep.progress import planning
from data_prep.replies import Reply
from data_prep.stage import Options, Outcome, run_stage
from data_prep.store import Instruction, Run, to_json
from silkie_jax.errors import UserError

STAGE = "respond"
_INSERT = (
    "INSERT OR IGNORE INTO requests (stage, instruction, agent, slot, arrangement, body, text_bytes, image_tokens) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)


def respond(path: str | os.PathLike[str], pool_path: str | os.PathLike[str], options: Options | None = None) -> Outcome:
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
        if not run.count():
            raise UserError(f"the run {path} holds no instructions: add some with `silkie corpus instructions`")
        config = snapshot(pool)
        if before := run.settings("pool"):
            check_same(before, config, "pool")

        def plan() -> None:
            if before and run.settings("responses planned") == run.count():
                run.save_settings("pool", config)
                return
            run.save_settings("pool", config)
            deal = Deal(pool)
            for instruction in planning(run.instructions(), run, options.progress):
                drawn, spares = deal(instruction.id)
                for slot, name in enumerate(drawn):
                    run.db.execute(_INSERT, _values(run, pool, instruction, slot, [name, *spares[slot :: len(drawn)]]))
            run.save_settings("responses planned", run.count())

        def review(name: str, request: Request, reply: Reply, number: int) -> Verdict:
            if reply.outcome in (replies.OK, replies.TRUNCATED):
                return Verdict(reply.outcome, "ok")
            spares = json.loads(request.arrangement or "[]") if pool.replace_failed else []
            if not spares:
                return Verdict(reply.outcome, "failed")
            instruction = next(run.instructions(request.instruction, request.instruction))
            values = _values(run, pool, instruction, request.slot, spares)
            return Verdict(reply.outcome, "failed", ((_INSERT, values),))

        return run_stage(run, STAGE, pool.models, plan, review, options)


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


def _values(run: Run, pool: Pool, instruction: Instruction, slot: int, names: list[str]) -> tuple[object, ...]:
    """A request to the first of `names`; the others are kept with it, to step in."""
    agent = pool.models[names[0]]
    body = compose(agent, instruction.prompt, instruction.images, instruction.history)
    sizes = [run.image_size(sha256) for sha256 in instruction.images]
    return (
        *(STAGE, instruction.number, names[0], slot, to_json(names[1:])),
        *(to_json(body), text_bytes(body), image_tokens(agent, sizes)),
    )
