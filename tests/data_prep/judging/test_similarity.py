"""The judge by likeness to the image: what is asked of a CLIP server, what comes of its replies, and the server."""

import base64
import json
import math

import pytest

from data_prep.clip_server import make_app, read_request
from data_prep.corpora.build import build
from data_prep.judging.kinds import load_judge
from data_prep.judging.rate import rate
from data_prep.judging.similarity import ASPECT
from data_prep.respond import respond
from data_prep.sentences import path_reward, paths, sentence_rewards, text_of
from silkie_jax.corpus import CorpusReader
from silkie_jax.corpus.pairs import pairs
from silkie_jax.errors import UserError
from tests.data_prep.runs import QUIET, everything, make_run, picture
from tests.data_prep.test_search import Fake, write_search


def write_clip(path, **changes):
    agent = {"base_url": "http://127.0.0.1:9/v1", "price": {"input": 0, "output": 0}}
    path.write_text(json.dumps({"kind": "similarity", "name": "clip", "agent": agent, **changes}))
    return path


def test_responses_of_a_search_are_worth_what_their_sentences_are(tmp_path, monkeypatch):
    monkeypatch.setattr("silkie_jax.endpoints.client.Client", Fake)
    monkeypatch.setattr(Fake, "asked", [])
    run = make_run(tmp_path / "run", 2)
    respond(run, write_search(tmp_path / "pool"), QUIET)
    begun = len(Fake.asked)
    assert rate(run, [write_clip(tmp_path / "clip")], QUIET).states == {"ok": 2}
    request = Fake.asked[begun]
    gathered = everything(run)[0]
    assert request["texts"] == [one.text.strip() for one in gathered.trees["own"] if one.text]
    build(run, tmp_path / "corpus", progress=False, workers=1)
    tree = gathered.trees["own"]
    likeness = {one.number: 20.0 + len(one.text.strip()) for one in tree if one.text}
    for reward, over, folder in (("rank", "mean", "corpus"), ("raw", "sum", "paper")):
        if folder == "paper":  # another derivation asks nothing
            rate(run, [write_clip(tmp_path / "clip", reward=reward, over=over, filter="none")], QUIET)
            build(run, tmp_path / folder, progress=False, workers=1)
        rewards = sentence_rewards(tree, likeness, reward=reward)
        worth = {text_of(path): path_reward(path, rewards, over) for path in paths(tree)}
        record = CorpusReader(tmp_path / folder)[0]
        found = {one.text: one.ratings[ASPECT] for one in record.responses}
        assert found == {text: pytest.approx(value) for text, value in worth.items() if text}
        ((chosen, rejected),) = pairs(record, "best_vs_worst")
        best, worst = record.responses[chosen].text, record.responses[rejected].text
        assert (found[best], found[worst]) == (max(found.values()), min(found.values()))
    assert len(Fake.asked) == begun + 2
    assert all(not math.isnan(value) for value in found.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "clip"}, "reward: 'clip' is unknown; choose one of raw, rank"),
        ({"over": "all"}, "choose one of mean, sum, release"),
        ({"filter": "x"}, "choose one of repetition, release, none"),
        ({"clip_weight": -1}, "clip_weight must lie between 0 and 1"),
        ({"agent": {"local": "clip"}}, "start a CLIP server and name its base_url"),
    ],
)
def test_mistakes_are_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_judge(write_clip(tmp_path / "clip", **changes))


def url() -> str:
    return "data:image/png;base64," + base64.b64encode(picture(3)).decode()


def test_requests_to_the_server():
    image, texts = read_request(json.dumps({"images": [{"url": url()}], "texts": ["a", "b"], "prompt": ""}).encode())
    assert (image.size, image.mode, texts) == ((16, 12), "RGB", ["a", "b"])
    for body, message in (
        (b"{", "must be a JSON object with images and texts"),
        (json.dumps({"images": [url()], "texts": []}).encode(), "texts must be a list"),
        (json.dumps({"images": [], "texts": ["a"]}).encode(), "at least one data URL"),
        (json.dumps({"images": ["http://x/a.png"], "texts": ["a"]}).encode(), "nothing is fetched"),
        (json.dumps({"images": ["data:image/png;base64,AAAA"], "texts": ["a"]}).encode(), "no JPEG or PNG"),
    ):
        with pytest.raises(UserError, match=message):
            read_request(body)


def test_the_server_answers():
    pytest.importorskip("starlette")
    testclient = pytest.importorskip("starlette.testclient")
    client = testclient.TestClient(make_app(lambda image, texts: [float(len(text)) for text in texts], "clip"))
    reply = client.post("/v1/similarity", json={"images": [{"url": url()}], "texts": ["a", "bcd"]})
    assert reply.json()["data"] == [{"index": 0, "similarity": 1.0}, {"index": 1, "similarity": 3.0}]
    assert client.post("/v1/similarity", json={}).status_code == 400
