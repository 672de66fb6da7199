"""Every reply becomes one typed outcome, and no key survives in what is stored."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silkie_jax.endpoints import outcomes
from silkie_jax.endpoints.outcomes import Scrubber, read


def completion(content="Hello", finish="stop", usage=(7, 3), **message):
    body = {"model": "m-1", "choices": [{"message": {"content": content, **message}, "finish_reason": finish}]}
    if usage:
        body["usage"] = dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True))
    return json.dumps(body)


def error(message="no", **fields):
    return json.dumps({"error": {"message": message, **fields}})


@pytest.mark.parametrize(
    ("status", "raw", "outcome"),
    [
        (200, completion(), outcomes.OK),
        (200, completion([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]), outcomes.OK),
        (200, completion(finish="length"), outcomes.TRUNCATED),
        (200, completion("", finish="length"), outcomes.TRUNCATED),
        (200, completion(" \n"), outcomes.EMPTY),
        (200, completion(None), outcomes.EMPTY),
        (200, completion(None, refusal="I will not"), outcomes.REFUSAL),
        (200, completion("", finish="content_filter"), outcomes.CONTENT_FILTER),
        (200, "", outcomes.MALFORMED),
        (200, "<html>busy</html>", outcomes.MALFORMED),
        (200, "null", outcomes.MALFORMED),
        (200, "[]", outcomes.MALFORMED),
        (200, '{"choices": []}', outcomes.MALFORMED),
        (200, '{"choices": [{"message": null}]}', outcomes.MALFORMED),
        (429, error("slow down", code="rate_limit_exceeded"), outcomes.RATE_LIMITED),
        (429, error("insufficient_quota is not this", code="rate_limit_exceeded"), outcomes.RATE_LIMITED),
        (429, error("slow down", type="insufficient_quota"), outcomes.QUOTA),
        (429, error(code="insufficient_quota"), outcomes.QUOTA),
        (429, "", outcomes.RATE_LIMITED),
        (402, "pay", outcomes.QUOTA),
        (401, error(), outcomes.UNAUTHORIZED),
        (403, error(), outcomes.UNAUTHORIZED),
        (403, error(code="content_filter"), outcomes.CONTENT_FILTER),
        (403, error(code="content_policy_violation"), outcomes.CONTENT_FILTER),
        (403, error(innererror={"code": "ResponsibleAIPolicyViolation"}), outcomes.CONTENT_FILTER),
        (404, error(code="model_not_found"), outcomes.NOT_FOUND),
        (400, error(code="content_filter"), outcomes.CONTENT_FILTER),
        (400, error(code="content_policy_violation"), outcomes.CONTENT_FILTER),
        (400, error("a content_filter is mentioned", code="invalid_request_error"), outcomes.REJECTED),
        (413, "too large", outcomes.REJECTED),
        (422, json.dumps({"error": "wrong"}), outcomes.REJECTED),
        (408, "", outcomes.SERVER_ERROR),
        (500, "<html>", outcomes.SERVER_ERROR),
        (529, error(), outcomes.SERVER_ERROR),
    ],
)
def test_outcomes(status, raw, outcome):
    assert read(status, raw).outcome == outcome


def test_a_reply_tells_what_it_cost_and_who_gave_it():
    reply = read(200, completion("Hello", usage=(7, 3)))
    assert (reply.text, reply.model, reply.input_tokens, reply.output_tokens) == ("Hello", "m-1", 7, 3)
    assert (reply.finish_reason, reply.may_be_billed) == ("stop", False)
    assert read(200, completion(usage=None)).may_be_billed
    assert read(200, completion(usage=("many", None))).input_tokens is None
    assert read(200, "{").may_be_billed
    assert read(504, "").may_be_billed
    assert not read(500, "").may_be_billed


def test_lone_surrogates_can_be_stored():
    assert read(200, completion("a\ud800b")).text == "a?b"
    read(500, error("\udfff")).error.encode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "usage", "error", "code", "prompt_tokens", "refusal", "text"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(status=st.sampled_from([200, 400, 429, 500]), body=json_values | st.text())
def test_anything_is_read_without_raising(status, body):
    raw = body if isinstance(body, str) else json.dumps(body)
    reply = read(status, raw)
    assert reply.outcome
    reply.text.encode()


KEY = 'sk-proj-abc"def/ghi_0123456789'


def test_keys_are_taken_out():
    scrub = Scrubber([KEY, None, ""])
    for text in (f"key {KEY}!", json.dumps({"echo": KEY}), f"{KEY}{KEY}"):
        assert KEY not in scrub(text)
        assert json.dumps(KEY)[1:-1] not in scrub(text)
    assert scrub.error("Authorization: Bearer abcdefgh12345") == "Authorization: Bearer [key]"
    assert scrub.error("wrong key sk-0123456789abcdefghij.") == "wrong key [key]."
    assert scrub("Bearer of bad news: sk-ip to the end") == "Bearer of bad news: sk-ip to the end"


def test_a_placeholder_key_is_a_word_like_others():
    assert Scrubber(["none"])("There are none.") == "There are none."
