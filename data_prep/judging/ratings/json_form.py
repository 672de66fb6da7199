"""The JSON form: any nesting of aspects and texts by which each rating can be placed."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from data_prep.judging.ratings.found import Found
from data_prep.judging.ratings.text_form import TEXT
from data_prep.judging.ratings.words import DECLINED, MARKS
from data_prep.judging.rubric import plain
from data_prep.replies import straight

_ASPECT_KEYS = ("aspect", "criterion", "dimension", "attribute", "category")
_TEXT_KEYS = ("text", "textid", "textnumber", "id", "index", "response", "responseid", "output", "number")
_RATING_KEYS = ("rating", "score", "value")
_REASON_KEYS = ("rationale", "reason", "reasoning", "justification", "explanation")
_DEPTH = 8  # of nesting that a reply can sensibly have
_TRIES = 50  # places where JSON may begin


def read_json(reply: str, found: Found) -> None:
    """Reads every JSON value in a reply, also inside a fence or among words."""
    for value in _json_values(reply):
        _walk(value, None, 1 if found.texts == 1 else None, found, 0)


def _json_values(reply: str) -> Iterator[Any]:
    decoder = json.JSONDecoder(object_pairs_hook=_Pairs, parse_constant=lambda _: None, parse_int=_integer)
    position = 0
    for _ in range(_TRIES):
        begin = re.compile(r"[{\[]").search(reply, position)
        if not begin:
            return
        try:
            value, position = decoder.raw_decode(reply, begin.start())
        except (ValueError, RecursionError):
            position = begin.start() + 1
        else:
            yield value


class _Pairs(list[tuple[str, Any]]):
    """An object as its pairs, so that a key that stands there twice is seen twice."""


def _integer(digits: str) -> float:
    return float(digits) if len(digits) < 10 else math.inf


def _walk(value: Any, aspect: str | None, text: int | None, found: Found, depth: int) -> None:
    """Follows a JSON value down; keys and fields on the way name the aspect and the text of what lies below."""
    if depth > _DEPTH:
        return
    if isinstance(value, _Pairs):
        fields = [(re.sub(r"[^a-z0-9]", "", straight(key).casefold()), key, item) for key, item in value]
        for key, _, item in fields:
            if key in _ASPECT_KEYS and isinstance(item, str):
                aspect = found.aspects.get(plain(item))
            if key in _TEXT_KEYS and (number := _text_number(item)) is not None:
                text = number
        for key, name, item in fields:
            if key in _RATING_KEYS and not isinstance(item, list):
                if aspect and text is not None:
                    found.rate(aspect, text, _json_rating(item, found))
            elif key in _REASON_KEYS and isinstance(item, str):
                if aspect and text is not None:
                    found.reason(aspect, text, item)
            elif key in _ASPECT_KEYS or (key in _TEXT_KEYS and not isinstance(item, list)):
                continue
            else:
                inner_aspect, inner_text = found.aspects.get(plain(name), aspect), _text_number(name, text)
                named = plain(name) in found.aspects or _text_number(name) is not None
                placed = inner_aspect is not None and inner_text is not None
                if isinstance(item, list):
                    if named or not placed:  # what lies below a rated text under another name is something else
                        _walk(item, inner_aspect, inner_text, found, depth + 1)
                elif named and inner_aspect and inner_text is not None:
                    found.rate(inner_aspect, inner_text, _json_rating(item, found))
    elif isinstance(value, list):
        in_order = aspect is not None and text is None and len(value) == found.texts and not _numbered(value)
        for place, item in enumerate(value, 1):
            at = place if in_order else text
            if isinstance(item, list):
                _walk(item, aspect, at, found, depth + 1)
            elif in_order and aspect:
                found.rate(aspect, place, _json_rating(item, found))


def _numbered(items: list[Any]) -> bool:
    """Whether the objects of a list say themselves which text they are about."""
    keys = {
        re.sub(r"[^a-z0-9]", "", str(key).casefold()) for item in items if isinstance(item, _Pairs) for key, _ in item
    }
    return not keys.isdisjoint(_TEXT_KEYS) or any(_text_number(key) is not None for key in keys)


def _text_number(value: Any, default: int | None = None) -> int | None:
    """The number in 1, "1", "Text 1", "text_1", "Output for Text 1"; else the default."""
    if isinstance(value, float) and value == int(min(max(value, -1), 1e6)) and value >= 0:
        return int(value)
    if isinstance(value, str):
        words = straight(value).replace("_", " ").strip()
        if words.isascii() and words.isdigit() and len(words) < 7:
            return int(words)
        match = TEXT.fullmatch(words)
        if match and match["rest"].strip(MARKS + ":").casefold() in ("", "rating", "score"):
            return int(match["number"])
    return default


def _json_rating(item: Any, found: Found) -> float:
    if item is None:
        return DECLINED
    if isinstance(item, bool) or not isinstance(item, float | str):
        return math.nan
    return found.value(item if isinstance(item, str) else repr(item))
