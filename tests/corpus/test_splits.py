"""No image and no text-only prompt is on both sides of a split."""

import hashlib

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from silkie_jax.corpus.reader import IndexRow
from silkie_jax.corpus.splits import split
from silkie_jax.errors import UserError


def index(*records):
    """Rows of (prompt, image names); ids are positions."""
    sha = [hashlib.sha256(name.encode()).hexdigest() for name in "0123456789"]
    return [
        IndexRow(str(i), hashlib.sha256(prompt.encode()).hexdigest(), tuple(sha[image] for image in images), "")
        for i, (prompt, images) in enumerate(records)
    ]


rows = st.lists(st.tuples(st.sampled_from("abcdef"), st.lists(st.integers(0, 9), max_size=3)), min_size=1, max_size=40)


@settings(deadline=None)
@given(rows, st.floats(0.01, 0.9), st.integers(0, 5))
def test_families_stay_together(records, fraction, seed):
    found = index(*records)
    try:
        train, held_out = split(found, fraction, seed)
    except UserError:
        assume(False)
    assert sorted([*train, *held_out]) == list(range(len(records)))
    assert len(held_out) >= 1

    def keys(positions):
        return {
            key for p in positions for key in (records[p][1] if records[p][1] else [records[p][0]])
        }  # text-only records are told apart by their prompt

    assert not keys(train) & keys(held_out)


@settings(deadline=None, max_examples=30)
@given(rows, st.integers(0, 5), st.randoms())
def test_the_split_does_not_depend_on_the_order_of_records(records, seed, random):
    found = index(*records)
    shuffled = found[:]
    random.shuffle(shuffled)
    try:
        held_out = {found[p].id for p in split(found, 0.3, seed)[1]}
    except UserError:
        assume(False)
    assert {shuffled[p].id for p in split(shuffled, 0.3, seed)[1]} == held_out


def test_sizes_and_seeds():
    found = index(*((f"prompt {i}", []) for i in range(1000)))
    train, held_out = split(found, 0.005, seed=1)
    assert [len(train), len(held_out)] == [995, 5]
    assert train.dtype == held_out.dtype == np.int64
    assert np.array_equal(split(found, 0.005, seed=1)[1], held_out)
    assert not np.array_equal(split(found, 0.005, seed=2)[1], held_out)
    assert len(split(found[:7], 0.005)[1]) == 1  # at least one
    assert [len(part) for part in split(found, 0)] == [1000, 0]
    assert [len(part) for part in split([], 0.5)] == [0, 0]


def test_a_large_family_does_not_fill_the_evaluation_split():
    found = index(*(("p", [0]) for _ in range(90)), *((f"q{i}", []) for i in range(10)))
    for seed in range(5):
        assert len(split(found, 0.05, seed)[1]) == 5


def test_what_cannot_be_split_is_refused():
    with pytest.raises(UserError, match="all 2 records share an image"):
        split(index(("a", [1]), ("b", [1, 2])), 0.5)
    for fraction in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(UserError, match="evaluation_fraction"):
            split(index(("a", [])), fraction)
