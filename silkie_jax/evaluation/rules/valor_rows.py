"""Rows of VALOR-Eval: what each part's files hold, checked; which part a row is of; rows from a judge's two replies."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import Ask, Dialogue
from silkie_jax.evaluation.prompts import judge_prompt
from silkie_jax.evaluation.rules.valor_parts import PARTS, without_dropped
from silkie_jax.evaluation.rules.words import word_data
from silkie_jax.evaluation.running.files import field
from silkie_jax.evaluation.running.records import kind
from silkie_jax.evaluation.running.shapes import a_list, an_object, some_words

TRIES = 3
"""How often a judge is asked one thing, until its reply is JSON of the form asked for (officially for ever)."""

Check = Callable[[Any, str], Any]


# Shapes; each raises UserError where a value has another.


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: expected a text, found {kind(value)}")
    return value


def _maybe_text(value: Any, where: str) -> str | None:
    return None if value is None else _text(value, where)


def _anything(value: Any, where: str) -> Any:
    return value


def _each(check: Check) -> Check:
    """An object whose values pass."""

    def checked(value: Any, where: str) -> dict[str, Any]:
        return {key: check(entry, f"{where}, {key!r}") for key, entry in an_object(value, where).items()}

    return checked


def _ranks(value: Any, where: str) -> dict[str, str]:
    found = _each(_text)(value, where)
    for rank in found:
        if not rank.isdecimal() or str(int(rank)) != rank:
            raise UserError(f"{where}: rank {rank!r} is not a number")
    return found


def _ranked(value: Any, where: str) -> dict[str, str] | str:
    return "" if value == "" else _each(_text)(value, where)


def _person(value: Any, where: str) -> dict[str, Any]:
    found = an_object(value, where)
    return {**found, "object": _maybe_text(found.get("object"), f"{where}: object")}


def _matched_person(value: Any, where: str) -> dict[str, Any]:
    found = an_object(value, where)
    pairs = found.get("object")
    return {**found, "object": None if pairs is None else _each(_maybe_text)(pairs, f"{where}: object")}


def _list_or_wrapped(value: Any, where: str) -> list[Any]:
    if isinstance(value, dict):
        value = next(iter(value.values()), [])
    return some_words(value, where)


@dataclass(frozen=True)
class Shape:
    """Fields of a row and what they hold; `reply` is where the extraction's reply has the features."""

    truth: str
    generated: str
    matched: str
    checks: Mapping[str, Check]
    reply: str


def _shape(of_words: bool, reply: str, truth: Check, generated: Check, pairs: Check) -> Shape:
    names = ("gt_words", "generated_words", "matched_objects")
    names = names if of_words else ("gt_obj_atts", "generated_obj_atts", "matched_att_obj")
    checks = dict(zip((*names, "broader_concept"), (truth, generated, pairs, pairs), strict=True))
    return Shape(*names, checks, reply)


_PAIRS = _each(_maybe_text)
SHAPES = {
    "object_existence": _shape(True, "objects", some_words, some_words, _PAIRS),
    "attribute_object": _shape(False, "features", _each(_text), _each(_anything), _each(_PAIRS)),
    "attribute_people": _shape(False, "features", _each(_person), _each(_person), _each(_matched_person)),
    "relation_positional": _shape(True, "relations", _each(some_words), _list_or_wrapped, _PAIRS),
    "relation_comparative": _shape(True, "features", _ranks, _ranked, _PAIRS),
}


