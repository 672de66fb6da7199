"""Responses and ratings over a real connection: the same outcome whatever the server does on the way."""

import signal
import time
from collections import Counter

import pytest

from data_prep.judging.rate import rate
from data_prep.respond import respond
from data_prep.run import Run
from silkie_jax.endpoints.stage import Options
from silkie_jax.errors import UserError
from tests.data_prep.runs import QUIET, cents, everything, make_answered, make_run, start, write_judge, write_pool
from tests.endpoints.server import Script, Server

PASSING = {"429": 0.1, "429-retry-after": 0.1, "500": 0.05, "503": 0.05, "reset": 0.1, "malformed": 0.05,
           "not-a-completion": 0.05, "timeout": 0.05, "empty": 0.05}  # fmt: skip


def build(folder, server, count=24, **changes):
    """Both stages with six models and one judge; returns what came of them."""
    make_run(folder, count)
    pool = write_pool(folder.with_suffix(".pool"), server.url, **changes)
    judge = write_judge(folder.with_suffix(".judge"), server.url, {"orders": 2}, **changes)
    return respond(folder, pool, QUIET), rate(folder, [judge], QUIET)


def test_undisturbed(tmp_path):
    with Server() as server:
        responded, rated = build(tmp_path / "run", server)
    assert responded.states == {"ok": 24 * 4}
    assert rated.states == {"ok": 24 * 2}
    assert server.paid().total() == 24 * 6
    assert set(server.paid().values()) == {1}
    assert rated.spent == pytest.approx(cents(server))
    for gathered in everything(tmp_path / "run"):
        assert [response.slot for response in gathered.responses] == [0, 1, 2, 3]
        assert len({response.agent for response in gathered.responses}) == 4
        assert all(f"{r.agent} sees" in r.text and r.model == f"{r.agent}-2026-01-01" for r in gathered.responses)
        first, second = (reply.arrangement for reply in gathered.replies)
        assert sorted(first) == sorted(second) == [0, 1, 2, 3]
        assert second == (*first[1:], first[0])


def test_errors_that_pass_change_nothing(tmp_path):
    with Server() as server:
        build(tmp_path / "plain", server)
    with Server(Script(faults=PASSING, times=1)) as server:
        responded, rated = build(tmp_path / "run", server, timeout=2.0)
    assert everything(tmp_path / "run") == everything(tmp_path / "plain")
    seen = Counter(responded.attempts) + Counter(rated.attempts)
    assert min(seen[k] for k in ("rate_limited", "server_error", "connection", "malformed", "timeout", "empty")) > 0
    with Run.open(tmp_path / "run") as run:
        spending = run.spending()
    billed = sum(s.cost for s in spending)
    assert billed == pytest.approx(cents(server))
    assert sum(s.at_risk for s in spending) > 0  # resets, time-outs and broken replies may have been billed


def test_what_would_repeat_itself_is_asked_once_and_another_model_answers(tmp_path):
    faults = {"refusal": 0.1, "content_filter": 0.1, "400": 0.1, "403": 0.1}
    with Server(Script(faults=faults)) as server:
        make_run(tmp_path / "run", 20)
        outcome = respond(tmp_path / "run", write_pool(tmp_path / "pool", server.url), QUIET)
    assert max(Counter(seen.key for seen in server.log).values()) == 1
    assert {"refusal", "content_filter", "rejected"} <= outcome.attempts.keys()
    responses = [gathered.responses for gathered in everything(tmp_path / "run")]
    assert all(len({response.agent for response in of}) == len(of) for of in responses)
    assert outcome.states["ok"] + outcome.states["failed"] > 80  # others were asked in place of some
    assert sum(len(of) for of in responses) == outcome.states["ok"]
    make_run(tmp_path / "again", 20)
    with Server(Script(faults=faults, delay=0.01)) as server:
        respond(tmp_path / "again", write_pool(tmp_path / "pool", server.url, concurrency=2), QUIET)
    assert everything(tmp_path / "again") == everything(tmp_path / "run")


def test_a_judge_is_asked_again_only_where_it_can_help(tmp_path):
    with Server() as server:
        make_answered(tmp_path / "run", 30, server.url)
    faults = {"refusal": 0.15, "truncated": 0.15, "unparsable": 0.15, "content_filter": 0.15}
    with Server(Script(faults=faults)) as server:
        outcome = rate(tmp_path / "run", [write_judge(tmp_path / "judge", server.url)], QUIET)
    repeats = Counter(seen.key for seen in server.log)
    assert Counter(repeats.values()) == {
        1: 30 - outcome.attempts["unparsable"] // 2,
        2: outcome.attempts["unparsable"] // 2,
    }
    assert {"refusal", "truncated", "unparsable", "content_filter", "ok"} <= outcome.attempts.keys()
    kept = Counter(reply.outcome for gathered in everything(tmp_path / "run") for reply in gathered.replies)
    assert sum(kept.values()) == 30


