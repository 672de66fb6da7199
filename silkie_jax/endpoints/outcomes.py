"""What came back: every reply, error or silence becomes one typed outcome, by its status and codes, never by its words.

An outcome says what helps. `ok` and `truncated` are replies. PASSING ones are tried again, a rate limit waits, STOPPING
ones end the run, since every other request would meet the same; all others would only repeat themselves.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

OK = "ok"
TRUNCATED = "truncated"  # at max_tokens
REFUSAL = "refusal"  # stated as such by the server, not guessed from words
CONTENT_FILTER = "content_filter"
REJECTED = "rejected"  # any other 4xx: the request itself is wrong
RATE_LIMITED = "rate_limited"
EMPTY, MALFORMED = "empty", "malformed"
SERVER_ERROR, TIMEOUT, CONNECTION = "server_error", "timeout", "connection"
EXPIRED = "expired"  # a batch ended without an answer to the line
LOST = "lost"  # in flight when the process was killed
QUOTA, UNAUTHORIZED, NOT_FOUND = "insufficient_quota", "unauthorized", "not_found"

PASSING = frozenset((EMPTY, MALFORMED, SERVER_ERROR, TIMEOUT, CONNECTION, EXPIRED, LOST))
STOPPING = frozenset((QUOTA, UNAUTHORIZED, NOT_FOUND))

_QUOTA_CODES = frozenset(("insufficient_quota", "billing_hard_limit_reached", "billing_not_active"))
_FILTER_CODES = frozenset(
    ("content_filter", "content_policy_violation", "responsible_ai_policy_violation", "responsibleaipolicyviolation")
)
_MAYBE_BILLED = frozenset((408, 499, 502, 504, 524))  # of error statuses: a proxy gave up, the model may have worked
_LONGEST_ERROR = 1000


@dataclass(frozen=True)
class EndpointReply:
    """One attempt's end.

    Attributes:
        outcome: one of this module's.
        status: of HTTP; None where none came.
        raw: the body as received, without keys; None where none came.
        error: what went wrong, one line.
        text, finish_reason, model: of a chat completion; "" where absent.
        input_tokens, output_tokens: as billed; None where the server did not say.
        may_be_billed: whether an attempt without token counts may have cost something.
    """

    outcome: str
    status: int | None = None
    raw: str | None = None
    error: str | None = None
    text: str = ""
    finish_reason: str = ""
    model: str = ""
    input_tokens: int | None = None
    output_tokens: int | None = None
    may_be_billed: bool = False


class Scrubber:
    """Takes API keys out of whatever is stored or shown."""

    _LOOKS_LIKE_A_KEY = re.compile(r"\bsk-[A-Za-z0-9_\-]{16,}|(?<=Bearer )[^\s\"',}]{8,}")
    _SECRET = 8  # characters; a shorter key ("none", "EMPTY") is a placeholder, and a word that replies may hold

    def __init__(self, keys: Iterable[str | None] = ()):
        spelt = {form for key in keys if key for form in (key, json.dumps(key)[1:-1])}
        self._keys = sorted((key for key in spelt if len(key) >= self._SECRET), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Without the known keys: for replies, which are kept as they are otherwise."""
        for key in self._keys:
            text = text.replace(key, "[key]")
        return text

    def error(self, text: str) -> str:
        """Without the known keys and whatever looks like one."""
        return self._LOOKS_LIKE_A_KEY.sub("[key]", self(text))


def read(status: int, raw: str) -> EndpointReply:
    """The reply of an HTTP status and body (scrubbed before); also of a line of a batch's output."""
    return _read(status, raw, _completion, "a chat completion")


def read_data(status: int, raw: str) -> EndpointReply:
    """As `read`, of what answers with a list under `data`, such as `/v1/logprobs`: that list as JSON is the text."""
    return _read(status, raw, _data, "an object with a list of data")


def read_candidates(status: int, raw: str) -> EndpointReply:
    """As `read`, of a chat completion with several choices and log-probabilities: the text is JSON, a list with the
    `text`, summed `logprob` and `finish` of each. One that is empty is a reply like any other: the text ends there."""
    return _read(status, raw, _candidates, "a chat completion with log-probabilities")


