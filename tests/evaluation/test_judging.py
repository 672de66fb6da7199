"""Asking a judge: against a real server on this machine that speaks OpenAI's API."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from silkie_jax.endpoints.stage import Options
from silkie_jax.errors import UserError
from silkie_jax.evaluation import mmvet
from silkie_jax.evaluation.benchmark import Answer
from silkie_jax.evaluation.running import judging
from silkie_jax.evaluation.running.replies import write_replies
from tests.endpoints.server import Script, Server
from tests.evaluation.scoring import write

QUIET = Options(progress=False, poll=0.01)


def grade(request):
    """q0 is read at once, q1 at the third request, others never."""
    number = request["messages"][-1]["content"].split("\nq")[-1].partition("?")[0]
    if number == "0" or (number == "1" and request["temperature"] == 0.5):
        return "0.5"
    return f"hm {request['temperature']}"


def questions(folder, count=3):
    record = {"imagename": "i.png", "answer": "a", "capability": ["ocr"]}
    data = write(folder / "mm-vet.json", {f"v1_{n}": {**record, "question": f"q{n}?"} for n in range(count)})
    items = mmvet.items(data, {})
    return items, [Answer(item.id, f"answer {item.id}") for item in items]


def config(folder, url, **agent) -> Path:
    settings = {"model": "judge", "base_url": url, "timeout": 60.0, "price": {"input": 1.0, "output": 2.0}, **agent}
    return write(folder / "judge.yaml", {"agent": settings})


@pytest.fixture
def ask(tmp_path):
    """Asks the judge of a server about the questions."""

    def ask(server, answers=None, options=QUIET, runs=1, agent=None, count=3, **more):
        items, given = questions(tmp_path, count)
        judge = config(tmp_path, server.url, **(agent or {}))
        return judging.judge("mmvet", items, answers or given, {}, judge, tmp_path / "run", options, runs, **more)

    return ask


@pytest.mark.parametrize("batch", [False, True])
def test_dialogues_go_on_until_they_end(ask, batch):
    with Server(Script(reply=grade)) as server:
        found = ask(server, options=replace(QUIET, batch=batch))
        again = ask(server, options=replace(QUIET, batch=batch))
        assert set(server.paid().values()) == {1}
        # Six requests, of which the first two differ by a line only: all bodies are different.
        assert len(server.paid()) == 1 + 3 + 6
    assert found.runs[0]["v1_0"] == ("0.5",)
    assert found.runs[0]["v1_1"] == ("hm 0.0", "hm 0.0", "0.5")
    assert found.runs[0]["v1_2"] == ("hm 0.0", "hm 0.0", "hm 0.5", "hm 1.0", "hm 1.5", "hm 2.0")
    assert again == found
    assert found.models == {"judge-2026-01-01": 10}


def test_changed_answers_are_asked_about_anew_and_others_are_not(ask, tmp_path):
    answers = questions(tmp_path)[1]
    changed = [Answer("v1_0", "another answer"), *answers[1:]]
    with Server(Script(reply=grade)) as server:
        ask(server)
        before = len(server.log)
        ask(server, changed)
        assert len(server.log) == before + 1
        ask(server)
        ask(server, changed, runs=2)
        assert len(server.log) == before + 1 + 10
        found = ask(server, runs=2)
        assert len(found.runs) == 2
        assert len(server.log) == before + 1 + 10 + 1  # the second run about the first answer


def test_another_judge_is_asked_anew(ask):
    with Server(Script(reply=grade)) as server:
        ask(server)
        ask(server, agent={"model": "other"})
        assert {seen.model for seen in server.log} == {"judge", "other"}
        assert len(server.log) == 20


def test_what_is_sent(ask):
    sent = []

    def reply(request):
        sent.append(request)
        return "1"

    with Server(Script(reply=reply)) as server:
        ask(server, count=1)
        ask(server, count=1, agent={"max_tokens": 7, "system": "be kind", "sampling": {"temperature": None, "seed": 3}})
    first, second = sent
    assert (first["temperature"], first["max_tokens"], len(first["messages"])) == (0.0, 3, 1)
    assert (second["max_tokens"], second["seed"], second["messages"][0]["content"]) == (7, 3, "be kind")
    assert "temperature" not in second


def test_refusals_are_counted_apart(ask, tmp_path):
    with Server(Script(reply=grade, faults={"refusal": 1.0})) as server:
        found = ask(server)
        assert ask(server) == found
        assert len(server.log) == 3
    assert found.failed == {"refusal": 3}
    assert found.runs == [{}]
    items, answers = questions(tmp_path)
    score = mmvet.score(items, answers, found, "official", {})
    assert score.counts["no reply"] == 3
    assert score.outcomes == {}


def test_a_dry_run_asks_nothing(ask):
    reports = []
    with Server(Script(reply=grade)) as server:
        found = ask(server, options=replace(QUIET, dry_run=True), report=reports.append)
        assert not server.log
        assert found.runs == [{}]
        assert reports[0].estimates[0].requests == 3
        ask(server)
        assert len(ask(server, options=replace(QUIET, dry_run=True)).runs[0]) == 3


def test_a_budget_stops_it_and_more_goes_on(ask):
    with Server(Script(reply=grade)) as server:
        with pytest.raises(UserError, match="budget"):
            ask(server, options=replace(QUIET, budget=0.003), agent={"concurrency": 1})
        assert 0 < len(server.log) < 10
        assert len(ask(server).runs[0]) == 3
        assert set(server.paid().values()) == {1}


def test_requests_about_answers_that_changed_meanwhile_are_not_sent(ask, tmp_path):
    changed = [Answer(answer.id, "another") for answer in questions(tmp_path)[1]]
    with Server(Script(reply=grade, credit=4)) as server:
        with pytest.raises(UserError, match="no credit"):
            ask(server, agent={"concurrency": 1})
        server.script.credit = None
        sent = len(server.log)
        ask(server, changed)
        assert len(server.log) == sent + 10
        ask(server)
        assert sum(server.paid().values()) == 20


def test_the_same_file_however_often_it_is_interrupted(ask, tmp_path):
    with Server(Script(reply=grade)) as server:
        write_replies(tmp_path / "whole.jsonl", ask(server, count=4))
        whole = len(server.log)
    (tmp_path / "run").rename(tmp_path / "first run")
    with Server(Script(reply=grade, credit=0)) as server:
        for _ in range(5):
            server.script.credit += 5
            with contextlib.suppress(UserError):
                write_replies(tmp_path / "pieces.jsonl", ask(server, count=4, agent={"concurrency": 2}))
                break
        assert sum(server.paid().values()) == whole
        assert set(server.paid().values()) == {1}
    assert (tmp_path / "pieces.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_killed_and_continued(ask, tmp_path):
    """Nothing is paid twice but what was in flight."""
    with Server(Script(reply=grade, delay=0.02)) as server:
        questions(tmp_path, 5)
        judge = config(tmp_path, server.url, concurrency=2)
        code = f"""
