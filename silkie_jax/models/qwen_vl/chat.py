"""Conversations as tokens (ChatML), and what stands in a model's replies.

Two forms lie side by side. `make_context` is the official one: it takes text with tags, as Qwen-VL's documentation
writes it, and reads special tokens out of it. `chat_prompt` is the one to use for data and for people: pictures
are counted beside the text, and the text is never parsed, so it cannot open a turn or name a file.

    <|im_start|>system
    You are a helpful assistant.<|im_end|>
    <|im_start|>user
    Picture 1: <img>..256 places..</img>
    What is this?<|im_end|>
    <|im_start|>assistant
    A cat.<|im_end|>
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Any, Literal

from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl import tokenizer as vocabulary
from silkie_jax.models.qwen_vl.tokenizer import IMAGE_SPECIALS, Tokenizer

SYSTEM = "You are a helpful assistant."
MAX_WINDOW_SIZE = 6144
"""Official default: tokens of system message and history (the question itself is not counted)."""


@dataclass(frozen=True)
class Turn:
    """An earlier exchange: the user's text, the number of pictures shown with it, and the reply."""

    text: str
    reply: str
    images: int = 0


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt, and how many of the earliest turns and pictures the window left out of it."""

    tokens: list[int]
    dropped_turns: int
    dropped_images: int


def chat_prompt(
    tokenizer: Tokenizer,
    text: str,
    images: int = 0,
    history: Sequence[Turn] = (),
    system: str = SYSTEM,
    max_window_size: int = MAX_WINDOW_SIZE,
) -> Prompt:
    """Tokens up to and with `<|im_start|>assistant\\n`, after which the model replies.

    Pictures are numbered through the conversation. The oldest turns that do not fit the window are left out whole;
    whoever holds the pixels leaves out the first `dropped_images` of them as well.
    """
    head = message(tokenizer, "system", tokenizer.encode(system))
    newline = tokenizer.encode("\n")
    blocks = []
    shown = 0
    for turn in history:
        user = message(tokenizer, "user", user_content(tokenizer, turn.text, turn.images, shown + 1))
        reply = message(tokenizer, "assistant", tokenizer.encode(turn.reply))
        blocks.append([*newline, *user, *newline, *reply])
        shown += turn.images
    dropped = _outside_window(head, blocks, max_window_size)
    question = message(tokenizer, "user", user_content(tokenizer, text, images, shown + 1))
    kept = chain.from_iterable(blocks[dropped:])
    return Prompt(
        tokens=[*head, *kept, *newline, *question, *newline, *reply_opening(tokenizer)],
        dropped_turns=dropped,
        dropped_images=sum(turn.images for turn in history[:dropped]),
    )


def user_content(tokenizer: Tokenizer, text: str, images: int = 0, first: int = 1, specials: bool = False) -> list[int]:
    """A user's message in Silkie's form: `Picture 1: <img>..</img>` a line for each picture, then the stripped text.

    `first` is the number of the first picture. (Qwen's own `from_list_format` writes no space after the colon.)
    `specials=True` parses special tokens in the text, as the original did: only to compare with it.
    """
    tokens: list[int] = []
    newline = ""
    for number in range(first, first + images):
        tokens += tokenizer.encode(f"{newline}Picture {number}: ") + tokenizer.image_ids()
        newline = "\n"
    return tokens + tokenizer.encode(newline + text.strip(), specials=specials)


TEMPLATES = {
    "chat": "ChatML with the default system message and `Picture 1: ` before each image: Silkie's form",
    "bare-image": "the same without `Picture 1: `: the form of Qwen's own evaluation scripts",
    "raw": "`Picture 1: `, the image and the text, without ChatML: for the base model, and for likelihoods",
}
"""The forms around a question that published numbers were made with."""


def templated(tokenizer: Tokenizer, text: str, images: int, template: str = "chat") -> list[int]:
    """The tokens of a question under one of TEMPLATES, after which the model replies. The text is never parsed."""
    if template == "chat":
        return chat_prompt(tokenizer, text, images).tokens
    if template == "raw":
        return user_content(tokenizer, text, images)
    newline = tokenizer.encode("\n")
    content = [token for _ in range(images) for token in (*tokenizer.image_ids(), *newline)]
    content += tokenizer.encode(text.strip())
    system = message(tokenizer, "system", tokenizer.encode(SYSTEM))
    return [*system, *newline, *message(tokenizer, "user", content), *newline, *reply_opening(tokenizer)]


def message(tokenizer: Tokenizer, role: str, content: list[int]) -> list[int]:
    """`<|im_start|>role\\ncontent<|im_end|>`; messages are joined by newlines."""
    return [tokenizer.im_start, *tokenizer.encode(role), *tokenizer.encode("\n"), *content, tokenizer.im_end]


def make_context(
    tokenizer: Tokenizer,
    query: str,
    history: Sequence[tuple[str, str | None]] = (),
    system: str = SYSTEM,
    max_window_size: int = MAX_WINDOW_SIZE,
) -> tuple[str, list[int]]:
    """The official `make_context` in ChatML: the prompt as text and as tokens.

    Image, box and reference tags in the texts are special tokens, paths fill their spans; `<|im_start|>` and the
    like stay text. So only text that the caller wrote may come here. A turn may be unanswered (None).
    """

    def part(role: str, content: str) -> tuple[str, list[int]]:
        text = f"{vocabulary.IM_START}{role}\n{content}{vocabulary.IM_END}"
        return text, message(tokenizer, role, tokenizer.encode(content, specials=IMAGE_SPECIALS))

    newline = tokenizer.encode("\n")
    texts, blocks = [], []
    for question, reply in history:
        question_text, question_tokens = part("user", question)
        reply_text, reply_tokens = part("assistant", reply) if reply is not None else ("", [])
        texts.append(f"\n{question_text}\n{reply_text}")
        blocks.append([*newline, *question_tokens, *newline, *reply_tokens])
    system_text, system_tokens = part("system", system)
    query_text, query_tokens = part("user", query)
    dropped = _outside_window(system_tokens, blocks, max_window_size)
    text = "".join([system_text, *texts[dropped:], "\n", query_text, f"\n{vocabulary.IM_START}assistant\n"])
    kept = chain.from_iterable(blocks[dropped:])
    return text, [*system_tokens, *kept, *newline, *query_tokens, *newline, *reply_opening(tokenizer)]


def reply_opening(tokenizer: Tokenizer) -> list[int]:
    """`<|im_start|>assistant\\n`, after which a reply begins."""
    return [tokenizer.im_start, *tokenizer.encode("assistant"), *tokenizer.encode("\n")]


def _outside_window(head: list[int], blocks: list[list[int]], max_window_size: int) -> int:
    """How many of the oldest blocks do not fit: head and kept blocks stay under `max_window_size` tokens."""
    size = len(head)
    for number in reversed(range(len(blocks))):
        size += len(blocks[number])
        if size >= max_window_size:
            return number + 1
    return 0


def decode_reply(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """The text of generated tokens up to the first token that ends a reply, stripped.

    The official `_decode_chatml` also loses the last token of a reply that was cut off before its end; this keeps it.
    """
    endings = (tokenizer.im_end, tokenizer.end_of_text, tokenizer.im_start)
    return tokenizer.decode(takewhile(lambda token: int(token) not in endings, tokens)).strip()


@dataclass(frozen=True)
class Region:
    """A place that a reply points at.

    Attributes:
        kind: "box" has two corners, "quad" four.
        points: (x, y) in pixels of the picture.
        label: what stands in the `<ref>` before it; None without one.
    """

    kind: Literal["box", "quad"]
    points: tuple[tuple[int, int], ...]
    label: str | None = None

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the upright rectangle around it."""
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


_REGION_TAG = re.compile(r"(</?(?:ref|box|quad)>)")
_POINT = r"\(\s*([0-9]{1,4})\s*,\s*([0-9]{1,4})\s*\)"
_POINTS: dict[Literal["box", "quad"], re.Pattern[str]] = {
    "box": re.compile(r"\s*" + r"\s*,\s*".join([_POINT] * 2) + r"\s*"),
    "quad": re.compile(r"\s*" + r"\s*,\s*".join([_POINT] * 4) + r"\s*"),
}


def parse_regions(reply: str, width: int, height: int) -> list[Region]:
    """The boxes and quads of a reply, in pixels of a picture of `width` x `height`.

    A reply places them on a grid of 0..1000 on both sides; x becomes int(x / 1000 * width) as in the official
    `draw_bbox_on_latest_picture`. A `<ref>` labels the regions that follow it directly. Whatever is malformed
    (unclosed, not two or four points, beyond the grid) is passed over.
    """
    regions: list[Region] = []
    label = None
    # [text, tag, text, tag, ..., text]
    pieces = _REGION_TAG.split(reply)
    for position in range(1, len(pieces), 2):
        tag, content = pieces[position], pieces[position + 1]
        closing = pieces[position + 2] if position + 2 < len(pieces) else ""
        if tag == "<ref>":
            label = content.strip() if closing == "</ref>" else None
        elif tag.startswith("</"):
            label = None if content.strip() else label
        else:
            kind: Literal["box", "quad"] = "box" if tag == "<box>" else "quad"
            match = _POINTS[kind].fullmatch(content) if closing == f"</{kind}>" else None
            numbers = [int(number) for number in match.groups()] if match else [1001]
            if max(numbers) <= 1000:
                xs, ys = numbers[::2], numbers[1::2]
                points = tuple((int(x / 1000 * width), int(y / 1000 * height)) for x, y in zip(xs, ys, strict=True))
                regions.append(Region(kind, points, label))
    return regions


def from_list_format(elements: Iterable[Mapping[str, Any]]) -> str:
    """Text with tags, as the official tokenizer's method of this name writes it.

    Elements are `{"image": path}`, `{"text": ..}` and `{"box": [[x1, y1, x2, y2], ..], "ref": ..}` (`ref` may be
    absent). Raises UserError for anything else.
    """
    text = ""
    pictures = 0
    for element in elements:
        if "image" in element:
            pictures += 1
            text += f"Picture {pictures}:<img>{element['image']}</img>\n"
        elif "text" in element:
            text += element["text"]
        elif "box" in element:
            if "ref" in element:
                text += f"<ref>{element['ref']}</ref>"
            for x1, y1, x2, y2 in element["box"]:
                text += f"<box>({int(x1)},{int(y1)}),({int(x2)},{int(y2)})</box>"
        else:
            raise UserError(f"Unsupport element: {dict(element)}; one of image, text and box is needed")
    return text


_LIST_TAG = re.compile("<(img|ref|box|quad)>")
_NOT_IN_LIST = re.compile(
    "|".join(re.escape(s) for s in vocabulary.SPECIALS if s not in (vocabulary.END_OF_TEXT, *IMAGE_SPECIALS))
)


def to_list_format(text: str) -> list[dict[str, str]]:
    """The inverse: text with tags into `image`, `ref`, `box`, `quad` and `text` elements, as the official method.

    Raises UserError for a tag that is not closed and for the special tokens of a conversation.
    """
    text = unicodedata.normalize("NFC", text)
    if special := _NOT_IN_LIST.search(text):
        raise UserError(f"the text holds the special token {special[0]}, which has no place in a list of elements")
    elements = []
    end = 0
    while tag := _LIST_TAG.search(text, end):
        closing = text.find(f"</{tag[1]}>", tag.end())
        if closing < 0:
            raise UserError(f"Unclosed image token: {tag[0]} without </{tag[1]}>")
        if tag.start() > end:
            elements.append({"text": text[end : tag.start()]})
        elements.append({"image" if tag[1] == "img" else tag[1]: text[tag.end() : closing]})
        end = closing + len(f"</{tag[1]}>")
    return [*elements, {"text": text[end:]}] if end < len(text) else elements
