"""Preference pairs in the common forms (one `chosen`, one `rejected` a row) into a corpus."""

import os
from functools import partial
from typing import Any, Unpack

from data_prep.tables import fields
from data_prep.tables.importing import Draft, ImportOptions, run_import
from data_prep.tables.rejections import Rejected
from data_prep.tables.summary import Summary
from silkie_jax.corpus.schema import Response

_FIELDS = ("id", "image", "images", "prompt", "history", "chosen", "rejected")
_DEFAULT_SYSTEM = "You are a helpful assistant."
Turns = list[tuple[str, str]]


def import_pairs(
    source: str | os.PathLike[str],
    images: str | os.PathLike[str] | None,
    dst: str | os.PathLike[str],
    *,
    image_pairs: bool = False,
    **options: Unpack[ImportOptions],
) -> Summary:
    """Imports rows of `prompt`, `chosen`, `rejected` with, optionally, `image`, `history` and `id`.

    `image` (or `images`) is a path among `images`, a list of paths, or image files as Hugging Face parquet carries
    them; without it the record is text only. `history` is a list of [user, assistant]. `prompt` may also be a list of
    {"role", "content"} messages as trl takes them, `chosen` and `rejected` then too (a prompt that only they carry is
    found as their common beginning). Response 0 is the chosen one and response 1 the rejected one, and the record's
    pair says so. Rows that share an id are separate records: the later ones are named `id#2`, `id#3`; rows without an
    id are named by their number, `row-1`.

    With `image_pairs` two `images` are the chosen response's and the rejected one's (V-DPO, arXiv 2411.02712), and not
    both shown to both. Their texts may be the same one, `chosen`; `rejected` may then be absent. A row of one image is
    what it always is.

    The other arguments, result and errors are those of `import_vlfeedback`.
    """
    parse, form = (partial(parse_row, image_pairs=True), "image pairs") if image_pairs else (parse_row, "")
    return run_import(source, images, dst, parse=parse, name="pairs", identical_rows="keep", form=form, **options)


def parse_row(row: dict[str, Any], image_pairs: bool = False) -> Draft:
    """One row in the corpus's terms.

    Raises:
        Rejected: a text is absent, the messages do not form a conversation, or chosen and rejected are the same.
    """
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    refs = fields.image_refs(row.get("image")) + fields.image_refs(row.get("images"))
    views: list[tuple[int, ...] | None] = [None, None]
    if image_pairs:
        views = [tuple(range(len(refs)))] * 2  # by name: TFDS wants a field in all records of a corpus
        if len(refs) > 2:
            raise Rejected("no image pair", f"two images are expected, or one for both responses, not {len(refs)}")
        if len(refs) == 2:
            views, rejected = [(0,), (1,)], chosen if rejected is None else rejected
    if prompt is None and isinstance(chosen, list) and isinstance(rejected, list):
        if chosen[:-1] != rejected[:-1]:
            raise Rejected("no common prompt", "chosen and rejected differ before their last message")
        prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
    history: Turns
    if isinstance(prompt, list):
        history, last = _conversation(prompt)
    else:
        history, last = _history(row.get("history")), fields.text(prompt, "prompt")
    answers = [_answer(chosen, "chosen"), _answer(rejected, "rejected")]
    if answers[0] == answers[1] and (views[0] == views[1] or refs[0] == refs[1]):
        raise Rejected("chosen and rejected are the same", "images, too" if image_pairs else "")
    return Draft(
        id=fields.row_id(row.get("id")),
        prompt=last,
        responses=[Response(answer, images=view) for answer, view in zip(answers, views, strict=True)],
        images=refs,
        history=history,
        pairs=[(0, 1)],
        extra={str(key): fields.json_value(value) for key, value in row.items() if key not in _FIELDS},
    )


def _history(value: Any) -> Turns:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in value):
        raise Rejected("history is malformed", f"a list of [user, assistant] is expected, not {value!r}")
    return [(fields.text(user, "history"), fields.text(assistant, "history")) for user, assistant in value]


def _conversation(messages: list[Any]) -> tuple[Turns, str]:
    """Earlier turns and the last user message of a list of messages."""
    turns = [_message(message) for message in messages]
    if turns and turns[0][0] == "system":
        if turns[0][1].strip() not in ("", _DEFAULT_SYSTEM):
            raise Rejected(
                "system message", f"the model is trained with {_DEFAULT_SYSTEM!r} alone, not {turns[0][1]!r}"
            )
        turns = turns[1:]
    expected = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    if [role for role, _ in turns] != expected:
        roles = ", ".join(role for role, _ in turns) or "no message"
        raise Rejected("messages are malformed", f"user and assistant must alternate and end with user, not {roles}")
    texts = [content for _, content in turns]
    return list(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1]


def _answer(value: Any, name: str) -> str:
    """A response: a text, or one assistant message."""
    if not isinstance(value, list):
        return fields.text(value, name)
    turns = [_message(message) for message in value]
    if [role for role, _ in turns] != ["assistant"]:
        raise Rejected("messages are malformed", f"{name} must be one assistant message")
    return turns[0][1]


def _message(message: Any) -> tuple[str, str]:
    """Role and text of a message. Content in parts keeps its texts; image parts only mark the place of `image`."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Rejected("messages are malformed", f"an object with role and content is expected, not {message!r}")
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type", "text") == "text"]
        content = "".join(fields.text(part, "content") for part in texts)
    return message["role"], fields.text(content, "content")
