"""CHAIR (Rohrbach et al. 2018, arXiv:1809.02156): objects of captions that are not in the image, on COCO 2014.

After `utils/chair.py` of the authors' repository and, for recall, CHAIR-metric-standalone, which papers run. An
image's objects are its annotated categories and whatever its human captions name. What a word counts as stands in
`data/coco_objects.json` (name of a category -> its synonyms). As in the official list "motor bike" is no object though
"motorbike" is (a blank too many), nor is "cheesecake"; and Pattern's singular of "bus" is "bu", so "bus" is none
either, while "buses" is.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import About, Answer, Decoding, Figure, Item, Replies, Score, Settings
from silkie_jax.evaluation.rules import words as tools
from silkie_jax.evaluation.rules.sums import Sums, Totals, ratio
from silkie_jax.evaluation.running.coco import CocoImage, image_id, missing_files, read_annotations
from silkie_jax.evaluation.running.files import FilePicture, field, read_json, read_lines
from silkie_jax.evaluation.running.records import read_records, text_field
from silkie_jax.evaluation.running.shapes import an_object

ABOUT = About(
    title="CHAIR",
    data="COCO's annotations_trainval2014: instances_{train,val}2014.json and captions_{train,val}2014.json in the "
    "folder; images in val2014/ and train2014/ in it or beside it (for answers only)",
    figures=(Figure("CHAIRi", 0.0, worst=1.0), Figure("CHAIRs", 0.0, worst=1.0), Figure("recall", 1.0)),
    decoding=Decoding(512),
    prompts={
        "detail": "a description in detail, as lmms-eval asks for; there is no official one",
        "sentence": "a caption of one sentence, nearer to the captioning models that CHAIR was made for",
    },
    parsers=("official", "lmms-eval"),
    settings={"images": "file of image ids, one a line, to take instead of all images (papers take 500 of val2014)"},
)

_PROMPTS = {"detail": "Please describe this image in detail.", "sentence": "Describe this image in one sentence."}
_WHY = "scoring CHAIR"


@cache
def _pairs() -> dict[str, str]:
    """Two words that are one -> that one."""
    return tools.word_data("coco_pairs.json")


@cache
def _objects() -> dict[str, str]:
    """Word -> its category."""
    return {word: name for name, synonyms in tools.word_data("coco_objects.json").items() for word in (name, *synonyms)}


@dataclass(frozen=True)
class Mention:
    """A word of a caption that is an object: the word, its category, and its place among the caption's words."""

    word: str
    category: str
    place: int


def mentions(words: Iterable[str]) -> list[Mention]:
    """The objects among the singular words of a caption, in order.

    "seat" is left out where the caption has "toilet"; places after it are then those of earlier words, as officially.
    """
    words, pairs, objects = list(words), _pairs(), _objects()
    joined, places, i = [], [], 0
    while i < len(words):
        one = pairs.get(" ".join(words[i : i + 2]))
        joined.append(words[i] if one is None else one)
        places.append(i)
        i += 1 if one is None else 2
    if "toilet" in joined:
        joined = [word for word in joined if word != "seat"]
    return [Mention(word, objects[word], place) for word, place in zip(joined, places, strict=False) if word in objects]


def _official_words() -> tools.WordTool:
    tool = tools.tokenizer(_WHY)
    return tools.WordTool(
        f"{tool.name}, singulars of Pattern 3.6 (our implementation)",
        lambda text: [tools.singularize(word) for word in tool.call(text.lower())],
    )


def _lmms_eval_words() -> tools.WordTool:
    tool = tools.tagged_lemmas(_WHY)
    return tools.WordTool(tool.name, lambda text: tool.call(text.lower()))


_WORDS: dict[str, Callable[[], tools.WordTool]] = {"official": _official_words, "lmms-eval": _lmms_eval_words}


# Files.