def test_structured_output(tmp_path):
    with Server() as server:
        make_answered(tmp_path / "run", 6, server.url)
        outcome = rate(tmp_path / "run", [write_judge(tmp_path / "judge", server.url, {"form": "json"})], QUIET)
    assert outcome.states == {"ok": 6}
    assert everything(tmp_path / "run")[0].replies[0].text.startswith('{"Helpfulness"')


@pytest.mark.parametrize(
    ("script", "changes", "words"),
    [
        (Script(faults={"quota": 1.0}, times=99), {}, "no credit left.*run the same command again"),
        (
            Script(key="right-key-0123456789"),
            {"api_key_env": "SILKIE_TEST_KEY"},
            "refuses the key: check SILKIE_TEST_KEY",
        ),
        (Script(), {"base_url": "{url}/nowhere"}, "check model and base_url"),
        (Script(faults={"400": 1.0}), {}, "none of the first 10 requests was answered.*not supported"),
        (
            Script(faults={"500": 1.0}, times=99),
            {"attempts": 1},
            "none of the first 10 requests.*the server had an error",
        ),
    ],
)
def test_what_every_request_would_meet_stops_the_run(tmp_path, monkeypatch, script, changes, words):
    monkeypatch.setenv("SILKIE_TEST_KEY", "wrong-key-0123456789")
    with Server(script) as server:
        make_run(tmp_path / "run", 60)
        changes = {key: v.format(url=server.url) if isinstance(v, str) else v for key, v in changes.items()}
        pool = write_pool(tmp_path / "pool", server.url, ("m0",), {"models_per_instruction": 1}, **changes)
        with pytest.raises(UserError, match=words):
            respond(tmp_path / "run", pool, QUIET)
        assert len(server.log) <= (40 if "first 10" in words else 1)  # the first request of a model goes alone
        assert not server.paid()


def test_patience_with_a_server_that_refuses_everything_ends(tmp_path):
    with Server(Script(faults={"429": 1.0}, times=99)) as server:
        make_run(tmp_path / "run", 5)
        pool = write_pool(tmp_path / "pool", server.url, ("m0",), {"models_per_instruction": 1}, patience=1.0)
        with pytest.raises(UserError, match="nothing but 'too many requests' for 1 s"):
            respond(tmp_path / "run", pool, QUIET)
        assert 2 <= len(server.log) <= 5


def test_nobody_listens(tmp_path):
    make_run(tmp_path / "run", 30)
    pool = write_pool(tmp_path / "pool", "http://127.0.0.1:9/v1", attempts=1)
    with pytest.raises(UserError, match=r"none of the first 10 requests was answered \(ConnectError"):
        respond(tmp_path / "run", pool, QUIET)


def test_out_of_credit_then_continued(tmp_path):
    script = Script(credit=30)
    with Server(script) as server:
        make_run(tmp_path / "run", 20)
        pool = write_pool(tmp_path / "pool", server.url)
        with pytest.raises(UserError, match="no credit left"):
            respond(tmp_path / "run", pool, QUIET)
        assert server.paid().total() == 30
        script.credit = None
        assert respond(tmp_path / "run", pool, QUIET).states == {"ok": 80}
        assert server.paid().total() == 80


def test_a_server_down_for_longer_postpones_and_the_next_command_goes_on(tmp_path):
    script = Script(faults={"500": 0.05}, times=99)
    with Server(script) as server:
        make_run(tmp_path / "run", 20)
        pool = write_pool(tmp_path / "pool", server.url, attempts=2)
        with pytest.raises(UserError, match="could not be answered for now"):
            respond(tmp_path / "run", pool, QUIET)
        script.faults = {}
        judge = write_judge(tmp_path / "judge", server.url)
        assert "wait for responses" in rate(tmp_path / "run", [judge], QUIET).table()
        assert respond(tmp_path / "run", pool, QUIET).states == {"ok": 80}
        assert rate(tmp_path / "run", [judge], QUIET).states == {"ok": 20}
        assert set(server.paid().values()) == {1}


