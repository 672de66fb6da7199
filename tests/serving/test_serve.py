"""The server as its clients meet it: right answers, whole and streamed, and one clear error for each mistake."""

import asyncio
import concurrent.futures
import json
import random
import socket
import time

import httpx2
import numpy as np
import openai
import pytest

from silkie_jax import load, read_image
from silkie_jax.corpus import Record, Response
from silkie_jax.generation.generate import generate
from silkie_jax.models.qwen_vl.chat import chat_prompt, decode_reply
from silkie_jax.preference.grid import bucket
from silkie_jax.scoring.score import score
from silkie_jax.serving.limits import Limits
from tests.serving.conftest import CONTEXT, SLOTS, data_url, user
from tests.training.support import image_bytes, read_lines, write_corpus


def client(server, **options):
    return openai.OpenAI(
        **{"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 300, **options}
    )


def greedy(server, text="What is this?", *images, most=12, **body):
    """A greedy reply to one message, streamed or whole: (text, finish reason) of each choice."""
    body = {
        "messages": [user(text, *images)],
        "model": server.served.name,
        "max_tokens": most,
        "temperature": 0,
        **body,
    }
    found = client(server).chat.completions.create(**body)
    if not body.get("stream"):
        return [(choice.message.content, choice.finish_reason) for choice in found.choices]
    texts, ends = {}, {}
    for chunk in found:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            ends[choice.index] = choice.finish_reason
    return [(texts[i], ends[i]) for i in sorted(texts)]


def post(server, path="/v1/chat/completions", **options):
    return httpx2.post(server.url + path, timeout=300, **options)


def error(response, status):
    """The message of an error, which is one line in OpenAI's form."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert "\n" not in found["message"]
    return found["message"]


@pytest.fixture(scope="module")
def questions(server, served):
    """Questions with images, and what the engine says to each alone: (text, images, reply, finish)."""
    made = []
    for n in range(8):
        text, images = f"Question {n}? {'Look well. ' * (n % 4)}", [n % 3][: n % 2]
        (completion,) = server.alone(text, *images, most=8 + n)
        made.append((text, images, 8 + n, decode_reply(served.tokenizer, completion.tokens), completion.finish))
    return made


# Answers


@pytest.mark.parametrize("images", [(), (1,)])
def test_the_answer_is_that_of_generate(served, server, images):
    tokens = chat_prompt(served.tokenizer, "What is this?", len(images)).tokens
    model, _ = load(server.checkpoint)
    pixels = np.stack([read_image(image_bytes(n), served.image_size) for n in images]) if images else None
    stop = (served.tokenizer.im_end, served.tokenizer.im_start)
    expected = decode_reply(served.tokenizer, np.asarray(generate(model, [tokens], pixels, 12, stop=stop))[0].tolist())
    for stream in (False, True):
        ((text, _),) = greedy(server, "What is this?", *images, stream=stream)
        assert text == expected


def test_the_form_of_a_reply(server):
    found = post(server, json={"messages": [user("Hi")], "max_tokens": 3, "temperature": 0}).json()
    assert found["object"] == "chat.completion"
    assert found["model"] == server.served.name
    (choice,) = found["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"]["role"] == "assistant"
    prompt = len(chat_prompt(server.served.tokenizer, "Hi").tokens)
    assert found["usage"] == {"prompt_tokens": prompt, "completion_tokens": 3, "total_tokens": prompt + 3}


def test_samples_follow_from_the_seed(server, served):
    options = {"temperature": 1.3, "seed": 11, "n": 3, "top_p": 0.9}
    first = greedy(server, most=10, **options)
    assert len({text for text, _ in first}) == 3
    assert greedy(server, most=10, stream=True, **options) == first
    assert greedy(server, most=10, **{**options, "seed": 12}) != first
    replies = server.alone("What is this?", most=10, **options)
    assert [decode_reply(served.tokenizer, reply.tokens) for reply in replies] == [text for text, _ in first]


def crossing(served, reply):
    """A stop that begins in one token of a reply and ends in the next one, and the text before it."""
    whole = decode_reply(served.tokenizer, reply.tokens)
    for at in range(2, len(reply.tokens)):
        left, right = (served.tokenizer.decode([token]) for token in reply.tokens[at - 1 : at + 1])
        stop = left[-1:] + right[:1]
        if len(stop) == 2 and "�" not in stop and not stop.isspace() and whole.find(stop) > 0:
            return stop, whole[: whole.index(stop)].rstrip()
    raise AssertionError("no such stop")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_ends_the_text_within_tokens(server, served, stream):
    (reply,) = server.alone("What is this?", most=40)
    stop, before = crossing(served, reply)
    ((text, finish),) = greedy(server, most=40, stream=stream, stop=["never said", stop])
    assert (text, finish) == (before, "stop")
    # One sample's stop leaves the others alone, and the engine makes no more of its tokens.
    tokens = served.engine.meters.tokens
    assert greedy(server, most=400, n=2, stop=stop, stream=stream) == [(before, "stop")] * 2
    server.idle()
    assert served.engine.meters.tokens - tokens < 200


def test_log_probabilities_of_tokens(server, served):
    (reply,) = server.alone("What is this?", most=12)
    body = {
        "messages": [user("What is this?")],
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    (choice,) = post(server, json=body).json()["choices"]
    content = choice["logprobs"]["content"]
    assert [token["logprob"] for token in content] == pytest.approx(reply.logprobs, abs=1e-4)
    for token, top in zip(content, reply.top, strict=True):
        assert [other["logprob"] for other in token["top_logprobs"]] == pytest.approx([v for _, v in top[:3]], abs=1e-4)
        assert token["top_logprobs"][0]["bytes"] == token["bytes"]  # greedy
    said = b"".join(bytes(token["bytes"]) for token in content)
    assert said.decode("utf-8", "replace").strip() == choice["message"]["content"]
    # Streamed, they come with their text.
    streamed = [
        token
        for chunk in client(server).chat.completions.create(model="", stream=True, **body)
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content
    ]
    assert [token.logprob for token in streamed] == pytest.approx([token["logprob"] for token in content], abs=1e-6)


def test_usage_at_the_end_of_a_stream(server):
    found = client(server).chat.completions.create(
        messages=[user("Hi")], model="", max_tokens=5, n=2, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(found)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 10
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_reply_is_continued(server, served):
    messages = [user("Count."), {"role": "assistant", "content": "One, two,"}]
    found = post(server, json={"messages": messages, "max_tokens": 6, "temperature": 0}).json()
    (reply,) = server.alone("Count.", most=6, prefix="One, two,")
    text = served.tokenizer.decode(reply.tokens).rstrip()
    assert found["choices"][0]["message"]["content"] == text


def test_log_probabilities_of_texts_are_those_of_score(server, tmp_path):
    """Of its own model on layers that are stacked, by `silkie score` on a corpus of the same record."""
    texts = ("A red circle.", "No.", "", "图片")
    record = Record("r", (image_bytes(1), image_bytes(2)), "What is in the pictures?", tuple(map(Response, texts)))
    score(server.checkpoint, write_corpus(tmp_path / "corpus", [record]), tmp_path / "scores.jsonl")
    expected = read_lines(tmp_path / "scores.jsonl")
    body = {"prompt": record.prompt, "images": [data_url(1), data_url(2)], "texts": texts}
    found = post(server, "/v1/logprobs", json=body).json()
    assert [entry["index"] for entry in found["data"]] == [line["response"] for line in expected]
    assert [entry["tokens"] for entry in found["data"]] == [line["tokens"] for line in expected]
    np.testing.assert_allclose(
        [entry["logprob"] for entry in found["data"]], [line["logp"] for line in expected], rtol=2e-6
    )
    assert found["usage"]["total_tokens"] > found["usage"]["prompt_tokens"] > 2 * 256


def test_log_probabilities_with_history_and_in_few_programs(server):
    """How many labels there are among a row's tokens compiles nothing; an image may be an object, as in a chat."""

    def ask(prompt: int, texts: int) -> dict:
        body = {"prompt": "a b " * prompt, "texts": ["c d " * texts, "No."], "images": [{"url": data_url(1)}]}
        return post(server, "/v1/logprobs", json=body | {"history": [["What is this?", "A cat."]]}).json()

    first = ask(40, 4)
    programs = server.served.scorer._forward._cache_size()
    second = ask(4, 40)
    assert len({bucket(found["usage"]["total_tokens"]) for found in (first, second)}) == 1
    assert len({bucket(sum(entry["tokens"] for entry in found["data"])) for found in (first, second)}) == 2
    assert server.served.scorer._forward._cache_size() == programs
    made = Record(
        "r", (image_bytes(1),), "a b " * 40, (Response("c d " * 4), Response("No.")), (("What is this?", "A cat."),)
    )
    (expected,) = server.served.scorer([made])
    np.testing.assert_allclose([entry["logprob"] for entry in first["data"]], expected.logps, rtol=2e-6)
    assert "history must be a list of turns" in error(
        post(server, "/v1/logprobs", json={"prompt": "a", "texts": ["b"], "history": ["c"]}), 400
    )


def test_models_and_health(server):
    assert [model.id for model in client(server).models.list()] == [server.served.name]
    assert client(server).models.retrieve(server.served.name).owned_by == "silkie_jax"
    assert "no model" in error(httpx2.get(f"{server.url}/v1/models/other"), 404)
    server.idle()
    found = httpx2.get(f"{server.url}/health").json()
    rate = found.pop("tokens_per_second")
    assert rate >= 0
    expected = {
        "status": "ready",
        "model": server.served.name,
        "slots": SLOTS,
        "replies": 0,
        "waiting": 0,
        "queue": 256,
    }
    assert found == expected


# Mistakes


def test_mistakes_are_one_line(server):
    json_type = {"content-type": "application/json"}
    assert "not valid JSON" in error(post(server, content=b"{'a'", headers=json_type), 400)
    assert "must be application/json" in error(post(server, content=b"{}", headers={"content-type": "text/plain"}), 415)
    assert "messages[0].content[0].image_url must be a data URL" in error(
        post(
            server, json={"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}
        ),
        400,
    )
    assert error(httpx2.get(f"{server.url}/v1/other"), 404) == "there is no /v1/other"
    assert error(httpx2.get(f"{server.url}/v1/chat/completions"), 405) == "GET is not for /v1/chat/completions"
    with pytest.raises(openai.BadRequestError, match="tools"):
        greedy(server, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError, match="context of 704") as found:
        greedy(server, "word " * 2000)
    assert found.value.code == "context_length_exceeded"
    server.idle()


def test_a_body_has_a_limit(running):
    server = running(limits=Limits(body=10_000))
    big = json.dumps({"messages": [user("a" * 50_000)]}).encode()
    headers = {"content-type": "application/json"}
    assert "10,000 bytes" in error(post(server, content=big, headers=headers), 413)
    pieces = (big[i : i + 1000] for i in range(0, len(big), 1000))  # without a content-length
    assert "10,000 bytes" in error(post(server, content=pieces, headers=headers), 413)
    assert greedy(server)
    server.idle()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("localhost:99", 200), ("[::1]:8000", 200), ("10.1.2.3:80", 200), ("Gpu-7:8000", 200),
        ("evil.example", 421), ("127.0.0.1.evil.example", 421), ("localhost.evil.example:80", 421), ("", 421),
    ],
)  # fmt: skip
def test_only_names_of_this_machine_are_answered(running, host, status):
    server = running(hosts=["gpu-7"])
    assert httpx2.get(f"{server.url}/v1/models", headers={"host": host}).status_code == status


