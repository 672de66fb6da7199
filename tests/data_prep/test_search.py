"""Sentence search against a server: trees grow by requests that are journalled, and the same replies give the same."""

import json
from contextlib import asynccontextmanager
from typing import ClassVar

import pytest

from data_prep.respond import load_pool, respond
from data_prep.run import Run
from data_prep.sentences import Candidate, Search, grow
from silkie_jax.endpoints.client import CANDIDATES, SIMILARITY
from silkie_jax.errors import UserError
from tests.data_prep.runs import QUIET, agent, everything, make_run

SMALL = Search(candidates=3, best=1, worst=1, select_by="language")


def gives(*texts, finish="stop"):
    return [Candidate(text, -1.0 - number, finish) for number, text in enumerate(texts)]


def test_a_tree_asks_level_by_level():
    assert grow(SMALL, {}).to_ask == {0: ""}
    first = {0: gives("One.", "Two.", "Two.", "Three.", "Last", "")}
    grown = grow(SMALL, first)
    assert [(one.number, one.text, one.final) for one in grown.tree] == [
        (1, "One.", False), (2, "Two.", False), (3, "Three.", False), (4, "Last", True), (5, "", True),
    ]  # fmt: skip
    assert grown.to_ask == {1: "One.", 3: "Three."}, "the best and the worst of three open ones"
    waiting = grow(SMALL, first | {3: gives(" Ends")})
    assert waiting.to_ask == {1: "One."}, "a level is whole before the next begins"
    done = grow(SMALL, first | {3: gives(" Ends"), 1: []})
    assert (done.to_ask, done.to_compare) == ({}, {})
    assert [one.parent for one in done.tree] == [0, 0, 0, 0, 0, 3]


def test_a_sentence_that_is_cut_goes_on_and_a_long_response_ends():
    assert not grow(SMALL, {0: gives("cut", finish="length")}).tree[0].final
    short = Search(max_characters=4, select_by="language")
    assert grow(short, {0: gives("One.")}).tree[0].final


def test_the_reward_selects_by_likeness_where_it_is_known():
    search = Search(candidates=3, best=1, worst=0, select_by="reward")
    replies = {0: gives("One.", "Two.", "Three.", "")}
    grown = grow(search, replies)
    assert (grown.to_ask, grown.to_compare) == ({}, {0: ("One.", "Two.", "Three.")})
    assert grow(search, replies, {0: [1.0, 30.0, 2.0]}).to_ask == {2: "Two."}
    assert grow(search, replies, {0: []}).to_ask == {1: "One."}, "by language alone where the server has none"


class Fake:
    """In the place of a client: three continuations of every text, and CLIP; counts what it answers."""

    asked: ClassVar[list] = []

    def __init__(self, agent, key, base_url=None, route=None):
        self.route = route

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def ask(self, body):
        request = json.loads(body)
        Fake.asked.append(request)
        if self.route is SIMILARITY:
            assert request["images"][0]["url"].startswith("data:image/png")
            data = [{"index": n, "similarity": 20.0 + len(text)} for n, text in enumerate(request["texts"])]
            raw = {"data": data, "model": "clip", "usage": {"total_tokens": 5}}
        else:
            last = request["messages"][-1]
            said = last["content"] if last["role"] == "assistant" else ""
            assert request.get("continue_final_message", False) == bool(said)
            depth = said.count(".")
            texts = [f" Goes{'.' * (depth < 2)}", f" Stays here{'.' * (depth < 2)}", ""][: 3 if said else 2]
            choices = [
                {
                    "message": {"content": text},
                    "finish_reason": "stop",
                    "logprobs": {"content": [{"logprob": -0.5 - 0.1 * n}] * 2},
                }
                for n, text in enumerate(texts)
            ]
            usage = {"prompt_tokens": 10, "completion_tokens": 4}
            raw = {"choices": choices, "model": "own-1", "usage": usage}
        return self.route.read(200, json.dumps(raw)), {}


def write_search(path, **changes):
    search = {"candidates": 3, "similarity": {"base_url": "http://127.0.0.1:9/v1"}, **changes}
    model = agent("http://127.0.0.1:9/v1", "own", search=search, concurrency=2)
    path.write_text(json.dumps({"models": {"own": model}, "models_per_instruction": 1}))
    return path


