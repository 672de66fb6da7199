"""The policy as its own judge: requests, differences, what is missing, and what comes of a policy that is the start."""

import json
import math

import pytest

from data_prep.corpora.build import build
from data_prep.judging.implicit import ASPECT, filed
from data_prep.judging.kinds import kept_of, load_judge, reading
from data_prep.judging.rate import rate
from data_prep.respond import respond
from data_prep.run import Gathered, Instruction, JudgeReply, Run, StoredResponse
from silkie_jax.corpus import CorpusReader
from silkie_jax.corpus.pairs import pairs
from silkie_jax.endpoints.outcomes import MALFORMED, OK, read_data
from silkie_jax.errors import UserError
from tests.data_prep.runs import QUIET, everything, make_answered, make_run, write_pool
from tests.endpoints.server import Server

KEPT = {"kind": "implicit", "name": "implicit"}


def write_implicit(path, **keys):
    path.write_text(json.dumps({"kind": "implicit", **keys}))
    return path


def scores(side: str, slots, values, outcome="ok") -> JudgeReply:
    text = json.dumps([{"index": n, "logprob": value, "tokens": 3} for n, value in enumerate(values)])
    return JudgeReply(filed("j", side), 0, tuple(slots), text if values else "", outcome, "stop", "tiny")


def gathered(*replies: JudgeReply, slots=(0, 1, 3)) -> Gathered:
    responses = tuple(StoredResponse(slot, "m", "", f"text {slot}", "ok", 3) for slot in slots)
    return Gathered(Instruction("i", "?"), responses, replies)


def test_the_reward_is_the_difference_slot_by_slot():
    replies = scores("policy", (0, 1, 3), (-4.0, -2.5, -9.0)), scores("start", (3, 0, 1), (-8.0, -5.0, -2.0))
    (found,) = reading("j", KEPT).judgements(gathered(*replies))
    assert (found.judge, found.kind, found.ratings) == ("j", "complete", {ASPECT: [1.0, -0.5, -1.0]})
    assert found.shown == (0, 1, 2)


@pytest.mark.parametrize(
    ("start", "kind", "note"),
    [
        (None, "failed", "no log-probabilities of the start (not asked)"),
        (scores("start", (0, 1, 3), (), "rejected"), "failed", "no log-probabilities of the start (rejected)"),
        (scores("start", (0, 1), (-1.0, -2.0)), "missing", "1 responses came after it was asked"),
        (scores("start", (0, 1, 3), (-1.0, math.inf, -2.0)), "failed", "no log-probabilities of the start (ok)"),
    ],
)
def test_what_is_missing_is_said(start, kind, note):
    policy = scores("policy", (0, 1, 3), (-4.0, -2.5, -9.0))
    (found,) = reading("j", KEPT).judgements(gathered(*filter(None, (policy, start))))
    assert (found.kind, found.note) == (kind, note)
    assert math.isnan(found.ratings[ASPECT][2])


def test_an_instruction_that_was_not_asked_about_has_no_judgement():
    assert reading("j", KEPT).judgements(gathered()) == []


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"policy": {"local": "a"}}, "start.local must name a model's folder, or start.base_url"),
        ({"policy": {"local": "a", "base_url": "http://x/v1"}, "start": {"local": "a"}}, "policy.local must name"),
        ({"policy": {"base_url": "http://x/v1", "adapter": "a"}}, "policy.adapter has no meaning with base_url"),
        ({"policy": {"local": "a"}, "start": {"local": "a", "sampling": {}}}, "unknown key start.sampling"),
        ({"kind": "oracle"}, "kind: 'oracle' is unknown; choose one of rubric, verdict, implicit"),
    ],
)
def test_what_is_refused(tmp_path, keys, words):
    with pytest.raises(UserError, match=words):
        load_judge(write_implicit(tmp_path / "judge", **keys))


def test_a_list_of_data_is_a_reply():
    found = read_data(200, '{"model": "m", "data": [{"logprob": -1.5}], "usage": {"total_tokens": 9}}')
    assert (found.outcome, found.text, found.input_tokens, found.output_tokens) == (OK, '[{"logprob":-1.5}]', 9, 0)
    assert read_data(200, '{"data": "none"}').outcome == MALFORMED
    assert read_data(400, '{"error": {"message": "too long"}}').error == "HTTP 400: too long"


def test_it_is_asked_with_texts_and_resumed(tmp_path):
    """The scripted server knows no log-probabilities: each request is malformed there, and sent again later."""
    with Server() as server:
        run = make_answered(tmp_path / "run", 2, server.url)
        sides = {side: {"base_url": server.url, "timeout": 60} for side in ("policy", "start")}
        judge = write_implicit(tmp_path / "judge", **sides)
        with pytest.raises(UserError, match="its endpoint does not know the model '' or the path"):
            rate(run, [judge], QUIET)
    with Run.open(run) as opened:
        rows = opened.db.execute("SELECT agent, arrangement, body, state FROM requests WHERE stage = 'rate'").fetchall()
        assert kept_of(opened.settings("judge:implicit")) == KEPT
    assert {name for name, *_ in rows} == {"implicit: policy", "implicit: start"}
    assert {state for *_, state in rows} == {"open"}
    texts = [response.text for response in everything(run)[0].responses]
    _, slots, body, _ = rows[0]
    body = json.loads(body)
    assert (body["texts"], json.loads(slots)) == (texts, [0, 1, 2, 3])
    assert body["images"][0]["url"].startswith("silkie-image:")


@pytest.mark.slow
def test_a_policy_that_is_the_start_prefers_nothing(tmp_path, monkeypatch, capfd):
    """Both sides share one server; all rewards are 0, and no rule finds a pair."""
    import os

    from tests.training.support import make_tiny

    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "").replace("device_count=8", "device_count=1"))
    model = make_tiny(tmp_path / "tiny", layers=1, vision_layers=1)
    with Server() as server:
        pool = write_pool(tmp_path / "pool", server.url, ("a", "b"), {"models_per_instruction": 2})
        respond(make_run(tmp_path / "run", 2), pool, QUIET)
    side = {"local": str(model), "dtype": "float32"}
    outcome = rate(tmp_path / "run", [write_implicit(tmp_path / "judge", policy=side, start=side)], QUIET)
    assert outcome.states == {"ok": 4}
    assert capfd.readouterr().err.count("engine: ") == 1
    build(tmp_path / "run", tmp_path / "corpus", progress=False)
    records = list(CorpusReader(tmp_path / "corpus"))
    assert [[r.ratings for r in record.responses] for record in records] == [[{ASPECT: 0.0}] * 2] * 2
    rules = ("mean_rating", "best_vs_worst", {"name": "aspect", "aspect": ASPECT})
    assert [pairs(record, rule) for record in records for rule in rules] == [[]] * 6