@pytest.mark.parametrize("headers", [True, False])
def test_limits_of_the_server_are_kept(tmp_path, headers):
    """40 requests at 10 in half a second: with the server's headers few are refused, without them all get through."""
    with Server(Script(requests=10, window=0.5, headers=headers)) as server:
        make_run(tmp_path / "run", 40)
        pool = write_pool(tmp_path / "pool", server.url, ("m0",), {"models_per_instruction": 1}, concurrency=8)
        outcome = respond(tmp_path / "run", pool, QUIET)
    assert outcome.states == {"ok": 40}
    refused = sum(seen.status == 429 for seen in server.log)
    assert refused <= (24 if headers else 40)


def test_limits_of_the_pool_are_kept(tmp_path, monkeypatch):
    """Ten requests in any half second (the period is shortened for the test)."""
    import silkie_jax.endpoints.lanes as lanes

    limiter = lanes.Limiter
    monkeypatch.setattr(lanes, "Limiter", lambda *args: limiter(*args, period=0.5))
    with Server() as server:
        make_run(tmp_path / "run", 30)
        limits = {"requests_per_minute": 10, "concurrency": 30}
        pool = write_pool(tmp_path / "pool", server.url, ("m0",), {"models_per_instruction": 1}, **limits)
        respond(tmp_path / "run", pool, QUIET)
    with Run.open(tmp_path / "run") as run:  # as sent: on its way to a busy server a request may be overtaken
        times = [when for (when,) in run.db.execute("SELECT started FROM attempts ORDER BY started")]
    assert len(times) == len(server.log) == 30
    assert min(later - earlier for earlier, later in zip(times, times[10:], strict=False)) > 0.45


def test_concurrency_is_kept(tmp_path):
    with Server(Script(delay=0.02)) as server:
        make_run(tmp_path / "run", 30)
        pool = write_pool(tmp_path / "pool", server.url, ("m0",), {"models_per_instruction": 1}, concurrency=3)
        respond(tmp_path / "run", pool, QUIET)
    events = sorted([(s.began, 1) for s in server.log] + [(s.ended, -1) for s in server.log])
    width, widest = 0, 0
    for _, step in events:
        width += step
        widest = max(widest, width)
    assert 2 <= widest <= 3


def test_ctrl_c_drains_and_the_same_command_continues(tmp_path):
    with Server(Script(delay=0.1)) as server:
        make_run(tmp_path / "run", 60)
        pool = write_pool(tmp_path / "pool", server.url, concurrency=2)
        process = start("respond", tmp_path / "run", "--pool", pool)
        while len(server.log) < 30:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "interrupted; every reply is stored" in told
        paid = server.paid().total()
        with Run.open(tmp_path / "run") as run:
            assert run.db.execute("SELECT count(*) FROM attempts WHERE outcome = 'ok'").fetchone()[0] == paid < 240
            assert run.spent() == pytest.approx(cents(server))
        respond(tmp_path / "run", pool, QUIET)
        assert server.paid().total() == 240


def test_one_process_at_a_time(tmp_path):
    make_run(tmp_path / "run", 1)
    with Run.create(tmp_path / "run"), pytest.raises(UserError, match="another process is working on the run"):
        respond(tmp_path / "run", write_pool(tmp_path / "pool", "http://127.0.0.1:9/v1"), QUIET)


def test_another_pool_is_refused_but_other_limits_are_not(tmp_path):
    with Server() as server:
        make_answered(tmp_path / "run", 4, server.url)
        respond(tmp_path / "run", write_pool(tmp_path / "pool", server.url, concurrency=3), QUIET)
        with pytest.raises(UserError, match=r"another pool: models.m0.system was None and is 'Be brief'"):
            respond(tmp_path / "run", write_pool(tmp_path / "pool", server.url, system="Be brief"), QUIET)
        assert len(server.log) == 16


def test_dry_run_sends_nothing_and_changes_nothing(tmp_path):
    make_run(tmp_path / "run", 8)
    pool = write_pool(tmp_path / "pool", "http://127.0.0.1:9/v1", api_key_env="NOT_SET_ANYWHERE")
    outcome = respond(tmp_path / "run", pool, Options(dry_run=True, progress=False))
    assert sum(e.requests for e in outcome.estimates) == 32
    assert "$" in outcome.table()
    with Run.open(tmp_path / "run") as run:
        assert run.settings("pool") is None
        assert run.db.execute("SELECT count(*) FROM requests").fetchone()[0] == 0
    with pytest.raises(UserError, match="NOT_SET_ANYWHERE is not set"):
        respond(tmp_path / "run", pool, QUIET)