from pathlib import Path
from silkie_jax.endpoints.stage import Options
from silkie_jax.evaluation import mmvet
from silkie_jax.evaluation.benchmark import Answer
from silkie_jax.evaluation.running.judging import judge
items = mmvet.items(Path({str(tmp_path / "mm-vet.json")!r}), {{}})
answers = [Answer(item.id, f"answer {{item.id}}") for item in items]
judge("mmvet", items, answers, {{}}, Path({str(judge)!r}), Path({str(tmp_path / "run")!r}), Options(progress=False))
"""
        process = subprocess.Popen([sys.executable, "-c", code])
        deadline = time.monotonic() + 30
        while len(server.log) < 6 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 6 <= len(server.log) < 20
        server.script.delay = 0.0
        found = ask(server, count=5)
        paid = server.paid()
        assert len(paid) == 1 + 3 + 3 * 6
        assert sum(paid.values()) <= len(paid) + 2
    assert len(found.runs[0]) == 5


def test_lone_surrogates_are_sent_as_something(ask):
    with Server(Script(reply=lambda _: "1")) as server:
        found = ask(server, [Answer("v1_0", "\ud83d")], count=1)
    assert found.runs[0] == {"v1_0": ("1",)}


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"agent": {"model": ""}}, "agent.model must be set"),
        ({"agent": {"model": "m"}, "rubric": "x"}, "unknown key rubric"),
        ({"agent": {"model": "m", "api_key_env": "NO_SUCH_VARIABLE"}}, "NO_SUCH_VARIABLE is not set"),
    ],
)
def test_judges_that_cannot_be_asked(tmp_path, judge, message):
    items, answers = questions(tmp_path)
    path = write(tmp_path / "judge.yaml", judge)
    with pytest.raises(UserError, match=message):
        judging.judge("mmvet", items, answers, {}, path, tmp_path / "run", QUIET)


def test_the_example_judge_is_read():
    path = Path(__file__).parents[2] / "configs" / "judges" / "evaluation.yaml"
    judge, own_length = judging.load_judge(path)
    assert (judge.agent.api_key_env, own_length) == ("OPENAI_API_KEY", False)
    assert json.dumps(judge.agent.sampling) == "{}"