def test_a_key_is_asked_for(running):
    server = running(key="secret-key")
    for given in ("none", "secret-kez", "secret-key2"):
        headers = {"authorization": f"Bearer {given}"}
        assert "API key" in error(httpx2.get(f"{server.url}/v1/models", headers=headers), 401)
    assert "API key" in error(post(server, json={}), 401)
    with pytest.raises(openai.AuthenticationError):
        client(server).models.list()
    assert client(server, api_key="secret-key").models.list().data
    assert httpx2.get(f"{server.url}/health").status_code == 200


def test_a_full_server_says_when_to_come_again(running, gate):
    server = running(queue=1)
    body = {"messages": [user("Hi")], "max_tokens": 6, "temperature": 0}
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        replies = [threads.submit(post, server, json={**body, "n": n}) for n in (SLOTS, 1)]
        while server.house.health()["replies"] < SLOTS + 1:
            time.sleep(0.01)
        refused = post(server, json=body)
        assert "full: 5 replies" in error(refused, 429)
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        with pytest.raises(openai.RateLimitError):
            greedy(server)
        gate.open()
        assert [reply.result().status_code for reply in replies] == [200, 200]
    server.idle()
    assert "full" in error(post(server, json={**body, "n": SLOTS + 2}), 429)


def test_time_is_limited(running, gate):
    server = running(limits=Limits(seconds=0.5))
    body = {"messages": [user("Hi")], "max_tokens": 600, "temperature": 0}
    for stream in (False, True):
        reply = post(server, json={**body, "stream": stream})
        assert "took longer than 0.5 s" in error(reply, 504)
        assert reply.headers["x-should-retry"] == "false"
    gate.open()
    server.idle()


