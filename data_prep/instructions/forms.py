"""Rows of published instruction sets into instructions, whichever of their forms a row has: it is seen from its fields.

conversations: [{from, value}]                        LLaVA, LLaVAR, LLaVA-Med (which writes `conversatons`), SVIT
conversations: [{content: [{from, value}]}]           SVIT as first published: several dialogues an image
image_id, question                                    LRV-Instruction
instruction, inputs, image_base64_str                 M3IT
Figure_path, Question, Choice A ...                   PMC-VQA (CSV)
question, actions, image_path                         PCA-EVAL
prompt | question | instruction | query, image ...    ComVint, VLFeedback, and anything alike
messages: [{role, content}]                           chat logs
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.tables import fields
from data_prep.tables.rejections import Rejected

_PLACEHOLDER = re.compile(r"\s*(?:<image>|<image_placeholder>|<ImageHere>|Picture \d+:\s*<img>[^<]*</img>)\s*")
_PROMPTS = ("prompt", "question", "instruction", "query", "Question", "text")
_IMAGES = ("image", "images", "img_path", "image_path", "image_file", "file_name", "Figure_path", "img")
_ANSWERS = (
    "answer",
    "Answer",
    "output",
    "outputs",
    "response",
    "completions",
    "models",
    "chosen",
    "rejected",
    "caption",
)
_RIGHT = ("answer", "Answer", "output", "outputs", "response")  # of the answers, what a source holds to be right
_CHOICES = re.compile(r"Choice ([A-Z])")
_USERS, _ASSISTANTS = ("human", "user"), ("gpt", "assistant", "bot", "model")
Turn = tuple[str, str]


@dataclass
class Asked:
    """One instruction of a row, before its images are looked up.

    Attributes:
        id: "" where the row has none.
        prompt: the user's turn that is to be answered.
        history: earlier turns as (user, assistant).
        images: paths to look up, or files as bytes.
        image_id: names the image where there is no path: a file of this name with any suffix.
        licence: as the row states it.
        extra: what else the row says. Of answers that came with it the right one is kept, as `reference`: judges may
            be shown it.
    """

    id: str
    prompt: str
    history: list[Turn] = field(default_factory=list)
    images: list[str | bytes] = field(default_factory=list)
    image_id: str = ""
    licence: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def read_row(row: Mapping[str, Any], turns: str = "first") -> list[Asked]:
    """The instructions of a row.

    Args:
        row: its fields.
        turns: of a conversation, whether its "first" question is asked, its "last" with the earlier turns as history,
            or "each" with what came before it.

    Raises:
        Rejected: the row has no prompt, or its conversation makes no sense.
    """
    used: set[str] = set()
    dialogues = _dialogues(row, used)
    if dialogues is None:
        dialogues = [[(_question(row, used), _right(row))]]
    images = [ref for key in _IMAGES for ref in _images(row, key, used)] + _base64_images(row, used)
    image_id = fields.row_id(row.get("image_id"))
    id = fields.row_id(row.get("id", row.get("question_id"))) or image_id
    licence = next((str(row[key]) for key in ("licence", "license") if row.get(key)), "")
    used |= {"id", "question_id", "image_id", "licence", "license", *_ANSWERS}
    extra = {str(key): fields.json_value(value) for key, value in row.items() if key not in used and value is not None}
    asked = [
        Asked(id, prompt, history, images, image_id, licence, ({"reference": reply} if reply else {}) | extra)
        for dialogue in dialogues
        for prompt, reply, history in _questions(dialogue, turns)
    ]
    if not asked:
        raise Rejected("no question", "the conversation holds no turn of the user")
    if len(asked) > 1 and id:
        for number, one in enumerate(asked, 1):
            one.id = f"{id}-{number}"
    return asked


def _dialogues(row: Mapping[str, Any], used: set[str]) -> list[list[Turn]] | None:
    """The conversations of a row as (user, assistant) turns; None where it has none."""
    for key in ("conversations", "conversatons", "conversation", "messages"):
        value = row.get(key)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise Rejected("conversation is malformed", error) from error
        if value is None:
            continue
        used.add(key)
        if not isinstance(value, list) or not value or not all(isinstance(turn, Mapping) for turn in value):
            raise Rejected("conversation is malformed", f"a list of turns is expected, not {value!r}")
        if all(isinstance(turn.get("content"), list) and "role" not in turn and "from" not in turn for turn in value):
            return [_turns(dialogue["content"]) for dialogue in value]
        return [_turns(value)]
    return None


def _turns(messages: Sequence[Any]) -> list[Turn]:
    """Messages as pairs of user and assistant; a last question without an answer has ""."""
    turns: list[Turn] = []
    question: str | None = None
    for message in messages:
        if not isinstance(message, Mapping):
            raise Rejected("conversation is malformed", f"a turn is {message!r}")
        role = str(message.get("from", message.get("role", ""))).lower()
        words = _words(message.get("value", message.get("content")))
        if role in _USERS and question is None:
            question = words
        elif role in _ASSISTANTS and question is not None:
            turns.append((question, words))
            question = None
        elif role != "system" or turns:
            raise Rejected("conversation is malformed", f"a turn of {role or 'nobody'!r} is out of place")
    return turns + ([(question, "")] if question is not None else [])


def _words(content: Any) -> str:
    """A message's text without the marks of its images; content in parts keeps its texts."""
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        content = "".join(str(part.get("text") or "") for part in content if part.get("type", "text") == "text")
    return _PLACEHOLDER.sub("\n", fields.text(content, "a turn")).strip()


