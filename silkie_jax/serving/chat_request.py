"""`/v1/chat/completions`: from a request's JSON to what the engine is asked."""

import secrets
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from silkie_jax.generation.requests import Request
from silkie_jax.models.qwen_vl.chat import SYSTEM, Turn, chat_prompt
from silkie_jax.serving.fields import Image, flag, image, number, read_json, shown, text
from silkie_jax.serving.limits import Limits, Refused
from silkie_jax.serving.model import ServedModel

_READ = {
    *("model", "messages", "n", "seed", "stop", "temperature", "top_p", "max_tokens", "max_completion_tokens"),
    *("logprobs", "top_logprobs", "stream", "stream_options"),
    *("include_stop_str_in_output", "continue_final_message", "add_generation_prompt"),
}
# They change nothing in an answer.
_IGNORED = {
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "parallel_tool_calls",
}
# They would change an answer, but not with these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


@dataclass(frozen=True)
class ChatRequest:
    """What was asked.

    Attributes:
        request: for the engine, without the texts that end a reply, which are found in the decoded text.
        stops: these texts.
        keep_stop: whether the text that ends a reply is part of it.
        continued: whether the reply goes on from a last message of the assistant.
        stream, include_usage: as server-sent events, and whether the last one counts tokens.
        logprobs, top_logprobs: whether each token's log-probability is wanted, and how many others beside it.
    """

    request: Request
    stops: tuple[str, ...]
    keep_stop: bool
    continued: bool
    stream: bool
    include_usage: bool
    logprobs: bool
    top_logprobs: int


def read_chat(body: bytes, model: ServedModel, limits: Limits) -> ChatRequest:
    """Reads and checks a request.

    Raises:
      Refused: one line that names the field and the mend.
    """
    given = read_json(body)
    check_fields(given, _READ, _IGNORED, _NEUTRAL)
    model.check_name(given.get("model"))
    tokens, images, continued = _prompt(given.get("messages"), model, limits)
    _check_continuation(given)
    room = model.room(len(tokens), len(images))
    logprobs = flag(given, "logprobs")
    top = number(given, "top_logprobs", 0, int, 0, model.top_logprobs)
    if top and not logprobs:
        raise Refused("top_logprobs needs logprobs: true", param="top_logprobs")
    stream = flag(given, "stream")
    most = next((n for n in ("max_completion_tokens", "max_tokens") if given.get(n) is not None), "max_tokens")
    return ChatRequest(
        request=Request(
            tokens=tokens,
            images=[picture.pixels for picture in images],
            max_new_tokens=min(number(given, most, model.defaults.max_new_tokens, int, 1), room),
            temperature=number(given, "temperature", model.defaults.temperature, float, 0, 2),
            top_p=_top_p(given, model.defaults.top_p),
            stop=(model.tokenizer.im_end, model.tokenizer.im_start),
            seed=number(given, "seed", secrets.randbits(32), int, 0, 2**32 - 1),
            n=number(given, "n", 1, int, 1, limits.n),
        ),
        stops=_stops(given.get("stop"), limits),
        keep_stop=flag(given, "include_stop_str_in_output"),
        continued=continued,
        stream=stream,
        include_usage=_include_usage(given, stream),
        logprobs=logprobs,
        top_logprobs=top,
    )


def check_fields(
    given: Mapping[str, Any],
    read: Collection[str],
    ignored: Collection[str] = (),
    neutral: Mapping[str, Any] | None = None,
) -> None:
    """Refuses, by name, fields that would change the answer and that nobody reads."""
    for name, value in given.items():
        if name in read or name in ignored or value is None or value in (neutral or {}).get(name, ()):
            continue
        raise Refused(f"{shown(name)} is not supported by this server: leave it out", param=name)


