"""`/v1/chat/completions`: from the deltas of a job to what the client gets, whole or as server-sent events."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from silkie_jax.serving.chat_request import ChatRequest
from silkie_jax.serving.limits import Refused
from silkie_jax.serving.model import ServedModel
from silkie_jax.serving.reply import Delta, ReplyToken, token_bytes

News = Callable[[], Awaitable[Delta]]
_LEAST = -9999.0  # in the place of a log-probability that JSON cannot hold, as OpenAI has it


@dataclass(frozen=True)
class Answer:
    """What all parts of an answer share."""

    asked: ChatRequest
    model: ServedModel
    id: str
    created: int

    def body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        about = {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}
        return {**about, "choices": choices}

    def usage(self, tokens: int) -> dict[str, int]:
        prompt = len(self.asked.request.ids)
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def logprobs(self, tokens: list[ReplyToken]) -> dict[str, Any] | None:
        """None unless asked for."""
        if not self.asked.logprobs:
            return None
        content = [
            {
                **self._token(token.token, token.logprob),
                "top_logprobs": [self._token(*other) for other in token.top[: self.asked.top_logprobs]],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(self.model.tokenizer, token)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(_LEAST, logprob), "bytes": list(data)}


async def completion(answer: Answer, first: Delta, news: News) -> dict[str, Any]:
    """The whole answer, once all of it is there."""
    count = answer.asked.request.n
    texts: list[list[str]] = [[] for _ in range(count)]
    tokens: list[list[ReplyToken]] = [[] for _ in range(count)]
    ends: dict[int, Delta] = {}
    delta = first
    while True:
        texts[delta.sample].append(delta.text)
        tokens[delta.sample] += delta.tokens
        if delta.finish:
            ends[delta.sample] = delta
        if len(ends) == count:
            break
        delta = await news()
    choices = [
        {
            "index": sample,
            "message": {"role": "assistant", "content": "".join(texts[sample]), "refusal": None},
            "logprobs": answer.logprobs(tokens[sample]),
            "finish_reason": ends[sample].finish,
        }
        for sample in range(count)
    ]
    usage = answer.usage(sum(end.count for end in ends.values()))
    return {**answer.body("chat.completion", choices), "usage": usage}


async def chunks(answer: Answer, first: Delta, news: News) -> AsyncIterator[bytes]:
    """The answer as events, each as soon as it can be said."""
    usage: dict[str, Any] = {"usage": None} if answer.asked.include_usage else {}

    def chunk(sample: int, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": sample, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return _event({**answer.body("chat.completion.chunk", [choice]), **usage})

    count, begun = answer.asked.request.n, set()
    ends: dict[int, Delta] = {}
    delta = first
    try:
        while True:
            if delta.sample not in begun:
                begun.add(delta.sample)
                yield chunk(delta.sample, {"role": "assistant", "content": ""})
            if delta.text or delta.tokens:
                yield chunk(delta.sample, {"content": delta.text}, logprobs=answer.logprobs(delta.tokens))
            if delta.finish:
                ends[delta.sample] = delta
                yield chunk(delta.sample, {}, finish_reason=delta.finish)
            if len(ends) == count:
                break
            delta = await news()
    except Refused as error:  # the status is gone: the stream says it, and ends without [DONE]
        yield _event(error.body())
        return
    if answer.asked.include_usage:
        tokens = sum(end.count for end in ends.values())
        yield _event({**answer.body("chat.completion.chunk", []), "usage": answer.usage(tokens)})
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