def _questions(dialogue: list[Turn], turns: str) -> list[tuple[str, str, list[Turn]]]:
    """Questions that are asked, with their replies and what came before."""
    asked = [(user, reply, dialogue[:number]) for number, (user, reply) in enumerate(dialogue)]
    chosen = {"first": asked[:1], "last": asked[-1:], "each": asked}[turns]
    for prompt, _, _ in chosen:
        if not prompt:
            raise Rejected("prompt is empty")
    return chosen


def _right(row: Mapping[str, Any]) -> str:
    """The answer that came with a row, if it is one text."""
    return next((row[key].strip() for key in _RIGHT if isinstance(row.get(key), str) and row[key].strip()), "")


def _question(row: Mapping[str, Any], used: set[str]) -> str:
    """The prompt of a row without a conversation: its question, what it is about, and the choices it offers."""
    key = next((key for key in _PROMPTS if isinstance(row.get(key), str) and row[key].strip()), None)
    if key is None:
        raise Rejected("no prompt", f"none of {', '.join(_PROMPTS)} holds a text")
    parts = [_PLACEHOLDER.sub("\n", fields.text(row[key], key)).strip()]
    used.add(key)
    if isinstance(row.get("inputs"), str):  # M3IT: the instruction is the task, this is the question
        parts.append(_PLACEHOLDER.sub("\n", row["inputs"]).strip())
        used.add("inputs")
    choices = [(found.group(1), value) for name, value in row.items() if (found := _CHOICES.fullmatch(str(name)))]
    used |= {f"Choice {letter}" for letter, _ in choices}
    if isinstance(row.get("actions"), list):
        choices = [(chr(ord("A") + number), action) for number, action in enumerate(row["actions"][:26])]
        used |= {"actions", "question_prompt"}
    for letter, choice in choices:
        words = re.sub(rf"^\s*\(?{letter}[.:)]\s*", "", str(choice)).strip()
        if words:
            parts.append(f"{letter}. {fields.text(words, 'a choice')}")
    return "\n".join(part for part in parts if part)


def _images(row: Mapping[str, Any], key: str, used: set[str]) -> list[str | bytes]:
    if row.get(key) in (None, "", []):
        return []
    used.add(key)
    return fields.image_refs(row[key])


def _base64_images(row: Mapping[str, Any], used: set[str]) -> list[str | bytes]:
    key = next((key for key in ("image_base64_str", "image_base64") if row.get(key)), None)
    if key is None:
        return []
    used.add(key)
    texts = row[key] if isinstance(row[key], list) else [row[key]]
    try:
        return [base64.b64decode(fields.text(text, key), validate=True) for text in texts]
    except binascii.Error as error:
        raise Rejected("unreadable image", f"{key} is not base64 ({error})") from error
