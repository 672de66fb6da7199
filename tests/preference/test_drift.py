"""Chosen against rejected responses by length: the statistic, and what it takes to warn."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from silkie_jax.preference.drift import measure_drift


def row(lengths, pairs):
    """What of a row is looked at; lengths are in labels."""
    return SimpleNamespace(
        label_branches=np.repeat(np.arange(1, len(lengths) + 1), lengths),
        pairs=np.array(pairs, int).reshape(-1, 2),
        responses=tuple(range(len(lengths))),
    )


def rows(ratio, spread, count=400, seed=0):
    """Rows of three responses, the first of which beats the others and is longer by `ratio`, in the geometric mean."""
    rng = np.random.default_rng(seed)
    logs = np.log(60) + spread * rng.standard_normal((count, 3)) + np.log(ratio) * np.array([1, 0, 0])
    return [row(np.exp(some).round().astype(int).clip(1), [[0, 1], [0, 2]]) for some in logs]


def test_it_is_the_geometric_mean_over_pairs():
    found = measure_drift([row((40, 10, 20), [[0, 1], [1, 2]]), row((30, 10), [[0, 1]]), row((5, 5), [])])
    assert found.ratio == pytest.approx((4 * 0.5 * 3) ** (1 / 3))
    assert (found.pairs, found.instructions) == (3, 2)
    turned = measure_drift([row((40, 10, 20), [[1, 0], [2, 1]]), row((30, 10), [[1, 0]])])
    assert turned.ratio == pytest.approx(1 / found.ratio)


def test_its_error_is_that_of_drawing_the_instructions_again():
    """By 400 repetitions; an error over pairs as if they were independent would be 1.2 times too small."""
    drawn = [measure_drift(rows(1.0, 0.5, 100, seed)) for seed in range(400)]
    spread = np.std([math.log(one.ratio) for one in drawn])
    assert np.mean([one.error for one in drawn]) == pytest.approx(spread, rel=0.08)


@pytest.mark.parametrize(
    ("ratio", "spread", "count", "matters"),
    [
        (1.0, 0.5, 400, False),
        (1.1, 0.1, 400, False),  # small, however certain
        (1.5, 0.5, 400, True),
        (1 / 1.5, 0.5, 400, True),
        (1.5, 0.1, 29, False),  # too few
        (1.5, 0.1, 30, True),
        (1.5, 2.5, 60, False),  # may be chance
    ],
)
def test_what_is_warned_of(ratio, spread, count, matters):
    assert measure_drift(rows(ratio, spread, count)).matters == matters


def test_what_is_said():
    longer, shorter = (str(measure_drift(rows(ratio, 0.0))) for ratio in (1.5, 0.5))
    assert longer == "chosen responses are 50% longer than rejected ones (by tokens, the geometric mean of 800 pairs)"
    assert shorter.startswith("rejected responses are 100% longer than chosen ones (")


@pytest.mark.parametrize("made", [[], [row((5, 5), [])]])
def test_no_pairs_no_drift(made):
    found = measure_drift(made)
    assert (found.ratio, found.pairs, found.matters) == (1.0, 0, False)