def test_a_stream_that_takes_too_long_says_so(running, gate):
    server = running(limits=Limits(seconds=3))
    gate.allow(1)
    reply = post(server, json={"messages": [user("Hi")], "max_tokens": 600, "temperature": 0, "stream": True})
    assert reply.status_code == 200
    *events, last = reply.text.strip().split("\n\n")
    assert len(events) >= 2
    assert "took longer than 3 s" in json.loads(last.removeprefix("data: "))["error"]["message"]
    gate.open()
    server.idle()


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_is_not_worked_for(server, served, gate, stream):
    tokens = served.engine.meters.tokens
    gate.allow(1)
    body = json.dumps({"messages": [user("Hi")], "max_tokens": 650, "temperature": 0, "n": SLOTS, "stream": stream})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}content-type: application/json\r\n\r\n{body}".encode())
        while served.engine.meters.tokens == tokens:
            time.sleep(0.01)
    while server.house.health()["replies"]:
        time.sleep(0.01)
    gate.open()
    server.idle()
    assert served.engine.meters.tokens - tokens < SLOTS * 50


def test_who_goes_away_within_a_body_leaves_nothing(server):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + b"content-length: 1000\r\n\r\n{")
        while not server.house.health()["replies"]:
            time.sleep(0.01)
    server.idle()