def _read(status: int, raw: str, form: Callable[[int, str, Any], EndpointReply], what: str) -> EndpointReply:
    try:
        body = json.loads(raw)
    except ValueError:
        body = None
    if status >= 400:
        return _error(status, raw, body)
    try:
        return form(status, raw, body)
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        return EndpointReply(MALFORMED, status, raw, f"the reply is not {what} in JSON", may_be_billed=True)


def _data(status: int, raw: str, body: Any) -> EndpointReply:
    data = body["data"]
    if not isinstance(data, list):
        raise TypeError
    tokens = _count((body.get("usage") or {}).get("total_tokens"))
    text, model = json.dumps(data, separators=(",", ":")), _text(body.get("model"))
    written = None if tokens is None else 0
    return EndpointReply(OK, status, raw, None, text, "stop", model, tokens, written, may_be_billed=tokens is None)


def _candidates(status: int, raw: str, body: Any) -> EndpointReply:
    found = []
    for choice in body["choices"]:
        text, tokens = _text(choice["message"].get("content")), (choice.get("logprobs") or {}).get("content")
        if text and not tokens:
            raise KeyError("logprobs")
        logprob = math.fsum(float(token["logprob"]) for token in tokens or ())
        found.append({"text": text, "logprob": logprob, "finish": _text(choice.get("finish_reason"))})
    if not found:
        raise IndexError
    usage = body.get("usage") or {}
    tokens_in, tokens_out = (_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
    if tokens_in is None or tokens_out is None:
        tokens_in = tokens_out = None
    written, model = json.dumps(found, ensure_ascii=False, separators=(",", ":")), _text(body.get("model"))
    unknown = tokens_in is None
    return EndpointReply(OK, status, raw, None, written, "stop", model, tokens_in, tokens_out, may_be_billed=unknown)


def _completion(status: int, raw: str, body: Any) -> EndpointReply:
    choice = body["choices"][0]
    message = choice["message"]
    refusal, text = message.get("refusal"), _text(message.get("content"))
    finish = choice.get("finish_reason") or ""
    usage = body.get("usage") or {}
    tokens = tuple(_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
    if refusal:
        outcome, text = REFUSAL, _text(refusal)
    elif finish == "content_filter":
        outcome = CONTENT_FILTER
    elif not text.strip():
        outcome = TRUNCATED if finish == "length" else EMPTY
    else:
        outcome = TRUNCATED if finish == "length" else OK
    known = None not in tokens
    return EndpointReply(
        outcome,
        status,
        raw,
        None,
        text,
        _text(finish),
        _text(body.get("model")),
        tokens[0] if known else None,
        tokens[1] if known else None,
        may_be_billed=not known,
    )


def _error(status: int, raw: str, body: Any) -> EndpointReply:
    error = body.get("error", body) if isinstance(body, dict) else {}
    error = error if isinstance(error, dict) else {"message": error}
    codes = {str(error.get(key)) for key in ("code", "type")}
    inner = error.get("innererror")
    if isinstance(inner, dict):
        codes.add(str(inner.get("code")).lower())
    message = one_line(f"HTTP {status}: {error.get('message') or raw or 'no body'}")
    if codes & _QUOTA_CODES or status == 402:
        outcome = QUOTA
    elif status == 429:
        outcome = RATE_LIMITED
    elif codes & _FILTER_CODES:  # whatever the status: some servers forbid (403) the one request
        outcome = CONTENT_FILTER
    elif status in (401, 403):
        outcome = UNAUTHORIZED
    elif status == 404:
        outcome = NOT_FOUND
    elif status >= 500 or status in (408, 409, 425, 499):
        outcome = SERVER_ERROR
    else:
        outcome = REJECTED
    return EndpointReply(outcome, status, raw, message, may_be_billed=status in _MAYBE_BILLED)


def one_line(text: str) -> str:
    """Text for an error message or a column."""
    return " ".join(text.encode("utf-8", "replace").decode().split())[:_LONGEST_ERROR]


def _text(content: Any) -> str:
    """The text of a message: a string, or a list of parts."""
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    text = "" if content is None else str(content)
    return text.encode("utf-8", "replace").decode()  # JSON can spell lone surrogates, which nothing can store


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9 else None
