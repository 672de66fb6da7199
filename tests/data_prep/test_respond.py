"""Who answers an instruction: drawn by lot, fairly, and checked before anything is asked."""

import json
from collections import Counter

import pytest

from data_prep.respond import Deal, Pool, load_pool, respond, sample_seed
from data_prep.run import Run
from silkie_jax.errors import UserError
from tests.data_prep.runs import MODELS, QUIET, agent, make_run, write_pool
from tests.endpoints.server import Server


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


def bodies(run) -> list[tuple[str, int, dict]]:
    with Run.open(run) as opened:
        order = "WHERE stage = 'respond' ORDER BY instruction, slot"
        rows = opened.db.execute(f"SELECT agent, slot, body FROM requests {order}")
        return [(agent, slot, json.loads(body)) for agent, slot, body in rows]


def test_samples_are_slots_with_seeds_of_their_own(tmp_path):
    with Server() as server:
        models = {"a": agent(server.url, "a", samples=3), "b": agent(server.url, "b")}
        (tmp_path / "pool").write_text(json.dumps({"models": models, "models_per_instruction": 2, "seed": 5}))
        for name in ("run", "again"):
            respond(make_run(tmp_path / name, 4), tmp_path / "pool", QUIET)
    asked = bodies(tmp_path / "run")
    assert len(asked) == 4 * 4
    assert [slot for _, slot, _ in asked] == [0, 1, 2, 3] * 4
    assert Counter(name for name, _, _ in asked) == {"a": 12, "b": 4}
    seeds = [body["seed"] for name, _, body in asked if name == "a"]
    assert len(set(seeds)) == 12
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert all("seed" not in body for name, _, body in asked if name == "b"), "what a run asked before stays the same"
    assert asked == bodies(tmp_path / "again")
    assert sample_seed(5, "i0", 0) != sample_seed(6, "i0", 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "models.m0.samples must be at least 1, not 0"),
        ({"samples": 2, "sampling": {"seed": 1}}, "models.m0.sampling.seed is set by samples"),
        ({"samples": 2, "sampling": {"temperature": 0}}, "at temperature 0 all are the same"),
        ({"samples": 40}, "samples of 2 models can be 80 responses; training compares at most 63"),
    ],
)
def test_samples_that_make_no_sense_are_refused(tmp_path, changes, message):
    path = write_pool(tmp_path / "pool", "http://x/v1", ("m0", "m1"), {"models_per_instruction": 2}, **changes)
    with pytest.raises(UserError, match=message):
        load_pool(path)


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """Its pool's models had no `samples`; nothing that it asked is asked otherwise."""
    with Server() as server:
        pool = write_pool(tmp_path / "pool", server.url)
        respond(make_run(tmp_path / "run", 2), pool, QUIET)
        with Run.open(tmp_path / "run", write=True) as run:
            kept = run.settings("pool")
            for model in kept["models"].values():
                del model["samples"]
            run.save_settings("pool", kept)
        before = len(server.log)
        respond(tmp_path / "run", pool, QUIET)
        assert len(server.log) == before
