"""Intervals and paired tests: against hand-made cases and scipy's own bootstrap."""

import numpy as np
import pytest
import scipy.stats

from silkie_jax.evaluation.rules.statistics import changes, compare, intervals
from silkie_jax.evaluation.rules.sums import Sums, ratio


def share(rows, **names):
    return Sums.of(rows, ("right", "n"), lambda sums: {"share": ratio(sums["right"], sums["n"])})


def test_sums_add_up_by_image_and_figures_follow():
    rows = [("a", {"right": 1, "n": 1}), ("b", {"n": 1}), ("a", {"n": 2})]
    sums = share(rows)
    assert sums.images == ("a", "b")
    assert sums.counts.tolist() == [[1, 3], [0, 1]]
    assert sums.figures()["share"] == 0.25
    drawn = sums.figures(np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))["share"]
    assert drawn.tolist() == [pytest.approx(1 / 3), 0, 0.25]
    assert np.isnan(share([]).figures()["share"])


def test_intervals_are_those_of_scipy_and_the_same_every_time():
    random = np.random.default_rng(1)
    right = random.integers(0, 2, 300)
    found = intervals(share([(str(k), {"right": r, "n": 1}) for k, r in enumerate(right)]), draws=4000)["share"]
    expected = scipy.stats.bootstrap((right,), np.mean, n_resamples=4000, method="percentile", rng=2)
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=0.01)
    assert intervals(share([("a", {"right": 1, "n": 2})])) == {"share": (0.5, 0.5)}


def test_questions_of_one_image_are_drawn_together():
    """Ten questions about each of few images that all come out alike are no better than one."""
    random = np.random.default_rng(3)
    right = random.integers(0, 2, 40)
    once = [(str(k), {"right": r, "n": 1}) for k, r in enumerate(right)]
    assert intervals(share(once)) == intervals(share(once * 10))


def test_mcnemar_asks_the_questions_on_which_one_is_right():
    first = {str(k): float(k < 50) for k in range(100)}
    second = {str(k): float(k < 40 or 50 <= k < 75) for k in range(100)}
    found = compare(first, second, {})
    assert (found.better, found.worse, found.items, found.test) == (25, 10, 100, "McNemar")
    assert found.p == pytest.approx(scipy.stats.binomtest(25, 35).pvalue)
    assert found.mean == pytest.approx(0.15)
    assert found.low < 0.15 < found.high
    assert "the second is better, beyond noise" in found.sentence
    same = compare(first, first, {})
    assert same.p == 1
    assert "within noise" in same.sentence


def test_ratings_are_compared_by_a_paired_bootstrap():
    random = np.random.default_rng(4)
    first = {str(k): float(random.integers(0, 7)) for k in range(60)}
    second = {k: min(v + float(random.integers(0, 2)), 6.0) for k, v in first.items()}
    found = compare(first, second, {})
    assert found.test == "paired bootstrap"
    assert found.p < 0.01
    noise = {k: v + float(random.normal()) for k, v in first.items()}
    assert compare(first, noise, {}).p > 0.01
    assert compare({}, {}, {}).items == 0


def test_only_what_both_answered_counts():
    found = compare({"a": 1.0, "b": 0.0}, {"b": 1.0, "c": 0.0}, {})
    assert (found.items, found.better) == (1, 1)


def test_changes_are_paired_by_image():
    """Two checkpoints that differ by the same on each image differ surely, however much images differ."""
    random = np.random.default_rng(5)
    right = random.integers(0, 90, 40)
    rows = [(str(k), {"right": r, "n": 100}) for k, r in enumerate(right)]
    better = [(image, counts | {"right": counts["right"] + 10}) for image, counts in reversed(rows)]
    found = changes(share(rows), share([*better, ("another", {"right": 0, "n": 100})]))["share"]
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.beyond_noise
    apart = share([(str(k), {"right": r, "n": 100}) for k, r in enumerate(random.permutation(right))])
    found = changes(share(rows), apart)["share"]
    assert found.value == pytest.approx(0)
    assert found.low < 0 < found.high
    assert not found.beyond_noise
    assert changes(share(rows), share([])) == {}
