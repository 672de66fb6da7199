"""A part of a run's instructions as a run of its own: drawn by a seed, so that parts of one seed do not overlap."""

import hashlib
import json
import os
from dataclasses import replace

from data_prep.run import Run
from silkie_jax.errors import UserError


def take(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], *, count: int | None = None, skip: int = 0, seed: int = 0
) -> int:
    """Makes a run of some instructions of another, in their order there; the same call again leaves it as it is.

    A seed puts all instructions in an order of its own, of which `count` are taken after `skip`.

    Args:
        src, dst: the run that has them, which is only read, and the one to make.
        count: how many; None: all that are left.

    Returns:
        how many there are.

    Raises:
        UserError: there are not so many, or `dst` holds other instructions that were asked already.
    """
    if skip < 0 or (count is not None and count < 1):
        raise UserError("--count must be at least 1 and --skip at least 0")
    with Run.open(src) as source, Run.create(dst) as run:
        lots = sorted((_lot(seed, i.id), i.number) for i in source.instructions())
        numbers = {number for _, number in lots[skip:][:count]}
        if len(numbers) < (count or 1):
            raise UserError(
                f"the run {src} has {len(lots)} instructions: {count or 1} after the first {skip} are not there"
            )
        settings = {"taken": {"of": source.settings("run id"), "count": count, "skip": skip, "seed": seed}}
        if run.settings("instructions") == json.loads(json.dumps(settings)):
            return run.count()
        chosen = [instruction for instruction in source.instructions() if instruction.number in numbers]
        with run.transaction():
            for sha256 in dict.fromkeys(image for instruction in chosen for image in instruction.images):
                run.add_image(source.image(sha256))
        return run.write_instructions((replace(instruction, number=0) for instruction in chosen), settings)


def _lot(seed: int, id: str) -> bytes:
    return hashlib.sha256(json.dumps([seed, "take", id]).encode()).digest()
