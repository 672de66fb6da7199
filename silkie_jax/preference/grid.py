"""How the rows of a step go through the model: in which forward passes, and in which padded shape.

A step is a grid of A x B sequences: A batches, whose gradients are added up, of B sequences each. Which records a step
has is the plan's (plan.py), and so the same on any machine. How they lie is the machine's: where rows are long, fewer
of them go at once and more batches make up the same step.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from silkie_jax.errors import UserError
from silkie_jax.preference.plan import Plan


class Shape(NamedTuple):
    """Padded sizes of a step: its batches, the sequences of each, then the most of a sequence.

    `spans` are a sequence's <img> where some rows have views; 0: each image has one, in order.
    """

    batches: int
    sequences: int
    tokens: int
    labels: int
    pairs: int
    images: int
    branches: int
    spans: int = 0

    @property
    def key(self) -> tuple[int, int, int]:
        """What there is one program for: the rest is padded alike (see `Grid.shapes`)."""
        return self[:3]

    def __str__(self) -> str:
        return f"{self.batches} x {self.sequences} rows of {self.tokens} tokens"

    @property
    def at_once(self) -> int:
        """Tokens of one batch, padding included."""
        return self.sequences * self.tokens


class Grid:
    """The forward passes of each step of a plan.

    Args:
      plan: the records of each step.
      rows, accumulate: sequences of a batch, and batches of a step, where `tokens` allows as many.
      shards: what the number of sequences must be a multiple of (the mesh's batch axes); empty ones fill up.
      pack: tokens up to which short rows are packed into one sequence; None: a sequence is a row.
      tokens: most tokens of one batch, padding included, over all devices; None: not limited.
      fine: see `bucket`.

    Attributes:
      least_tokens: the smallest such limit: each shard takes one of the longest rows.

    Raises:
      UserError: the longest row alone exceeds `tokens`.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        rows: int,
        accumulate: int = 1,
        shards: int = 1,
        pack: int | None = None,
        tokens: int | None = None,
        fine: bool = False,
    ):
        self.plan, self.rows, self.accumulate, self.fine = plan, rows, accumulate, fine
        self.shards, self.pack, self.tokens = shards, pack, tokens
        self._widest: dict[tuple[int, int, int], tuple[int, ...]] = {}
        longest = bucket(max(pack or 0, int(plan.sizes[:, 0].max(initial=0))), fine)
        self.least_tokens = longest * shards
        if tokens is not None and tokens < self.least_tokens:
            raise UserError(
                f"batch_tokens {tokens}: {'sequences' if pack else 'rows'} are up to {longest} tokens long and "
                f"{shards} go at once (mesh data x fsdp), which makes {self.least_tokens}; set batch_tokens to that or "
                f"more, or {'pack or ' if pack else ''}max_length to less"
            )

    def batches(self, step: int) -> list[list[list[int]]]:
        """The records (rows of plan.sizes) of each sequence of each batch, A x B of them; some may be empty."""
        records = self.plan.records(step).tolist()
        groups, count = [[record] for record in records], self.rows * self.accumulate
        if self.pack:
            lengths = [int(self.plan.sizes[record, 0]) for record in records]
            groups = [[records[i] for i in some] for some in first_fit(lengths, max(self.pack, *lengths))]
            count = len(groups)
        tokens = self.plan.sizes[:, 0]
        longest = max(int(tokens[group].sum()) for group in groups) if self.pack else int(tokens[records].max())
        batches = max(self.accumulate, -(-count // self._at_once(bucket(longest, self.fine), count)))
        sequences = -(-count // batches)
        padding: list[list[int]] = [[]] * round_up(sequences, self.shards)
        cut = [groups[first : first + sequences] for first in range(0, batches * sequences, sequences)]
        return [some + padding[len(some) :] for some in cut]

    def _at_once(self, length: int, count: int) -> int:
        """How many sequences of this padded length may go at once; `count` where nothing limits them."""
        return count if self.tokens is None else self.tokens // (length * self.shards) * self.shards

    def shape(self, step: int) -> Shape:
        """The padded sizes of a step, known from the rows' sizes without laying them out."""
        return self._widened(self._own_shape(step))

    def shapes(self, steps: range) -> Counter[Shape]:
        """The shapes of all these steps, at most one for each padded length, and how many steps have it.

        What else is padded (labels, pairs, images, branches) is from now on padded alike in all steps of one length, so
        that each length is compiled once.
        """
        own = Counter(map(self._own_shape, steps))
        for shape in own:
            self._widest[shape.key] = self._widened(shape)[3:]
        found: Counter[Shape] = Counter()
        for shape, count in own.items():
            found[self._widened(shape)] += count
        return found

    def _own_shape(self, step: int) -> Shape:
        batches = self.batches(step)
        if self.pack:
            sizes = np.array([self.plan.sizes[group].sum(0) for groups in batches for group in groups if group])
        else:
            sizes = self.plan.sizes[self.plan.records(step)]
        return make_shape(len(batches), len(batches[0]), sizes, self.fine)

    def _widened(self, own: Shape) -> Shape:
        """Padded as much as any other of its length that was seen."""
        return Shape(*own.key, *map(max, own[3:], self._widest.get(own.key, own[3:])))


def make_shape(
    batches: int,
    sequences: int,
    sizes: Int[np.ndarray, "G S"] | Sequence[Int[np.ndarray, "S"]],
    fine: bool = False,
) -> Shape:
    """The shape that holds sequences of these sizes (layout.SIZES and VIEW_SIZES, summed over a sequence's rows)."""
    tokens, labels, pair_count, images, branches, _, *views = np.max(sizes, axis=0).tolist()
    return Shape(
        batches,
        sequences,
        bucket(tokens, fine),
        bucket(labels),
        pairs=round_up(max(pair_count, 1), 6),
        images=images,
        branches=round_up(max(branches, 1), 4),
        spans=views[0] if any(views[1:]) else 0,
    )


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs by first-fit decreasing: the members of each sequence, each in its original order."""
    room: list[int] = []
    members: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((p for p, left in enumerate(room) if left >= lengths[i]), len(room))
        if place == len(room):
            room.append(capacity)
            members.append([])
        room[place] -= lengths[i]
        members[place].append(i)
    return [sorted(some) for some in members]


def bucket(n: int, fine: bool = False) -> int:
    """The next of 64, 128, 192, 256, 384, 512, 640, ...

    `fine`, for GPUs, whose kernels take any multiple of 32: beyond 256 the next multiple of 32, beyond 1,024 of 64,
    beyond 2,048 of 128. So a row of 930 tokens costs 960 and not 1,024. What is longer is rare: there finer steps would
    be more programs to compile, at 10 to 20 seconds each, than they save time.
    """
    if not fine or n > 2048:
        return round_up(max(n, 1), 64 if n <= 256 else 128)
    return round_up(max(n, 1), 32 if 256 < n <= 1024 else 64)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
