"""Who answers an instruction: drawn by lot, fairly, and checked before anything is asked."""

from collections import Counter

import pytest

from data_prep.respond import Deal, Pool, load_pool, respond
from silkie_jax.errors import UserError
from tests.data_prep.runs import MODELS, QUIET, make_run, write_pool


def test_more_responses_than_training_can_compare_are_refused_before_anything_is_asked(tmp_path):
    names = [f"m{n}" for n in range(64)]
    make_run(tmp_path / "run", 1)
    pool = write_pool(tmp_path / "pool", "http://127.0.0.1:9/v1", names, {"models_per_instruction": 64})
    with pytest.raises(UserError, match="models_per_instruction is 64; training compares at most 63"):
        respond(tmp_path / "run", pool, QUIET)
    assert load_pool(write_pool(pool, "http://127.0.0.1:9/v1", names, {"models_per_instruction": 63}))


def test_draws_are_balanced_seeded_and_weighted(tmp_path):
    path = write_pool(tmp_path / "pool", "http://127.0.0.1:9/v1", MODELS)

    def draw(**changes) -> list[tuple[str, ...]]:
        pool: Pool = load_pool(path)
        for name, weight in changes.pop("weights", {}).items():
            pool.models[name].weight = weight
        for key, value in changes.items():
            setattr(pool, key, value)
        deal = Deal(pool)
        return [tuple(deal(f"i{n}")[0]) for n in range(301)]

    hands = draw()
    assert hands == draw() != draw(seed=1)
    assert all(len(set(hand)) == 4 for hand in hands)
    counts = Counter(name for hand in hands for name in hand)
    assert max(counts.values()) - min(counts.values()) <= 1
    at_random = Counter(name for hand in draw(draw="random") for name in hand)
    assert max(at_random.values()) - min(at_random.values()) > 1
    half = Counter(name for hand in draw(weights={"m0": 0.5}) for name in hand)
    assert half["m0"] == pytest.approx(half["m1"] / 2, abs=2)
    rare = Counter(name for hand in draw(draw="random", weights={"m0": 0.1}) for name in hand)
    assert rare["m0"] < min(rare[name] for name in MODELS[1:]) / 2
