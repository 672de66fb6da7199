"""The spend never passes the limit, and the estimate is close to the bill."""

import random

import pytest

from data_prep.judging.rate import rate
from data_prep.respond import respond
from data_prep.run import Run
from silkie_jax.endpoints.agents import Agent, Price
from silkie_jax.endpoints.budget import Expectation, parse_usd, usd
from silkie_jax.endpoints.messages import compose, image_tokens, text_bytes
from silkie_jax.endpoints.stage import Options
from silkie_jax.errors import UserError
from tests.data_prep.runs import QUIET, cents, everything, make_answered, make_run, write_judge, write_pool
from tests.endpoints.server import Script, Server

STATED = "Describe picture {} in detail, with everything that can be seen in it, and say what time of day it may be."


def spending(budget):
    return Options(budget, progress=False)


@pytest.mark.parametrize("limit", [0.02, 0.1])
@pytest.mark.parametrize("faults", [{}, {"500": 0.1, "reset": 0.1, "malformed": 0.1}])
def test_never_passed_and_well_used(tmp_path, limit, faults):
    with Server(Script(faults=faults, delay=0.005)) as server:
        make_run(tmp_path / "run", 60, STATED)
        pool = write_pool(tmp_path / "pool", server.url)
        with pytest.raises(UserError, match=r"stopped before the budget .* could be passed.*larger --budget"):
            respond(tmp_path / "run", pool, spending(limit))
        with Run.open(tmp_path / "run") as run:
            assert run.spent() <= limit
            billed, at_risk = (sum(getattr(s, name) for s in run.spending()) for name in ("cost", "at_risk"))
        assert billed == pytest.approx(cents(server))
        # One more request could cost 0.0018 for its text and 0.006 for the longest reply.
        assert billed + at_risk > limit - 0.012
        with pytest.raises(UserError, match="stopped before the budget"):
            respond(tmp_path / "run", pool, spending(limit))
        assert cents(server) <= limit
        respond(tmp_path / "run", pool, QUIET)
        assert set(server.paid().values()) == {1}


def test_the_budget_is_the_runs(tmp_path):
    with Server() as server:
        make_answered(tmp_path / "run", 10, server.url)
        spent = cents(server)
        with pytest.raises(UserError, match="budget"):
            rate(tmp_path / "run", [write_judge(tmp_path / "judge", server.url)], spending(spent + 0.001))
        assert cents(server) == spent


def test_a_server_that_bills_more_than_expected_is_found_out_by_one_request(tmp_path):
    """Images cost 85 tokens here, but the pool says 1: the first bill corrects the bounds of all others."""
    with Server() as server:
        make_run(tmp_path / "run", 60, "?{}")
        pool = write_pool(tmp_path / "pool", server.url, ("m0",), {"models_per_instruction": 1}, image_tokens=1)
        with pytest.raises(UserError, match="budget"):
            respond(tmp_path / "run", pool, spending(0.02))
        assert 0.01 < cents(server) <= 0.02


def test_replies_longer_than_allowed_are_found_out_by_one_request(tmp_path, monkeypatch):
    """A server that bills thoughts beside `max_tokens`: three times as much as a reply can have."""
    from tests.endpoints import server as scripted

    complete = scripted.complete

    def thoughtful(*arguments):
        reply = complete(*arguments)
        reply["usage"]["completion_tokens"] = 600
        return reply

    monkeypatch.setattr(scripted, "complete", thoughtful)
    with Server() as server:
        make_run(tmp_path / "run", 60, STATED)
        pool = write_pool(tmp_path / "pool", server.url, ("m0",), {"models_per_instruction": 1})
        for limit in (0.1, 0.15):
            with pytest.raises(UserError, match="budget"):
                respond(tmp_path / "run", pool, spending(limit))
            assert limit * 0.7 < cents(server) <= limit


def test_a_price_is_needed(tmp_path):
    make_run(tmp_path / "run", 1)
    pool = write_pool(tmp_path / "pool", "http://127.0.0.1:9/v1", price=None)
    with pytest.raises(UserError, match="needs the price of m0, m1"):
        respond(tmp_path / "run", pool, spending(1.0))