# Many at once


def test_many_clients_at_once(server, questions, capfd):
    """32 clients: whole and streamed, some that go away, some that ask nonsense; each gets what it would get alone."""
    bad = [
        ({"messages": []}, openai.BadRequestError),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]},
         openai.BadRequestError),
        ({"messages": [user("a")], "model": "other"}, openai.NotFoundError),
        ({"messages": [user("word " * 2000)]}, openai.BadRequestError),
    ]  # fmt: skip
    compiled = server.served.engine.compiled

    async def one(api, number):
        text, images, most, expected, finish = questions[number % len(questions)]
        body = {"messages": [user(text, *images)], "model": "", "max_tokens": most, "temperature": 0}
        match number % 4:
            case 0:
                found = await api.chat.completions.create(**body)
                assert (found.choices[0].message.content, found.choices[0].finish_reason) == (expected, finish)
            case 1:
                stream = await api.chat.completions.create(stream=True, **body)
                assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == expected
            case 2:
                task = asyncio.create_task(api.chat.completions.create(**{**body, "max_tokens": 300}))
                await asyncio.sleep(random.random())
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            case 3:
                body, kind = bad[number // 4 % len(bad)]
                with pytest.raises(kind) as found:
                    await api.chat.completions.create(**{"model": "", **body})
                assert "\n" not in found.value.body["message"]

    async def everyone():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:

            async def client(first):
                for number in range(first, first + 4):
                    await one(api, number)

            await asyncio.gather(*(client(first) for first in range(32)))

    asyncio.run(everyone())
    server.idle()
    assert server.served.engine.compiled == compiled  # all was warm
    assert "Traceback" not in capfd.readouterr().err
    assert server.house.jobs == set()


def test_requests_wait_for_slots(server, questions):
    """More requests than slots at once, with log-probabilities between: all are answered."""
    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        texts = {"prompt": "Hi", "texts": ["Yes.", "No."]}
        scores = [threads.submit(post, server, "/v1/logprobs", json=texts) for _ in range(4)]
        chats = [threads.submit(greedy, server, text, *images, most=most) for text, images, most, _, _ in questions]
        assert [chat.result()[0] for chat in chats] == [(reply, finish) for *_, reply, finish in questions]
        values = [[entry["logprob"] for entry in score.result().json()["data"]] for score in scores]
    np.testing.assert_allclose(values, [values[0]] * 4)


def test_those_inside_are_told_when_the_server_stops(running, gate):
    server = running(drain=0.5)
    body = {"messages": [user("Hi")], "max_tokens": CONTEXT - 50, "temperature": 0}
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        gate.allow(1)
        inside = [threads.submit(post, server, json={**body, "stream": stream}) for stream in (False, True)]
        while server.house.health()["replies"] < 2:
            time.sleep(0.01)
        server.server.end()
        whole, stream = (reply.result() for reply in inside)
    assert "the server is stopping" in error(whole, 503)
    assert "the server is stopping" in stream.text


def test_an_engine_that_fails_is_said(running, served, monkeypatch, capfd):
    server = running()

    def step():
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand much more")

    monkeypatch.setattr(served.engine, "step", step)
    assert (
        error(post(server, json={"messages": [user("Hi")]}), 500) == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    )
    server.thread.join(20)
    assert not server.thread.is_alive()
    monkeypatch.undo()
    for ticket in [*served.engine._queue]:
        served.engine.cancel(ticket)
    served.engine.step()
