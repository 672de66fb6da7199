"""Orders in which judges see responses, several judges, and what a judge is shown."""

import json
from collections import Counter

import pytest

from data_prep.judging.by_rubric import Judge, arrangements
from data_prep.judging.rate import rate
from data_prep.run import Gathered, Instruction, Run, StoredResponse
from silkie_jax.endpoints.agents import Agent
from silkie_jax.errors import UserError
from tests.data_prep.runs import QUIET, everything, make_answered, make_run, write_judge
from tests.endpoints.server import Server


def gathered(id: str, slots=(0, 1, 2, 3)) -> Gathered:
    responses = tuple(StoredResponse(slot, f"m{slot}", "", f"text {slot}", "ok", 3) for slot in slots)
    return Gathered(Instruction(id, "?"), responses, ())


def judge(**changes) -> Judge:
    return Judge(agent=Agent(model="j"), **{"name": "j", **changes})


def test_as_many_orders_as_responses_show_each_at_every_place():
    for n in range(20):
        orders = arrangements(judge(orders=4), gathered(f"i{n}"))
        for place in range(4):
            assert {order[place] for order in orders} == {0, 1, 2, 3}
        assert len(set(arrangements(judge(orders=24), gathered(f"i{n}")))) == 24
    assert len(arrangements(judge(orders=5), gathered("i", slots=(0, 1)))) == 5


def test_orders_are_seeded_and_even():
    first = [arrangements(judge(), gathered(f"i{n}"))[0] for n in range(600)]
    assert first == [arrangements(judge(), gathered(f"i{n}"))[0] for n in range(600)]
    assert first != [arrangements(judge(seed=1), gathered(f"i{n}"))[0] for n in range(600)]
    assert first != [arrangements(judge(name="k"), gathered(f"i{n}"))[0] for n in range(600)]
    counts = Counter(first)
    assert len(counts) == 24
    assert max(counts.values()) < 3 * min(counts.values())


def test_more_orders_begin_with_those_of_fewer():
    """So a run that was rated in one order can be continued with four, and pays for three."""
    few, many = (arrangements(judge(orders=n), gathered("i")) for n in (1, 4))
    assert many[0] == few[0]


def test_missing_responses_leave_no_gap():
    assert sorted(arrangements(judge(), gathered("i", slots=(0, 3)))[0]) == [0, 3]


def test_the_judge_sees_the_texts_in_the_recorded_order(tmp_path):
    with Server() as server:
        make_answered(tmp_path / "run", 5, server.url)
        rate(tmp_path / "run", [write_judge(tmp_path / "judge", server.url)], QUIET)
    texts = [[response.text for response in of.responses] for of in everything(tmp_path / "run")]
    with Run.open(tmp_path / "run") as run:
        rows = run.db.execute("SELECT instruction, arrangement, body FROM requests WHERE stage = 'rate'").fetchall()
    assert len(rows) == 5
    for number, arrangement, body in rows:
        image, words = json.loads(body)["messages"][-1]["content"]
        assert image["image_url"]["url"].startswith("silkie-image:")  # stored once, not with every request
        for place, slot in enumerate(json.loads(arrangement), start=1):
            assert f"<text {place}>\n{texts[number - 1][slot]}\n</text {place}>" in words["text"]


def test_several_judges_at_once_or_one_after_the_other(tmp_path):
    with Server() as server:
        judges = [write_judge(tmp_path / n, server.url, {"name": n}, sampling={"user": n}) for n in ("a", "b")]
        for name in ("together", "apart"):
            make_answered(tmp_path / name, 5, server.url)
        rate(tmp_path / "together", judges, QUIET)
        for one in reversed(judges):
            rate(tmp_path / "apart", [one], QUIET)
        with pytest.raises(UserError, match="there are two judges 'a'"):
            rate(tmp_path / "apart", [judges[0], judges[0]], QUIET)
        other = write_judge(tmp_path / "other", server.url, {"name": "a", "seed": 7}, sampling={"user": "a"})
        with pytest.raises(UserError, match="another judge a: seed was 0 and is 7"):
            rate(tmp_path / "apart", [other], QUIET)
    assert everything(tmp_path / "together") == everything(tmp_path / "apart")
    assert [reply.judge for reply in everything(tmp_path / "apart")[0].replies] == ["a", "b"]


def test_later_orders_are_added(tmp_path):
    with Server() as server:
        make_answered(tmp_path / "run", 5, server.url)
        rate(tmp_path / "run", [write_judge(tmp_path / "judge", server.url)], QUIET)
        outcome = rate(tmp_path / "run", [write_judge(tmp_path / "judge", server.url, {"orders": 4})], QUIET)
        assert outcome.states == {"ok": 20}
        assert set(server.paid().values()) == {1}


def test_nothing_to_rate(tmp_path):
    make_run(tmp_path / "run", 2)
    with pytest.raises(UserError, match="holds no responses"):
        rate(tmp_path / "run", [write_judge(tmp_path / "judge", "http://127.0.0.1:9/v1")], QUIET)