def check_row(part: str, row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a matched row that scoring reads.

    Raises:
        UserError: one is missing or of another shape.
    """
    return {
        name: check(field(dict(row), name, where), f"{where}: {name}") for name, check in SHAPES[part].checks.items()
    }


def check_truth(part: str, value: Any, where: str) -> Any:
    """A ground truth.

    Raises:
        UserError: it is of another shape.
    """
    shape = SHAPES[part]
    return shape.checks[shape.truth](value, where)


def part_of(row: Mapping[str, Any], name: str) -> str | None:
    """The part of a matched row, by what it holds, or where that does not tell by the name of its file."""
    for key, found in (("gt_words", _part_of_words), ("gt_obj_atts", _part_of_attributes)):
        if key in row:
            return found(row) or named_part(name)
    return None


def _part_of_words(row: Mapping[str, Any]) -> str | None:
    if isinstance(row["gt_words"], list):
        return "object_existence"
    values = list(row["gt_words"].values()) if isinstance(row["gt_words"], dict) else []
    return ("relation_positional" if isinstance(values[0], list) else "relation_comparative") if values else None


def _part_of_attributes(row: Mapping[str, Any]) -> str | None:
    fields = (row["gt_obj_atts"], row.get("generated_obj_atts"))
    values = [value for entry in fields if isinstance(entry, dict) for value in entry.values()]
    return ("attribute_people" if isinstance(values[0], dict) else "attribute_object") if values else None


def named_part(name: str) -> str | None:
    """The part whose name a file's name has."""
    return next((part for part in PARTS if part in name.lower()), None)


# A judge's replies.


def read_reply(text: str) -> dict[str, Any] | None:
    """The JSON object in a reply, code fences and words around it dropped; None where there is none."""
    start, end = text.find("{"), text.rfind("}")
    try:
        found = json.loads(text[start : end + 1]) if 0 <= start < end else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@cache
def dropped_words(kind_of: str, fixed: bool) -> frozenset[str]:
    """The official stop list; a comma is missing in it, which glues "surroundings" to "moment"."""
    found = frozenset(word_data("valor_dropped_words.json")[kind_of])
    return found | {"surroundings"} if fixed and kind_of == "objects" else found


def clean_features(part: str, features: Any, fixed: bool) -> Any:
    """Extracted features without those that the official post-processing drops."""
    kinds = {"object_existence": "objects", "relation_positional": "relations"}
    return without_dropped(features, dropped_words(kinds[part], fixed)) if part in kinds else features


def read_features(part: str, response: Any, where: str) -> Any:
    """Features of an extraction: of a judge's reply, or of `response` in a file.

    Raises:
        UserError: they are of another shape.
    """
    shape = SHAPES[part]
    inner = response[shape.reply] if isinstance(response, dict) and shape.reply in response else response
    return shape.checks[shape.generated](inner, where)


@dataclass(frozen=True)
class Progress:
    """How far the replies have brought an image: its row, what to ask next, or neither where the tries are used up."""

    row: dict[str, Any] | None
    ask: Ask | None


def refused(part: str, caption: str) -> bool:
    """Whether an answer counts as no ranking, as officially."""
    return part == "relation_comparative" and caption.startswith(("Sorry", "I'm sorry"))


def follow(part: str, truth: Any, caption: str, extracted: Any, replies: Sequence[str], fixed: bool) -> Progress:
    """Two requests an image: what the caption says, then what of it matches; each again until the reply has the form.

    Args:
        extracted: features that came with the answer; None: to be asked for.
    """
    shape, left = SHAPES[part], list(replies)
    features = "" if refused(part, caption) else extracted
    if features is None:
        said = _first(left, lambda found: read_features(part, found, "reply"))
        if said is None:
            text = judge_prompt("valor_extract", part=part, caption=_said_once(part, caption))
            return Progress(None, _ask(text) if len(left) < TRIES else None)
        features, left = clean_features(part, said[0], fixed), left[said[1] :]
    if part == "object_existence":
        truth = list(dict.fromkeys(truth))
    row = {shape.truth: truth, shape.generated: features, shape.matched: {}, "broader_concept": {}}
    if not features:
        return Progress(row, None)  # nothing that could match
    pairs = _first(left, lambda found: _read_matches(part, found))
    if pairs is None:
        seen, named = (json.dumps(value, ensure_ascii=False) for value in (truth, features))
        text = judge_prompt("valor_match", part=part, truth=seen, generated=named)
        return Progress(None, _ask(text) if len(left) < TRIES else None)
    row[shape.matched], row["broader_concept"] = pairs[0]
    return Progress(row, None)


def _read_matches(part: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Matched and broader ones; pairs with null are no matches."""
    check = SHAPES[part].checks["broader_concept"]
    both = [check(value, "reply") for value in (field(found, "matched", "reply"), found.get("broader", {}))]
    return [{key: value for key, value in pairs.items() if value is not None} for pairs in both]


def dialogue(part: str, truth: Any, caption: str, extracted: Any, fixed: bool) -> Dialogue:
    """`follow` as a dialogue."""
    return lambda replies: follow(part, truth, caption, extracted, replies, fixed).ask


def _ask(text: str) -> Ask:
    return Ask(text, max_tokens=2000)


def _first(replies: Sequence[str], read: Callable[[dict[str, Any]], Any]) -> tuple[Any, int] | None:
    """What the first reply that can be read says, and how many replies that took."""
    for number, text in enumerate(replies[:TRIES], start=1):
        found = read_reply(text)
        if found is not None:
            try:
                return read(found), number
            except UserError:
                continue
    return None


def _said_once(part: str, caption: str) -> str:
    """A ranking that repeats its second sentence after the third is cut there, as officially."""
    sentences = caption.split(".")
    again = part == "relation_comparative" and len(sentences) >= 4 and sentences[1] == sentences[3]
    return ".".join(sentences[:2]) if again else caption


def strangers(part: str, row: Mapping[str, Any]) -> int:
    """How many matches are with what is not in the ground truth."""
    if part == "object_existence":
        known: set[Any] = set(row["gt_words"])
    elif part == "relation_positional":
        known = {way for ways in row["gt_words"].values() for way in a_list(ways, "gt_words")}
    elif part == "relation_comparative":
        known = {w for name in row["gt_words"].values() for w in (name, *(piece.strip() for piece in name.split("/")))}
    else:
        return 0  # the pool takes care of attributes
    pairs = (*row["matched_objects"].values(), *row["broader_concept"].values())
    return sum(not {value, *(piece.strip() for piece in str(value).split("/"))} & known for value in pairs)
