"""Requests: composed once, stored with their images by name, sent with the images in place of the names."""

import base64
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from silkie_jax.endpoints.agents import Agent
from silkie_jax.endpoints.store import RunStore, to_json

_NAME = "silkie-image:"
_TYPES = {".jpg": b"image/jpeg", ".png": b"image/png"}
_SMALL = 4_000_000  # pixels
TOKENS_PER_MESSAGE = 8  # what a chat template adds around a message, about
BYTES_PER_TOKEN = 4.0  # of English text, about; measured replies correct it


def compose(
    agent: Agent,
    text: str,
    images: Sequence[str],
    history: Sequence[tuple[str, str]] = (),
    response_format: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The body of a chat request; images stand in it as `silkie-image:SHA256`."""
    pictures = [{"type": "image_url", "image_url": {"url": _NAME + sha256}} for sha256 in images]
    if agent.image_detail:
        for picture in pictures:
            picture["image_url"]["detail"] = agent.image_detail  # type: ignore[index]
    words = {"type": "text", "text": agent.prompt.replace("{prompt}", text)}
    # The images belong to the first turn of a conversation, as in the data sets that have several.
    turns: list[dict[str, Any]] = []
    for user, assistant in history:
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    turns.append({"role": "user", "content": words["text"]})
    if pictures:
        opening = {"type": "text", "text": turns[0]["content"]}
        turns[0]["content"] = [*pictures, opening] if agent.images_first else [opening, *pictures]
    system = [{"role": "system", "content": agent.system}] if agent.system else []
    body: dict[str, Any] = {"model": agent.model, "messages": system + turns, agent.max_tokens_field: agent.max_tokens}
    if response_format:
        body["response_format"] = response_format
    return body | agent.sampling


def compose_texts(
    agent: Agent, text: str, images: Sequence[str], history: Sequence[tuple[str, str]], texts: Sequence[str]
) -> dict[str, Any]:
    """The body of a request about texts as replies to an instruction, such as `/v1/logprobs` takes."""
    pictures = [{"url": _NAME + sha256} for sha256 in images]
    body = {"model": agent.model, "prompt": text, "images": pictures, "texts": list(texts)}
    return body | ({"history": [list(turn) for turn in history]} if history else {})


def text_bytes(body: dict[str, Any]) -> int:
    """UTF-8 bytes of all text that the model reads: at least as many as tokens, for any byte-level vocabulary."""
    if "messages" not in body:
        texts = [body["prompt"], *(part for turn in body.get("history", ()) for part in turn), *body["texts"]]
        return sum(len(text.encode()) + TOKENS_PER_MESSAGE for text in texts)
    total = len(to_json(body["response_format"]).encode()) if "response_format" in body else 0
    for message in body["messages"]:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
        total += sum(len(part.encode()) for part in parts) + TOKENS_PER_MESSAGE
    return total


def image_tokens(agent: Agent, sizes: Sequence[tuple[int, int]]) -> int:
    """Tokens of images for estimates: as configured, or by OpenAI's rule for its GPT-4 models with vision.

    Low detail is 85 tokens. High detail scales the image into 2048 x 2048, then its shorter side to 768, and counts
    170 for each tile of 512 x 512 and 85 once.
    """
    if agent.image_tokens is not None:
        return agent.image_tokens * len(sizes)
    return sum(85 if agent.image_detail == "low" else _tile_tokens(*size) for size in sizes)


def _tile_tokens(width: int, height: int) -> int:
    scale = min(1.0, 2048 / max(width, height))
    scale *= min(1.0, 768 / (min(width, height) * scale))
    tiles = math.ceil(width * scale / 512) * math.ceil(height * scale / 512)
    return 85 + 170 * max(tiles, 1)


class Wire:
    """Turns stored bodies into the bytes to send. Recent small images are kept: several requests show the same."""

    def __init__(self, run: RunStore):
        self._run = run
        self._recent = functools.lru_cache(32)(self._encode)

    def body(self, stored: str) -> bytes:
        """The JSON bytes of a request, images and all.

        Raises:
            UserError: an image of the run is missing.
        """
        # The name in these quotes cannot come from a text: quotes within JSON strings are escaped.
        begin = f'"url":"{_NAME}'
        first, *rest = stored.split(begin)
        parts = [first.encode()]
        for piece in rest:
            sha256, after = piece.split('"', 1)
            parts += [b'"url":"', self._data_url(sha256), b'"', after.encode()]
        return b"".join(parts)

    def _data_url(self, sha256: str) -> bytes:
        width, height = self._run.image_size(sha256)
        return self._recent(sha256) if width * height <= _SMALL else self._encode(sha256)

    def _encode(self, sha256: str) -> bytes:
        path: Path = self._run.image_path(sha256)
        return b"data:" + _TYPES[path.suffix] + b";base64," + base64.b64encode(self._run.image(sha256))