def items(data: Path, settings: Settings) -> list[Item]:
    """The images of the COCO annotations that are there, val first.

    Raises:
        UserError: instances or captions are not there or not in COCO's form, or `images` has an unknown id.
    """
    folder = data / "annotations" if (data / "annotations").is_dir() else data
    wanted = _read_ids(Path(settings["images"])) if "images" in settings else None
    images, missing = read_annotations(folder, wanted), missing_files(folder)
    if wanted is not None and (unknown := [i for i in wanted if i not in images]):
        raise UserError(f"{settings['images']}: image {unknown[0]} is in none of the annotation files in {folder}")
    odd = sorted(set().union(*(image.categories for image in images.values())) - set(_objects().values()))
    if odd:
        raise UserError(f"{folder}: category {odd[0]!r} of the instances is none of COCO's 80")
    question = _PROMPTS["detail"]
    return [
        Item(str(i), question, (_picture(data, i, image),), image, image.split, fields={"missing": missing})
        for i, image in images.items()
    ]


def _read_ids(path: Path) -> list[int]:
    lines = enumerate(read_lines(path), start=1)
    found = [image_id(line.strip(), f"{path}: line {number}") for number, line in lines if line.strip()]
    if not found:
        raise UserError(f"{path}: no image ids; write one a line")
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class CocoPicture:
    """An image of a split; where it may lie is looked up when it is read, since there are 120,000 of them."""

    name: str
    data: Path
    split: str

    def exists(self) -> bool:
        """Whether one of the folders has it."""
        return self._file().exists()

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
            UserError: it is in none of the folders.
        """
        return self._file().read()

    def _file(self) -> FilePicture:
        data, split = self.data, self.split
        folders = (data / split, data / "images" / split, data / "images", data.parent / split, data)
        return FilePicture(self.name, tuple(f / self.name for f in folders), f"COCO's {split}.zip has it")


def _picture(data: Path, i: int, image: CocoImage) -> CocoPicture:
    split = f"{image.split}2014"
    return CocoPicture(f"COCO_{split}_{i:012d}.jpg", data, split)


def prompt(item: Item, style: str) -> str:
    """The request for a description; the data has none."""
    return _PROMPTS[style]


def _rows(path: Path) -> Iterable[tuple[str, Any, dict[str, Any]]]:
    """(where, image id or None, row) of a results file: {"imgToEval": {id: row}}, a list of rows or JSON lines."""
    if not _is_official(path):
        yield from ((where, None, row) for where, row in read_records(path))
        return
    whole = an_object(read_json(path), str(path))
    table = an_object(field(whole, "imgToEval", str(path)), f"{path}: imgToEval")
    yield from ((f"{path}: imgToEval, {key!r}", key, an_object(row, f"{path}: {key!r}")) for key, row in table.items())


def _is_official(path: Path) -> bool:
    """Whether a file is one object over several lines, or one that has "imgToEval"; a line by itself is a caption."""
    first = next((line.strip() for line in read_lines(path) if line.strip()), "")
    if not first.startswith("{"):
        return False
    try:
        return "imgToEval" in json.loads(first.removesuffix(","))
    except ValueError:
        return path.suffix != ".jsonl"


def read_answers(path: Path, items: list[Item] | None, settings: Settings) -> tuple[list[Item], list[Answer]]:
    """Captions in the official form, a list or JSON lines of {image_id, caption}; a repeated image counts again.

    Raises:
        UserError: the file is in no such form, or names an image that the annotations lack.
    """
    if items is None:
        raise UserError(f"{path}: CHAIR needs COCO's annotations: --data FOLDER ({ABOUT.data})")
    known = {item.id: item for item in items}
    missing = items[0].fields["missing"] if items else []
    hint = f" (not there: {', '.join(missing)})" if missing else ""
    answers = []
    for where, key, row in _rows(path):
        identity = str(image_id(row.get("image_id", key), where))
        caption = text_field(row, "caption", where)
        if identity not in known:
            raise UserError(f"{where}: image {identity} is in none of the annotation files{hint}")
        answers.append(Answer(identity, caption))
    if not answers:
        raise UserError(f"{path}: no captions")
    return items, answers


# Scores.


@dataclass(frozen=True)
class Verdict:
    """What one caption came to: objects that it names, in order, those that are not there, and what is there."""

    generated: tuple[Mention, ...]
    hallucinated: tuple[Mention, ...]
    truth: frozenset[str]

    @property
    def found(self) -> set[str]:
        return {mention.category for mention in self.generated} & self.truth


def verdicts(items: list[Item], answers: list[Answer], tool: tools.WordTool) -> list[Verdict]:
    """One for each answer, in order."""
    known = {item.id: item for item in items}

    @cache
    def truth(identity: str) -> frozenset[str]:
        image: CocoImage = known[identity].truth
        named = (mention.category for caption in image.captions for mention in mentions(tool.call(caption)))
        return frozenset(image.categories) | frozenset(named)

    found = []
    for answer in answers:
        there, named = truth(answer.id), tuple(mentions(tool.call(answer.text)))
        found.append(Verdict(named, tuple(m for m in named if m.category not in there), there))
    return found


def figures(totals: Totals) -> dict[str, np.ndarray]:
    """CHAIRi, CHAIRs and recall, as shares."""
    return {
        "CHAIRi": ratio(totals["hallucinated"], totals["mentions"]),
        "CHAIRs": ratio(totals["faulty"], totals["captions"]),
        "recall": ratio(totals["found"], totals["truth"]),
    }


def _counts(verdict: Verdict) -> dict[str, float]:
    return {
        "captions": 1,
        "mentions": len(verdict.generated),
        "hallucinated": len(verdict.hallucinated),
        "faulty": bool(verdict.hallucinated),
        "found": len(verdict.found),
        "truth": len(verdict.truth),
    }


_NAMES = ("captions", "mentions", "hallucinated", "faulty", "found", "truth")


def _reading(verdict: Verdict) -> str:
    named = ", ".join(mention.category for mention in verdict.generated) or "no object"
    wrong = ", ".join(mention.category for mention in verdict.hallucinated)
    return f"{named}; not there: {wrong}" if wrong else named


def score(items: list[Item], answers: list[Answer], replies: Replies | None, parser: str, settings: Settings) -> Score:
    """CHAIRi, CHAIRs and the port's recall, over captions.

    Raises:
        UserError: a word tool is not installed.
    """
    asked = _WORDS[parser]()
    by_parser = verdicts(items, answers, asked)
    official_tool = _official_words()
    official = by_parser if parser == "official" else verdicts(items, answers, official_tool)
    known = {item.id: item for item in items}
    rows = [(known[a.id].cluster, _counts(v)) for a, v in zip(answers, by_parser, strict=True)]
    sums = Sums.of(rows, _NAMES, figures)
    whole = {name: np.array(sum(_counts(v)[name] for v in official), np.float64) for name in _NAMES}
    official_figures = {name: float(value) for name, value in figures(whole).items()}
    repeated = len(answers) - len({answer.id for answer in answers})
    missing = items[0].fields["missing"] if items else []
    bare = sum(not known[i].truth.captions for i in dict.fromkeys(a.id for a in answers))
    notes = [tools.words_used([asked.name, official_tool.name])]
    if missing:
        notes.append(f"not there: {', '.join(missing)}; images of theirs cannot be scored")
    if not whole["mentions"]:
        notes.append("no caption names an object: CHAIRi is undefined")
    if bare:
        notes.append(f"{bare} images have no human captions: their objects are the annotated categories alone")
    if repeated:
        notes.append(f"{repeated} captions are of images that came before; each counts")
    return Score(
        official={
            "CHAIRi": official_figures["CHAIRi"] if whole["mentions"] else None,
            "CHAIRs": official_figures["CHAIRs"] if answers else None,
            "Recall_of_the_port": official_figures["recall"] if whole["truth"] else None,
        },
        sums=sums,
        outcomes={a.id: float(not v.hallucinated) for a, v in zip(answers, by_parser, strict=True)},
        readings={a.id: _reading(v) for a, v in zip(answers, by_parser, strict=True)},
        counts={
            "captions": len(answers),
            "repeated": repeated,
            "without an object": sum(not v.generated for v in by_parser),
            "images without human captions": bare,
        },
        notes=notes,
    )