def test_estimates_are_within_a_tenth(tmp_path):
    """With nothing known, and again from what some replies have told."""
    with Server() as server:
        make_run(tmp_path / "run", 60, STATED)
        pool = write_pool(tmp_path / "pool", server.url)
        judge = write_judge(tmp_path / "judge", server.url, {"orders": 2})
        dry = Options(dry_run=True, progress=False)
        expected = respond(tmp_path / "run", pool, dry).estimates
        told = respond(tmp_path / "run", pool, QUIET)
        assert sum(e.cost for e in expected) == pytest.approx(told.spent, rel=0.1)
        expected = rate(tmp_path / "run", [judge], dry).estimates
        rated = rate(tmp_path / "run", [judge], QUIET)
        assert sum(e.cost for e in expected) == pytest.approx(rated.spent - rated.spent_before, rel=0.1)
        assert cents(server) == pytest.approx(rated.spent)


def test_estimates_learn(tmp_path):
    """Neither the image's tokens nor the replies' lengths are known before: a part of the run tells them.

    Replies are of much the same length, for which of them a budget lets through is a matter of timing.
    """
    with Server(Script(reply=lambda request: "so on " * (40 + len(str(request)) % 5))) as server:
        make_run(tmp_path / "run", 80, STATED)
        pool = write_pool(
            tmp_path / "pool", server.url, ("m0",), {"models_per_instruction": 1}, image_tokens=400, expected_tokens=150
        )
        with pytest.raises(UserError, match="budget"):
            respond(tmp_path / "run", pool, spending(0.08))
        before = cents(server)
        expected = respond(tmp_path / "run", pool, Options(dry_run=True, progress=False)).estimates[0]
        respond(tmp_path / "run", pool, QUIET)
        assert expected.requests < 80
        assert expected.cost == pytest.approx(cents(server) - before, rel=0.1)


def test_bounds_hold_for_any_text():
    """A byte is at least a token of a byte-level vocabulary, and a body has no other text than is counted."""
    agent = Agent(model="m", system="Sé breve", prompt="<{prompt}>", image_detail="low", price=Price(1.0, 2.0))
    letters = random.Random(0).choices("aé漢🙂 \n", k=500)
    body = compose(agent, "".join(letters), ["0" * 64], [("q", "a")])
    assert text_bytes(body) >= len("".join(letters).encode()) + len("Sé breve<>qa".encode())
    assert image_tokens(agent, [(4000, 3000)]) == 85
    agent.image_detail = "high"
    assert image_tokens(agent, [(1024, 1024), (2048, 4096), (16, 12)]) == 765 + 1105 + 255
    expectation = Expectation(agent)
    expectation.observe(100, 85, 400, 10)
    assert expectation.bound(1000, 85)[0] > 2 * 1085
    assert agent.cost(1e6, 1e6) == 3.0
    assert agent.cost(1e6, 1e6, batch=True) == 1.5


@pytest.mark.parametrize(
    ("text", "amount"), [("200USD", 200), ("$0.5", 0.5), ("12.50 usd", 12.5), ("3", 3), (".5$", 0.5)]
)
def test_amounts(text, amount):
    assert parse_usd(text) == amount


@pytest.mark.parametrize("text", ["", "ten", "-5", "5EUR", "1e3", "5%", "nan"])
def test_no_amounts(text):
    with pytest.raises(UserError, match="write an amount such as 200USD"):
        parse_usd(text)


def test_amounts_for_people():
    assert [usd(x) for x in (0, 0.00123, 1234.5)] == ["$0.00", "$0.0012", "$1,234.50"]


def test_a_kill_counts_what_was_in_flight(tmp_path):
    from silkie_jax.endpoints.attempts import begin_attempt

    with Server() as server:
        make_answered(tmp_path / "run", 1, server.url)
        with Run.create(tmp_path / "run") as run:
            spent = run.spent()
            run.db.execute(*begin_attempt(99, 1, 0.25))
        with pytest.raises(UserError, match=r"the budget of \$0.2"):
            rate(tmp_path / "run", [write_judge(tmp_path / "judge", server.url)], spending(0.25))
    with Run.open(tmp_path / "run") as run:
        assert run.spent() == spent + 0.25
        assert sum(s.attempts.get("lost", 0) for s in run.spending()) == 1
    assert everything(tmp_path / "run")[0].replies == ()