def _prompt(messages: Any, model: ServedModel, limits: Limits) -> tuple[list[int], list[Image], bool]:
    """The prompt's ids, its images, and whether it ends within a reply."""
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list of at least one message", param="messages")
    system = SYSTEM
    history: list[Turn] = []
    images: list[Image] = []
    asked: tuple[str, int] | None = None  # the user's turn that has no reply yet, with its number of images
    prefix: str | None = None
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        if not isinstance(message, dict):
            raise Refused(f"{where} must be an object with role and content", param=where)
        check_fields(message, {"role", "content", "name"}, neutral={"tool_calls": ([],)})
        role = message.get("role")
        words, shows = _content(message.get("content"), where, len(images), model, limits)
        if shows and role != "user":
            raise Refused(f"{where}: only the user's messages may show images", param=where)
        if role in ("system", "developer") and position == 0:
            system = words
        elif role == "user" and asked is None:
            asked = words, len(shows)
            images += shows
        elif role == "assistant" and asked is not None and position == len(messages) - 1:
            prefix = words
        elif role == "assistant" and asked is not None:
            history.append(Turn(asked[0], words, asked[1]))
            asked = None
        else:
            raise Refused(
                f"{where}: a message of role {shown(role)} is out of place: a system message may come first, then "
                "user and assistant take turns",
                param=where,
            )
    if asked is None:
        raise Refused("the last message must be the user's, or an assistant's to be continued", param="messages")
    said = [system, *(part for turn in history for part in (turn.text, turn.reply)), asked[0], prefix or ""]
    model.check_length(sum(map(len, said)))
    # No turn is dropped: whatever does not fit the context is refused.
    tokens = chat_prompt(model.tokenizer, *asked, history, system, max_window_size=sys.maxsize).tokens
    if prefix:
        tokens += model.tokenizer.encode(prefix)
    return tokens, images, bool(prefix)


def _content(
    content: Any, where: str, shown_before: int, model: ServedModel, limits: Limits
) -> tuple[str, list[Image]]:
    """A message's text (its parts joined by newlines) and images."""
    if isinstance(content, str):
        return text(content, f"{where}.content"), []
    if not isinstance(content, list):
        raise Refused(f"{where}.content must be a text or a list of parts", param=where)
    texts: list[str] = []
    images: list[Image] = []
    for number_, part in enumerate(content):
        name = f"{where}.content[{number_}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(text(part.get("text"), f"{name}.text"))
        elif kind == "image_url":
            if shown_before + len(images) >= limits.images:
                raise Refused(f"{name}: a request may show {limits.images} images", param=name)
            link = part.get("image_url")
            url = link.get("url") if isinstance(link, dict) else link
            images.append(image(url, f"{name}.image_url", model.image_size, limits))
        else:
            raise Refused(f"{name}: a part must be of type text or image_url, not {shown(kind)}", param=name)
    return "\n".join(texts), images


def _check_continuation(given: Mapping[str, Any]) -> None:
    """Whether a last message is continued follows from its role; what other servers want must agree with that."""
    continues = given["messages"][-1]["role"] == "assistant"
    for name, meant in (("continue_final_message", continues), ("add_generation_prompt", not continues)):
        if given.get(name) is not None and flag(given, name) != meant:
            raise Refused(
                f"{name} must be {str(meant).lower()}: the last message is "
                + ("the assistant's, and is continued" if continues else "not the assistant's"),
                param=name,
            )


def _top_p(given: Mapping[str, Any], default: float) -> float:
    top_p = number(given, "top_p", default, float, 0, 1)
    if not top_p:
        raise Refused("top_p must be above 0; temperature: 0 takes the most probable token each time", param="top_p")
    return top_p


def _stops(stop: Any, limits: Limits) -> tuple[str, ...]:
    stops = [] if stop is None else stop if isinstance(stop, list) else [stop]
    if len(stops) > limits.stops:
        raise Refused(f"stop may hold {limits.stops} texts, not {len(stops)}", param="stop")
    for entry in stops:
        if not 0 < len(text(entry, "stop")) <= limits.stop_length:
            raise Refused(f"stop: a text must have 1 to {limits.stop_length} characters", param="stop")
    return tuple(stops)


def _include_usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    if not stream or not isinstance(options, dict):
        raise Refused("stream_options must be an object, and needs stream: true", param="stream_options")
    check_fields(options, {"include_usage"}, {"include_obfuscation"})
    return flag(options, "include_usage")
