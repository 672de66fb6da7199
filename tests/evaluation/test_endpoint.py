"""Answers of a server: the same file form, images sent, nothing asked twice, what is refused marked as such."""

import json

import pytest

from silkie_jax import cli
from silkie_jax.evaluation.running import answers as files
from silkie_jax.evaluation.running.scoring import score_answers
from tests.endpoints.server import Script, Server
from tests.evaluation.support import write_mcq, write_yesno


@pytest.fixture
def data(tmp_path):
    return write_yesno(tmp_path / "data", images=4)


def reply(body: dict) -> str:
    """What was asked, back: text and the number of images."""
    content = body["messages"][-1]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    kinds = [part["type"] for part in parts]
    text = next(part["text"] for part in parts if part["type"] == "text")
    return f" {kinds.count('image_url')} {text} {body['temperature']} {body['max_tokens']} "


def answer(server, data, out, *options) -> int:
    asked = ["--data", data, "--endpoint", server.url, "--model", "theirs", "--out", out, *options]
    return cli.main(["evaluate", "answer", "yesno", *map(str, asked)])


def test_every_item_is_asked_once_with_its_image(data, tmp_path):
    out = tmp_path / "answers.jsonl"
    with Server(Script(reply=reply)) as server:
        assert answer(server, data, out, "--max-new-tokens", "7") == 0
        assert answer(server, data, out, "--max-new-tokens", "7") == 0
        assert len(server.log) == 13
        url = server.url
    origin, answers = files.read_answers(out)
    questions = [json.loads(line) for line in data.read_text().splitlines()]
    said = {line["id"]: f"{int('image' in line)} {line['question']} 0.0 7" for line in questions}
    assert {a.id: a.text for a in answers} == said
    assert [a.id for a in answers] == [line["id"] for line in questions]
    assert origin.endpoint == f"theirs at {url}"
    assert origin.weights is None


def test_it_goes_on_where_it_was_cut_off_and_refuses_another_experiment(data, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    with Server(Script(reply=reply, faults={"500": 0.5})) as server:
        assert answer(server, data, out) == 0
        assert set(server.paid().values()) == {1}
        assert answer(server, data, out, "--temperature", "1") == 1
    assert "was begun with another decoding" in capsys.readouterr().err


def test_items_draw_apart_and_alike_whenever_they_are_asked(data, tmp_path):
    seeds = []
    for name, options in (("one", ["--seed", "3"]), ("again", ["--seed", "3"]), ("other", ["--seed", "4"])):
        sent = []
        with Server(Script(reply=lambda body, sent=sent: sent.append(body.get("seed")) or "Yes.")) as server:
            assert answer(server, data, tmp_path / name, "--temperature", "1", *options) == 0
        seeds.append(set(sent))
        assert len(seeds[-1]) == 13
    assert seeds[0] == seeds[1]
    assert not seeds[0] & seeds[2]


def test_what_the_endpoint_refuses_is_marked(data, tmp_path):
    out = tmp_path / "answers.jsonl"
    with Server(Script(reply=reply, faults={"refusal": 1.0})) as server:
        assert answer(server, data, out) == 0
    _, answers = files.read_answers(out)
    assert {a.text for a in answers} == {"I cannot help with that."}  # in the server's words
    assert {a.fields["failed"] for a in answers} == {"refusal"}
    assert score_answers("yesno", out).as_dict()["counts"]["refused or failed at the endpoint"] == 13


def test_options_cannot_be_compared_by_an_endpoint(tmp_path, capsys):
    write_mcq(tmp_path / "mcq", images=2)
    seed = {
        "question_type": {"Scene Understanding": 1},
        "questions": [
            {"question_id": "1", "question": "What?", "data_id": "0.png", "data_type": "image", "question_type_id": 1}
            | {"answer": "A", **{f"choice_{k}": k for k in "abcd"}}
        ],
    }
    (tmp_path / "mcq" / "SEED-Bench.json").write_text(json.dumps(seed))
    asked = ["--data", tmp_path / "mcq", "--endpoint", "http://127.0.0.1:1/v1", "--model", "m", "--out", tmp_path / "a"]
    assert cli.main(["evaluate", "answer", "seedbench", *map(str, asked)]) == 1
    assert "options are compared by their likelihoods" in capsys.readouterr().err
