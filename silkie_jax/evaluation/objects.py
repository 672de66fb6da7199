"""CHAIR (Rohrbach et al. 2018, arXiv 1809.02156) over data of your own: objects of descriptions that are not there.

What is in each image and which words stand for an object are given, so that nothing is guessed from captions and no
word tool is needed. Beside CHAIR's two figures stand what its critics ask for: the share of what is there that is
told (a description that says little invents little), and the length.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import About, Answer, Decoding, Figure, Item, Replies, Score, Settings
from silkie_jax.evaluation.rules.sums import Sums, Totals, ratio
from silkie_jax.evaluation.running.files import FilePicture, field, read_json
from silkie_jax.evaluation.running.records import kind, optional_text, read_records, text_field

IMAGES, VOCABULARY = "images.jsonl", "vocabulary.json"

ABOUT = About(
    title="objects (CHAIR)",
    data=f"a folder with {IMAGES}, lines {{image, objects, [question]}}, and {VOCABULARY}, {{object: [other words for "
    "it]}; images beside them or in images/",
    figures=(
        Figure("CHAIRi", 0.0, worst=1.0),
        Figure("CHAIRs", 0.0, worst=1.0),
        Figure("coverage", 1.0),
    ),
    decoding=Decoding(max_new_tokens=512),
    prompts={
        "question": "the record's question; the next where it has none",
        "detail": '"Please describe this image in detail."',
    },
)
_DETAIL = "Please describe this image in detail."
_WORD = re.compile(r"\w+(?:['’-]\w+)*")

Vocabulary = Mapping[tuple[str, ...], str]
"""Words of a name, lower-case, and the object that they stand for."""


def items(data: Path, settings: Settings) -> list[Item]:
    """The images of a folder; the truth of each is its objects.

    Raises:
        UserError: a file is missing or not of the form, an image occurs twice, or an object is not in the vocabulary.
    """
    vocabulary = read_vocabulary(data / VOCABULARY)
    names = set(vocabulary.values())
    found: dict[str, Item] = {}
    for where, record in read_records(data / IMAGES):
        image = text_field(record, "image", where)
        if image in found:
            raise UserError(f"{where}: image {image!r} again: name all its objects in one line")
        objects = _texts(field(record, "objects", where), f"{where}: objects")
        if unknown := [name for name in objects if name not in names]:
            raise UserError(f"{where}: object {unknown[0]!r} is not in {data / VOCABULARY}: add it there")
        found[image] = Item(
            image,
            optional_text(record, "question", where) or _DETAIL,
            (FilePicture(image, (data / image, data / "images" / image)),),
            tuple(dict.fromkeys(objects)),
            fields={"vocabulary": vocabulary},
        )
    return list(found.values())


def read_vocabulary(path: Path) -> dict[tuple[str, ...], str]:
    """Every name and every other word for it.

    Raises:
        UserError: the file is not of the form, or a word stands for two objects.
    """
    table = read_json(path, unique=True)
    if not isinstance(table, dict):
        raise UserError(f"{path}: expected an object of names and lists of words, found {kind(table)}")
    vocabulary: dict[tuple[str, ...], str] = {}
    for name, others in table.items():
        for text in (name, *_texts(others, f"{path}: {name!r}")):
            words = tuple(words_of(text))
            if not words:
                raise UserError(f"{path}: {name!r} has {text!r}, which holds no word")
            if vocabulary.setdefault(words, name) != name:
                raise UserError(f"{path}: {text!r} stands for {vocabulary[words]!r} and for {name!r}: keep one")
    return vocabulary


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UserError(f"{where} must be a list of texts, found {kind(value)}")
    return value


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation; what an apostrophe or a hyphen joins is one."""
    return _WORD.findall(text.lower())