def test_from_instructions_to_responses_stopped_and_continued(tmp_path, monkeypatch):
    monkeypatch.setattr("silkie_jax.endpoints.client.Client", Fake)
    monkeypatch.setattr(Fake, "asked", [])
    pool = write_search(tmp_path / "pool")
    whole = make_run(tmp_path / "whole", 2)
    respond(whole, pool, QUIET)
    count = len(Fake.asked)
    root = next(request for request in Fake.asked if "messages" in request)
    assert (root["n"], root["logprobs"], root["stop"], root["include_stop_str_in_output"]) == (3, True, ["."], True)
    assert root["max_tokens"] == 70
    respond(whole, pool, QUIET)
    assert len(Fake.asked) == count, "nothing is asked twice"
    found = everything(whole)
    for gathered in found:
        texts = [response.text for response in gathered.responses]
        assert {"Goes.", "Goes. Goes. Goes", "Stays here. Stays here. Stays here"} <= set(texts)
        assert len(set(texts)) == len(texts)
        for response in gathered.responses:
            assert "".join(one.text for one in gathered.way(response)).strip() == response.text
            assert (response.agent, response.model) == ("own", "own-1")

    # The same, stopped after every fifth reply.
    class Stopping(Fake):
        async def ask(self, body):
            if len(Fake.asked) % 5 == 4:
                Fake.asked.append(None)
                raise RuntimeError("killed")
            return await super().ask(body)

    Fake.asked = []
    monkeypatch.setattr("silkie_jax.endpoints.client.Client", Stopping)
    parts = make_run(tmp_path / "parts", 2)
    for _ in range(40):
        try:
            respond(parts, pool, QUIET)
            break
        except RuntimeError:
            continue
    assert everything(parts) == found
    with Run.open(parts) as run:
        assert run.db.execute("SELECT count(*) FROM requests WHERE state = 'ok'").fetchone()[0] == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "beams"}, "there is no search 'beams'"),
        ({"similarity": None}, "name the CLIP server that the reward needs"),
        ({"select_by": "language"}, "similarity is asked in select_by: reward only"),
        ({"select_by": "clip"}, "choose reward or language"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"clip_weight": 2}, "clip_weight must lie between 0 and 1"),
    ],
)
def test_searches_that_make_no_sense_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_pool(write_search(tmp_path / "pool", **changes))


def test_replies_with_candidates_are_read():
    token = {"logprob": -0.25}
    choice = {"message": {"content": ""}, "finish_reason": "stop", "logprobs": {"content": []}}
    other = {"message": {"content": "a."}, "finish_reason": "stop", "logprobs": {"content": [token, token]}}
    reply = CANDIDATES.read(200, json.dumps({"choices": [choice, other]}))
    assert reply.outcome == "ok"
    assert json.loads(reply.text) == [
        {"text": "", "logprob": 0.0, "finish": "stop"}, {"text": "a.", "logprob": -0.5, "finish": "stop"},
    ]  # fmt: skip
    assert CANDIDATES.read(200, json.dumps({"choices": [choice | {"logprobs": None}]})).outcome == "ok"
    assert CANDIDATES.read(200, json.dumps({"choices": []})).outcome == "malformed"


def test_a_local_model_is_served_once_while_it_takes_turns_with_the_clip_server(tmp_path, monkeypatch):
    served = []

    @asynccontextmanager
    async def server(agents):
        served.append(sorted(agents))
        yield "http://127.0.0.1:9/v1"

    monkeypatch.setattr("silkie_jax.endpoints.client.Client", Fake)
    monkeypatch.setattr("silkie_jax.endpoints.stage.local_server", server)
    monkeypatch.setattr(Fake, "asked", [])
    pool = write_search(tmp_path / "pool")
    config = json.loads(pool.read_text())
    config["models"]["own"] = {"local": "weights", "search": config["models"]["own"]["search"]}
    pool.write_text(json.dumps(config))
    run = make_run(tmp_path / "run", 2)
    respond(run, pool, QUIET)
    assert served == [["own"]]
    assert {len(gathered.responses) for gathered in everything(run)} != {0}
