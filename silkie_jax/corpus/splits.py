"""Holding records out for evaluation, so that nothing seen in training is asked again.

The original split after forming pairs, so that the same prompt with the same image was trained on and evaluated.
Here records that share an image (any of several), or that have no image and the same prompt, are one family, and a
family is on one side only. (The same prompt over different images, "Describe the image.", is common and no leak.)
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from silkie_jax.corpus.reader import IndexRow
from silkie_jax.errors import UserError


def split(index: Sequence[IndexRow], fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Splits a corpus into training and evaluation records.

    Depends on `seed`, `fraction` and what the records contain, not on their order. Families are taken in the order of
    a seeded hash where they fit: never more than `fraction` of the records (rounded to the nearest; at least one
    family) are held out.

    Args:
        index: `CorpusReader.index`.
        fraction: of the records to hold out, 0 <= fraction < 1.
        seed: another seed gives another split.

    Returns:
        (training, evaluation): int64 positions in the index, ascending; together all of them.

    Raises:
        UserError: the fraction is out of range, or all records are one family, so that none can be held out.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"evaluation_fraction: {fraction} is not between 0 and 1 (1 excluded)")
    held_out = np.zeros(len(index), bool)
    if fraction and len(index):
        families = _families(index)
        if len(families) == 1:
            raise UserError(
                f"evaluation_fraction: all {len(index)} records share an image or prompt: none can be held out: set 0"
            )
        ranked = sorted(families.items(), key=lambda item: hashlib.sha256(f"{seed}:{item[0]}".encode()).digest())
        wanted = round(fraction * len(index))
        room = wanted
        for _, members in ranked:
            if len(members) <= room:
                held_out[members] = True
                room -= len(members)
        if room == wanted:  # too small a fraction for any family: hold out the smallest, the first of equals
            held_out[min((members for _, members in ranked), key=len)] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _families(index: Sequence[IndexRow]) -> dict[str, list[int]]:
    """Positions of the records of each family, under the smallest hash that its members have."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = [row.image_sha256 or (f"prompt:{row.prompt_sha256}",) for row in index]
    for first, *others in keys:
        for other in others:
            low, high = sorted((root(first), root(other)))
            parent[high] = low  # the smallest key stays the root, so a family's name does not depend on order
    families: dict[str, list[int]] = {}
    for position, (first, *_) in enumerate(keys):
        families.setdefault(root(first), []).append(position)
    return families