def mentions(text: str, vocabulary: Vocabulary) -> list[str]:
    """Objects that a text names, in order and as often as it names them.

    Of several names that begin at a word the longest counts ("traffic light" before "light"), and its words count for
    no other.
    """
    words, found, at = words_of(text), [], 0
    longest = max(map(len, vocabulary), default=0)
    while at < len(words):
        for length in range(min(longest, len(words) - at), 0, -1):
            if name := vocabulary.get(tuple(words[at : at + length])):
                found.append(name)
                at += length
                break
        else:
            at += 1
    return found


def prompt(item: Item, style: str) -> str:
    """The request for a description."""
    return item.question if style == "question" else _DETAIL


def read_answers(path: Path, items: list[Item] | None, settings: Settings) -> tuple[list[Item], list[Answer]]:
    """Lines {image, response}; CHAIR's own name for a response, `caption`, does too.

    Raises:
        UserError: there is no data, a record is not of the form, or names an image that the data lacks or twice.
    """
    if items is None:
        raise UserError(f"{path}: descriptions do not hold what is in the images: name it with --data")
    known, answers = {item.id for item in items}, {}
    for where, record in read_records(path):
        image = text_field(record, "image", where)
        if image not in known:
            raise UserError(f"{where}: no image {image!r} in the data; is --data of the same images?")
        if image in answers:
            raise UserError(f"{where}: image {image!r} again: keep one description of each")
        answers[image] = Answer(image, text_field(record, "caption" if "caption" in record else "response", where))
    return items, list(answers.values())


@dataclass(frozen=True)
class Verdict:
    """What a description came to: what it names, what of that is not there, what is there and told, and its words."""

    named: tuple[str, ...]
    wrong: tuple[str, ...]
    told: frozenset[str]
    words: int


def verdict(item: Item, text: str) -> Verdict:
    """Holds a description against the objects of its image."""
    named = tuple(mentions(text, item.fields["vocabulary"]))
    wrong = tuple(name for name in named if name not in item.truth)
    return Verdict(named, wrong, frozenset(item.truth) & set(named), len(words_of(text)))


_NAMES = ("descriptions", "mentions", "wrong", "faulty", "told", "there", "words")


def score(items: list[Item], answers: list[Answer], replies: Replies | None, parser: str, settings: Settings) -> Score:
    """CHAIRi: mentions of what is not there, of all mentions; CHAIRs: descriptions with one, of all descriptions.

    An object that is named twice counts twice, as in CHAIR; once in coverage, the share of the objects that are there
    and told. Images without a description are in no figure.
    """
    known = {item.id: item for item in items}
    verdicts = {answer.id: verdict(known[answer.id], answer.text) for answer in answers}
    rows = []
    for name, found in verdicts.items():
        counts = (1, len(found.named), len(found.wrong), bool(found.wrong), len(found.told), len(known[name].truth))
        rows.append((known[name].cluster, dict(zip(_NAMES, (*counts, found.words), strict=True))))
    sums = Sums.of(rows, _NAMES, _figures)
    silent = sum(not found.named for found in verdicts.values())
    notes = []
    if silent:
        notes.append(f"{silent} of {len(verdicts)} descriptions name no object of the vocabulary.")
    if missing := len(items) - len(verdicts):
        notes.append(f"{missing} of {len(items)} images have no description; they are in no figure.")
    return Score(
        official={name: float(value) for name, value in sums.figures().items()} if rows else {},
        sums=sums,
        outcomes={name: float(not found.wrong) for name, found in verdicts.items()},
        readings={name: _reading(found) for name, found in verdicts.items()},
        counts={"images": len(items), "descriptions": len(verdicts), "without an object": silent, "missing": missing},
        notes=notes,
    )


def _figures(sums: Totals) -> dict[str, Any]:
    return {
        "CHAIRi": ratio(sums["wrong"], sums["mentions"]),
        "CHAIRs": ratio(sums["faulty"], sums["descriptions"]),
        "coverage": ratio(sums["told"], sums["there"]),
        "words": ratio(sums["words"], sums["descriptions"]),
    }


def _reading(found: Verdict) -> str:
    return _listed(found.named) + (f"; not there: {_listed(found.wrong)}" if found.wrong else "")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "no object"
