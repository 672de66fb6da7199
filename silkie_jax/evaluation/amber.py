"""AMBER (Wang et al. 2023, arXiv:2311.07397): what a description invents, and yes/no questions about the same images.

After `inference.py` of the authors' repository; `official` keeps its names ("Descriminative", "Exsitence"), its
rounding and its counters, which start at 0 over 0.001. The positive class is "no".

A description's nouns are read from a record (`nouns.json`) or found by NLTK; what is like what comes from a recorded
table (`similarity.json`) or a spaCy model (`rules/amber_nouns.py`). Yes/no questions need neither.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import About, Answer, Decoding, Figure, Item, Replies, Score, Settings
from silkie_jax.evaluation.rules import yesno
from silkie_jax.evaluation.rules.amber_nouns import Lexicon, NounReader, judge_nouns
from silkie_jax.evaluation.rules.sums import Sums, Totals, ratio
from silkie_jax.evaluation.running.files import FilePicture, field, read_json, read_lines
from silkie_jax.evaluation.running.records import read_records, text_field
from silkie_jax.evaluation.running.shapes import a_list, an_object, some_words

ABOUT = About(
    title="AMBER",
    data="the repository's data/: annotations.json; relation.json and safe_words.txt for descriptions; query_*.json "
    "and images AMBER_n.jpg in image/ for answers; similarity.json and nouns.json where they are recorded",
    figures=(Figure("AMBER", 100.0), Figure("CHAIR", 0.0, worst=100.0), Figure("F1", 100.0), Figure("Cover", 100.0)),
    decoding=Decoding(512),
    prompts={
        "official": "the query as it stands",
        "vlmevalkit": 'yes/no questions end with "Please answer yes or no." (VLMEvalKit since April 2025)',
    },
    parsers=("official", "lmms-eval", "vlmevalkit"),
    settings={
        "evaluation_type": "a all (default), g descriptions, d all yes/no, de existence, da attribute, dr relation",
        "nouns": "file {id: nouns} of descriptions, instead of nouns.json beside the answers or in the data",
        "similarity": "file of a recorded table, or spacy:MODEL (official: spacy:en_core_web_lg)",
        "record": "file to write the similarities to that were asked for, in the form that `similarity` reads",
    },
)

_RULES: dict[str, Callable[[str], str]] = {
    "official": yesno.amber_official,
    "lmms-eval": yesno.amber_lmms_eval,
    "vlmevalkit": yesno.vlmevalkit,
}
_GROUPS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
_ATTRIBUTES = ("state", "number", "action")
_GENERATIVE = "generative"

# Official name -> evaluation type that prints it, its groups (all: one counter of its own), what F1's denominator adds
_PRINTED: dict[str, tuple[str, tuple[str, ...], float]] = {
    "Descriminative Task": ("d", ("all",), 0.0001),
    "Exsitence": ("de", ("existence",), 0.001),
    "Attribute": ("da", _ATTRIBUTES, 0.0001),
    "State": ("da", ("state",), 0.0001),
    "Number": ("da", ("number",), 0.0001),
    "Action": ("da", ("action",), 0.0001),
    "Relation": ("dr", ("relation",), 0.0001),
}
_TYPES = {"a": ("g", "d", "de", "da", "dr"), "d": ("d", "de", "da", "dr")} | {t: (t,) for t in ("g", "de", "da", "dr")}


# Files.


def items(data: Path, settings: Settings) -> list[Item]:
    """Annotated images and questions, with their queries where those are there.

    Raises:
        UserError: annotations.json is not there or not in form, or a setting is none.
    """
    _types(settings)
    folder = data / "data" if (data / "data" / "annotations.json").is_file() else data
    file = folder / "annotations.json"
    queries = _queries(folder)
    lexicon = _lexicon(folder, settings)
    found: dict[str, Item] = {}
    for number, row in enumerate(a_list(read_json(file), str(file)), start=1):
        where = f"{file}: row {number}"
        identity = _id(an_object(row, where), where)
        if identity in found:
            raise UserError(f"{where}: id {identity} is there twice")
        kind = text_field(row, "type", where)
        question, image = queries.get(identity, ("", None))
        pictures = () if image is None else (_picture(data, folder, image),)
        truth, fields = field(row, "truth", where), {}
        if kind == _GENERATIVE:
            truth = tuple(some_words(truth, f"{where}: truth"))
            hallu = tuple(some_words(field(row, "hallu", where), f"{where}: hallu"))
            fields = {"hallu": hallu, "lexicon": lexicon}
        elif kind not in _GROUPS:
            raise UserError(f"{where}: type {kind!r} is none of {_GENERATIVE}, {', '.join(_GROUPS)}")
        elif truth not in ("yes", "no"):
            raise UserError(f"{where}: truth is {truth!r}, not yes or no")
        found[identity] = Item(identity, question, pictures, truth, _GROUPS.get(kind, _GENERATIVE), fields=fields)
    if not found:
        raise UserError(f"{file}: no annotations")
    return list(found.values())


def _id(row: Mapping[str, Any], where: str) -> str:
    value = field(dict(row), "id", where)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where}: the id is {value!r}, not an integer")
    return str(value)


def _lexicon(folder: Path, settings: Settings) -> Lexicon:
    relation, safe, recorded = folder / "relation.json", folder / "safe_words.txt", folder / "similarity.json"
    return Lexicon(
        relation,
        {word: some_words(others, f"{relation}: {word!r}") for word, others in _table(relation).items()},
        frozenset(read_lines(safe)) if safe.is_file() else None,
        safe,
        settings.get("similarity", str(recorded) if recorded.is_file() else ""),
        folder / "nouns.json",
    )


def _table(path: Path) -> dict[str, Any]:
    return an_object(read_json(path), str(path)) if path.is_file() else {}


def _queries(folder: Path) -> dict[str, tuple[str, str]]:
    """Id -> query and image, of all query files."""
    found: dict[str, tuple[str, str]] = {}
    for file in sorted([*folder.glob("query_*.json"), *folder.glob("query/query_*.json")]):
        for number, row in enumerate(a_list(read_json(file), str(file)), start=1):
            where = f"{file}: row {number}"
            identity = _id(an_object(row, where), where)
            found[identity] = (text_field(row, "query", where), text_field(row, "image", where))
    return found


def _picture(data: Path, folder: Path, name: str) -> FilePicture:
    places = [base / inner / name for base in dict.fromkeys((data, folder)) for inner in ("image", "images", "")]
    return FilePicture(name, tuple(places), "AMBER's image.zip has it")


def prompt(item: Item, style: str) -> str:
    """The query, with VLMEvalKit's sentence after yes/no questions where asked for.

    Raises:
        UserError: the data has no query of this id.
    """
    if not item.question:
        raise UserError(f"item {item.id} has no query: put query_all.json into the data folder")
    ask = style == "vlmevalkit" and item.part != _GENERATIVE
    return item.question + ("\nPlease answer yes or no." if ask else "")


def read_answers(path: Path, items: list[Item] | None, settings: Settings) -> tuple[list[Item], list[Answer]]:
    """A list, or JSON lines, of {id, response}, in any order; an id that is there twice counts twice.

    Raises:
        UserError: it is something else, or an id has no annotation.
    """
    if items is None:
        raise UserError(f"{path}: AMBER needs its annotations: --data FOLDER ({ABOUT.data})")
    known = {item.id for item in items}
    nouns = Path(settings["nouns"]) if "nouns" in settings else path.parent / "nouns.json"
    if "nouns" in settings and not nouns.is_file():
        raise UserError(f"{nouns}: no such file (setting nouns)")
    answers = []
    for where, row in read_records(path):
        identity = _id(row, where)
        if identity not in known:
            raise UserError(f"{where}: id {identity} is not among the {len(known)} annotations")
        answers.append(Answer(identity, text_field(row, "response", where), {"nouns_file": nouns}))
    return items, answers


def _types(settings: Settings) -> tuple[str, ...]:
    asked = settings.get("evaluation_type", "a")
    if asked not in _TYPES:
        raise UserError(f"evaluation_type is {asked!r}; there are {', '.join(_TYPES)}")
    return _TYPES[asked]


# Scores.


class _Counters(dict[str, float]):
    """Sums that start at 0.001 where they divide (`metrics.txt`), added in the order of the answers."""

    def __missing__(self, name: str) -> float:
        return 0.001 if name.endswith("num") else 0.0

    def over(self, part: str, whole: str, groups: Iterable[str] = ("",)) -> float:
        return sum(self[group + part] for group in groups) / sum(self[group + whole] for group in groups)


def _printed(counters: _Counters, groups: tuple[str, ...], more: float) -> dict[str, float]:
    groups = tuple(f"{group} " for group in groups)
    accuracy = round(counters.over("right", "num", groups) * 100, 1)
    precision = round(counters.over("no hits", "said no num", groups) * 100, 1)
    recall = round(counters.over("no hits", "no num", groups) * 100, 1)
    p, r = precision / 100, recall / 100
    return {
        "Accuracy": accuracy,
        "Precision": precision,
        "Recall": recall,
        "F1": round(2 * p * r / (p + r + more) * 100, 1),
    }


def _yes_no(reading: str, truth: str) -> dict[str, float]:
    """What one yes/no answer adds."""
    return {
        "num": 1,
        "right": reading == truth,
        "no num": truth == yesno.NO,
        "said no num": reading == yesno.NO,
        "no hits": reading == truth == yesno.NO,
    }


_YES_NO = tuple(_yes_no("yes", "yes"))
_DESCRIPTION = ("hallucinated", "nouns", "covered", "truth", "marked", "hallu", "clean", "descriptions")
_ALL = ("all", *dict.fromkeys(_GROUPS.values()))


def figures(totals: Totals) -> dict[str, np.ndarray]:
    """In percent, without the 0.001s: CHAIR, Cover, Hal, Cog, AMBER; accuracy .. F1 of all questions, of each group."""
    found = {
        "CHAIR": 100 * ratio(totals["hallucinated"], totals["nouns"]),
        "Cover": 100 * ratio(totals["covered"], totals["truth"]),
        "Hal": 100 - 100 * ratio(totals["clean"], totals["descriptions"]),
        "Cog": 100 * ratio(totals["marked"], totals["hallu"]),
    }
    for name, groups in {group: (group,) for group in _ALL}.items() | {("attribute", _ATTRIBUTES)}:
        sums = {count: np.sum([totals[f"{group} {count}"] for group in groups], axis=0) for count in _YES_NO}
        prefix = "" if name == "all" else f"{name}/"
        found[f"{prefix}Accuracy"] = 100 * ratio(sums["right"], sums["num"])
        found[f"{prefix}Precision"] = 100 * ratio(sums["no hits"], sums["said no num"])
        found[f"{prefix}Recall"] = 100 * ratio(sums["no hits"], sums["no num"])
        found[f"{prefix}F1"] = 100 * ratio(2 * sums["no hits"], sums["said no num"] + sums["no num"])
    return found | {"AMBER": (100 - found["CHAIR"] + found["F1"]) / 2}


def score(items: list[Item], answers: list[Answer], replies: Replies | None, parser: str, settings: Settings) -> Score:
    """Official figures of the parts that have answers; the parser decides what yes/no answers are taken for.

    Raises:
        UserError: descriptions are to be scored, and their words cannot be (a file or a package is missing).
    """
    types = _types(settings)
    known = {item.id: item for item in items}
    answers = [a for a in answers if _asked(known[a.id].part, types)]
    counters, rows = _Counters(), []
    outcomes: dict[str, float] = {}
    readings: dict[str, str] = {}
    reader: NounReader | None = None
    for answer in answers:
        item = known[answer.id]
        if item.part == _GENERATIVE:
            reader = reader or NounReader.of(item.fields["lexicon"], answer.fields.get("nouns_file"), settings)
            nouns = judge_nouns(reader.kept(answer), item.truth, item.fields["hallu"], reader, f"item {item.id}")
            added, fields = nouns.counts(), nouns.counts()
            outcomes[item.id], readings[item.id] = added["clean"], nouns.reading()
            for official, count in _OFFICIAL_COUNTS:
                counters[official] += added[count]
        else:
            exact, reading = (_yes_no(rule(answer.text), item.truth) for rule in (_RULES["official"], _RULES[parser]))
            for group in ("all", item.part):
                for name, value in exact.items():
                    counters[f"{group} {name}"] += value
            fields = {f"{group} {name}": value for group in ("all", item.part) for name, value in reading.items()}
            outcomes[item.id] = float(reading["right"])
            readings[item.id] = _RULES[parser](answer.text)
        rows.append((item.cluster, fields))
    names = (*_DESCRIPTION, *(f"{group} {name}" for group in _ALL for name in _YES_NO))
    if reader is not None and "record" in settings:
        reader.record(Path(settings["record"]))
    counts = _count(items, answers, known, parser, types)
    return Score(
        _official(counters, types), Sums.of(rows, names, figures), outcomes, readings, counts, _notes(counts, reader)
    )


_OFFICIAL_COUNTS = (
    ("hallucinated", "hallucinated"),
    ("nouns num", "nouns"),
    ("covered", "covered"),
    ("truth num", "truth"),
    ("marked", "marked"),
    ("hallu num", "hallu"),
    ("clean", "clean"),
    ("descriptions num", "descriptions"),
)


def _asked(part: str, types: tuple[str, ...]) -> bool:
    kind = {_GENERATIVE: "g", "existence": "de", "relation": "dr"}.get(part, "da")
    return kind in types


def _official(counters: _Counters, types: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """What is printed for the types that are asked for, where there are answers."""
    found: dict[str, dict[str, float]] = {}
    if "g" in types and "descriptions num" in counters:
        found["Generative Task"] = {
            "CHAIR": round(counters.over("hallucinated", "nouns num") * 100, 1),
            "Cover": round(counters.over("covered", "truth num") * 100, 1),
            "Hal": round(100 - counters.over("clean", "descriptions num") * 100, 1),
            "Cog": round(counters.over("marked", "hallu num") * 100, 1),
        }
    for name, (kind, groups, more) in _PRINTED.items():
        if kind in types and any(f"{group} num" in counters for group in groups):
            found[name] = _printed(counters, groups, more)
    return found


def _count(
    items: list[Item], answers: list[Answer], known: Mapping[str, Item], parser: str, types: tuple[str, ...]
) -> dict[str, int]:
    times = Counter(answer.id for answer in answers)
    yes_no = [answer for answer in answers if known[answer.id].part != _GENERATIVE]
    parts = {known[answer.id].part for answer in answers}
    return {
        "answers": len(answers),
        "descriptions": len(answers) - len(yes_no),
        "yes/no answers": len(yes_no),
        "not exactly Yes or No": sum(yesno.amber_official(answer.text) == yesno.OTHER for answer in yes_no),
        "undecided": sum(_RULES[parser](answer.text) not in (yesno.YES, yesno.NO) for answer in yes_no),
        "repeated": len(answers) - len(times),
        "missing": sum(item.id not in times for item in items if item.part in parts),
        "items of parts without answers": sum(item.part not in parts for item in items if _asked(item.part, types)),
    }


def _notes(counts: Mapping[str, int], reader: NounReader | None) -> list[str]:
    notes = [] if reader is None else reader.notes()
    if counts["not exactly Yes or No"]:
        notes.append(
            f"{counts['not exactly Yes or No']} of {counts['yes/no answers']} yes/no answers are not exactly Yes or "
            "No: the official rule has them wrong; the parsers lmms-eval and vlmevalkit read them"
        )
    if counts["missing"]:
        notes.append(
            f"{counts['missing']} items of the parts that were answered have no answer; officially they do not count"
        )
    if counts["repeated"]:
        notes.append(f"{counts['repeated']} answers have an id that came before; each counts")
    if counts["items of parts without answers"]:
        notes.append("parts without any answer are left out")
    return notes
