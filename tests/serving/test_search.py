"""What a sentence search asks of `silkie serve`: open turns of the assistant, several candidates, log-probabilities."""

import json

import httpx2
import pytest

from data_prep.run import candidates_in
from silkie_jax.endpoints.client import CANDIDATES
from tests.serving.conftest import user


def ask(server, said: str = "", **body):
    messages = [user("What is this?", 0)]
    if said:
        messages.append({"role": "assistant", "content": said})
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    body = {"messages": messages, "n": 3, "logprobs": True, "max_tokens": 8, "seed": 5, "temperature": 1.0, **body}
    found = httpx2.post(f"{server.url}/v1/chat/completions", timeout=300, json=body)
    reply = CANDIDATES.read(found.status_code, found.text)
    assert reply.outcome == "ok", reply.error
    return json.loads(found.text)["choices"], candidates_in(reply.text)


@pytest.mark.parametrize("said", ["", "One"])
def test_candidates_of_a_node(server, said):
    choices, candidates = ask(server, said)
    assert len(candidates) == 3
    for choice, one in zip(choices, candidates, strict=True):
        assert one.text == choice["message"]["content"]
        assert one.language == pytest.approx(sum(token["logprob"] for token in choice["logprobs"]["content"]))
        assert one.language < 0
    assert ask(server, said)[1] == candidates, "the same seed, the same candidates"
    whole = max((one.text for one in candidates), key=len)
    stop = whole[len(whole) // 2]
    for one, before in zip(ask(server, said, stop=[stop], include_stop_str_in_output=True)[1], candidates, strict=True):
        cut = before.text.find(stop)
        assert one.text == (before.text if cut < 0 else before.text[: cut + 1]).rstrip(), "up to the stop, with it"
