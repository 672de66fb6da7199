"""VALOR-Eval (Qiu et al. 2024, arXiv:2404.13874): faithfulness and coverage of five kinds of description.

Files, stop lists and scorers as in haoyiq114/VALOR (`human_annotation/`, `evaluation/`). A judge is asked twice an
image: what a caption says, then what of it matches the annotation. Its prompts here are ours, and so are those of the
captions unless the folder has the repository's `generation/`. `rules/valor_parts.py` says what `fixed` mends.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import (
    About,
    Answer,
    Decoding,
    Dialogue,
    Figure,
    Item,
    Replies,
    Score,
    Settings,
)
from silkie_jax.evaluation.rules.judged import failure_notes, switch
from silkie_jax.evaluation.rules.sums import Sums, Totals, ratio
from silkie_jax.evaluation.rules.valor_parts import COUNTS, PARTS, Tally, attribute_object_without_postprocess
from silkie_jax.evaluation.rules.valor_rows import (
    SHAPES,
    check_row,
    check_truth,
    clean_features,
    dialogue,
    follow,
    named_part,
    part_of,
    read_features,
    strangers,
)
from silkie_jax.evaluation.running.files import FilePicture, field, read_json, read_text
from silkie_jax.evaluation.running.records import Record, id_field, read_records, text_field
from silkie_jax.evaluation.running.shapes import an_object

ABOUT = About(
    title="VALOR-Eval",
    data="human_annotation/ of the repository: object_existence.jsonl, attribute_object.json, attribute_people.json, "
    "relation_positional.json, relation_comparative.json; images by id in images/ (for answers only)",
    figures=tuple(Figure(f"{part}/{name}", 100.0) for part in PARTS for name in ("faithfulness", "coverage")),
    decoding=Decoding(512),
    prompts={
        "own": "our words for each part",
        "official": "generation/{part}.txt of the repository, beside or above the annotations",
    },
    parsers=("official", "fixed"),
    judge="gpt-4",
    settings={"fixed_stop_list": "true: features are dropped by the stop list with its missing comma, before matching"},
    answers_hold_data=True,
)

_PROMPTS = {
    "object_existence": "Describe this image in detail.",
    "attribute_object": "Describe every object in this image from left to right, with its color or material.",
    "attribute_people": "Describe each person in this image from left to right: what kind of person it is, what the "
    "person wears with its colors, and what the person does.",
    "relation_positional": "Describe where the objects in this image are: in relation to each other and in the image.",
    "relation_comparative": "Rank the objects in this image by the size that they take up, from largest to smallest.",
}
_CAPTIONS = "generated_caption"


# Files.


def items(data: Path, settings: Settings) -> list[Item]:
    """Images of the parts whose annotations are there; of matched files, which hold them, the images in those.

    Raises:
        UserError: there are none, or a file is not of the form.
    """
    found: list[Item] = []
    for folder in (data, data / "human_annotation"):
        for part in PARTS:
            file = next((f for f in (folder / f"{part}.jsonl", folder / f"{part}.json") if f.is_file()), None)
            if file is not None:
                found += [_item(part, image, truth, data) for image, truth in _annotations(part, file).items()]
    if not found and data.exists():
        found = [_item(row.part, row.image, row.truth, data) for row in _rows(data) if row.matched is not None]
    if not found:
        raise UserError(f"{data}: no annotations of VALOR-Eval: {ABOUT.data}")
    return found


def _annotations(part: str, file: Path) -> dict[str, Any]:
    """Image -> ground truth."""
    if file.suffix == ".json":
        whole = an_object(read_json(file, unique=True), str(file))
        return {image: check_truth(part, truth, f"{file}: {image!r}") for image, truth in whole.items()}
    found: dict[str, Any] = {}
    for where, record in read_records(file):
        image = id_field(record, "image_id", where)
        if image in found:
            raise UserError(f"{where}: image {image} is there twice: remove one")
        found[image] = check_truth(part, field(record, "gt_objects", where), f"{where}: gt_objects")
    return found


def _item(part: str, image: str, truth: Any, data: Path) -> Item:
    folders = (data / "images" / part, data / "images", data / part, data)
    places = tuple(folder / f"{image}{ending}" for folder in folders for ending in (".jpg", ".jpeg", ".png"))
    official = next((f for base in (data, data.parent) if (f := base / "generation" / f"{part}.txt").is_file()), None)
    picture = FilePicture(image, places, "from Visual Genome, or as datasets/ of the repository says")
    fields = {"image": image, "official_prompt": official}
    return Item(f"{part}/{image}", _PROMPTS[part], (picture,), truth, part, fields=fields)


def prompt(item: Item, style: str) -> str:
    """What the part asks for.

    Raises:
        UserError: `official`, and the repository's prompt is not there.
    """
    if style != "official":
        return item.question
    if item.fields["official_prompt"] is None:
        raise UserError(
            f"no generation/{item.part}.txt beside the annotations: copy it from the repository, or use own"
        )
    return read_text(item.fields["official_prompt"]).strip()


class _Row:
    """An image's row in a results file, of one of three kinds: matched, extracted, or the caption alone."""

    def __init__(self, part: str, image: str, where: str, caption: str) -> None:
        self.part, self.image, self.where, self.caption = part, image, where, caption
        self.matched: dict[str, Any] | None = None
        self.features: Any = None

    @property
    def truth(self) -> Any:
        return None if self.matched is None else self.matched[SHAPES[self.part].truth]


def _rows(path: Path) -> list[_Row]:
    """The rows of a file, or of the files in a folder that are of a part.

    Raises:
        UserError: a file is of no known form, or has an image twice.
    """
    files = sorted(f for f in path.iterdir() if _is_results(f)) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no *.matched.jsonl, *.extracted.jsonl or captions in it whose name has a part's")
    rows: dict[tuple[str, str], _Row] = {}
    for file in files:
        for row in _file_rows(file):
            before = rows.get((row.part, row.image))
            # A part's extracted features may lie beside what was matched of them.
            if before is not None and (before.matched is None) == (row.matched is None):
                raise UserError(f"{row.where}: image {row.image} of {row.part} is there twice: remove one")
            if before is None or before.matched is None:
                rows[row.part, row.image] = row
    return list(rows.values())


def _is_results(file: Path) -> bool:
    named = file.suffix == ".json" and named_part(file.name) is not None
    return file.is_file() and (named or file.suffix == ".jsonl")


def _file_rows(file: Path) -> list[_Row]:
    text = read_text(file).lstrip()
    if file.suffix == ".json" and text.startswith("{"):
        whole = an_object(read_json(file, unique=True), str(file))
        if not (whole and all(isinstance(entry, dict) for entry in whole.values())):
            raise UserError(f"{file}: expected {{image: {{{_CAPTIONS}: text}}}} or JSON lines of images")
        named = _need_part(named_part(file.name), str(file))
        entries = [(image, f"{file}: {image!r}", entry) for image, entry in whole.items()]
        return [_Row(named, image, where, text_field(entry, _CAPTIONS, where)) for image, where, entry in entries]
    records = read_records(file)
    found = next((part for _, record in records if (part := part_of(record, file.name))), named_part(file.name))
    return [_row(_need_part(found, str(file)), record) for record in records]


def _need_part(part: str | None, where: str) -> str:
    if part is None:
        raise UserError(f"{where}: of which part? Name the file after one of {', '.join(PARTS)}")
    return part


def _row(part: str, record: Record) -> _Row:
    where, entry = record
    caption = next((entry[name] for name in ("caption", _CAPTIONS) if isinstance(entry.get(name), str)), "")
    row = _Row(part, id_field(entry, "image_id", where), where, caption)
    shape = SHAPES[part]
    if shape.matched in entry or "broader_concept" in entry:
        row.matched = check_row(part, entry, where)
    elif "response" in entry or shape.generated in entry or "objects" in entry:
        name = next(name for name in ("response", shape.generated, "objects") if name in entry)
        row.features = read_features(part, entry[name], f"{where}: {name}")
    elif not any(name in entry for name in ("caption", _CAPTIONS)):
        field(entry, shape.matched, where)
    return row


def read_answers(path: Path, items: list[Item] | None, settings: Settings) -> tuple[list[Item], list[Answer]]:
    """Matched rows, which hold their ground truth; extracted features; or captions {image: {generated_caption}}.

    A part is known by what rows hold, else by the name of the file.

    Raises:
        UserError: a file is of no such form, or names an image whose ground truth is not known.
    """
    rows = _rows(path)
    known = {item.id: item for item in items or []}
    answers = []
    for row in rows:
        identity = f"{row.part}/{row.image}"
        if identity not in known:
            if row.matched is None or (items is not None and any(item.part == row.part for item in items)):
                hint = "; name them with --data" if items is None else ""
                raise UserError(f"{row.where}: the annotations of {row.part} have no image {row.image}{hint}")
            known[identity] = _item(row.part, row.image, row.truth, path if path.is_dir() else path.parent)
        answers.append(Answer(identity, row.caption, {"row": row.matched, "features": row.features}))
    return list(known.values()), answers


# The judge.


def _features(part: str, answer: Answer, fixed: bool) -> Any:
    features = answer.fields.get("features")
    return None if features is None else clean_features(part, features, fixed)


def dialogues(items: list[Item], answers: list[Answer], settings: Settings) -> dict[str, Dialogue]:
    """For each answer that was not matched; what was extracted is not asked for again."""
    fixed = switch(settings, "fixed_stop_list")
    known = {item.id: item for item in items}
    return {
        answer.id: dialogue(item.part, item.truth, answer.text, _features(item.part, answer, fixed), fixed)
        for answer in answers
        if answer.fields.get("row") is None and (item := known[answer.id])
    }


# Scores.


def figures(totals: Totals) -> dict[str, np.ndarray]:
    """Per part in percent: faithfulness and coverage of all items together (`_i`), and of whole images (`_s`)."""
    found = {}
    for part in PARTS:
        sums = {name: totals[f"{part}/{name}"] for name in COUNTS}
        found[f"{part}/faithfulness"] = 100 * ratio(sums["faithful"], sums["generated"])
        found[f"{part}/coverage"] = 100 * ratio(sums["covered"], sums["truth"])
        found[f"{part}/faithfulness_s"] = 100 * ratio(sums["all_faithful"], sums["images"])
        found[f"{part}/coverage_s"] = 100 * ratio(sums["all_covered"], sums["images"])
    return found


def score(items: list[Item], answers: list[Answer], replies: Replies | None, parser: str, settings: Settings) -> Score:
    """The parts that have rows: [faithfulness_s, faithfulness_i, coverage_s, coverage_i] as printed.

    Raises:
        UserError: there is neither a matched row nor a reply.
    """
    known = {item.id: item for item in items}
    rows, unread, without = _finished(known, answers, replies, switch(settings, "fixed_stop_list"))
    if not rows:
        raise UserError(
            "no image is matched yet: ask a judge (--judge), give its replies, or name *.matched.jsonl files"
        )
    official: dict[str, list[Tally]] = {}
    outcomes: dict[str, float] = {}
    readings: dict[str, str] = {}
    lines = []
    for identity, row in rows.items():
        part = known[identity].part
        official.setdefault(part, []).append(PARTS[part](row, False))
        if part == "attribute_object":
            official.setdefault(f"{part}_without_postprocess", []).append(attribute_object_without_postprocess(row))
        tally = PARTS[part](row, parser == "fixed")
        lines.append((known[identity].cluster, {f"{part}/{name}": value for name, value in tally.counts().items()}))
        if tally.generated:
            outcomes[identity] = tally.faithful / tally.generated
        readings[identity] = f"{tally.faithful} of {tally.generated} faithful, {tally.covered} of {tally.truth} covered"
    names = [f"{part}/{name}" for part in PARTS for name in COUNTS]
    printed = {part: _printed(tallies) for part, tallies in official.items()}
    parts = {known[answer.id].part for answer in answers}
    strange = sum(strangers(known[identity].part, row) for identity, row in rows.items())
    counts = {
        **{f"images of {part}": number for part, number in Counter(known[i].part for i in rows).items()},
        "replies not in form": unread,
        "no reply": without,
        "missing": len({item.id for item in items if item.part in parts} - {answer.id for answer in answers}),
        "matches outside the ground truth": strange,
    }
    return Score(printed, Sums.of(lines, names, figures), outcomes, readings, counts, _notes(counts, printed, replies))


def _finished(
    known: Mapping[str, Item], answers: Iterable[Answer], replies: Replies | None, fixed: bool
) -> tuple[dict[str, dict[str, Any]], int, int]:
    """Matched rows by item; how many images have replies that none could be made of, and how many have none."""
    said = replies.runs[0] if replies is not None and replies.runs else {}
    rows: dict[str, dict[str, Any]] = {}
    unread = without = 0
    for answer in answers:
        row, item = answer.fields.get("row"), known[answer.id]
        if row is None:
            texts = said.get(answer.id, ())
            row = follow(item.part, item.truth, answer.text, _features(item.part, answer, fixed), texts, fixed).row
            unread += row is None and bool(texts)
            without += row is None and not texts
        if row is not None:
            rows[answer.id] = row
    return rows, unread, without


def _printed(tallies: list[Tally]) -> list[float | None]:
    """The line that the official scorer prints; None where it divides by zero."""

    def share(part: str, whole: str | None) -> float | None:
        below = len(tallies) if whole is None else sum(getattr(tally, whole) for tally in tallies)
        return float(f"{sum(getattr(tally, part) for tally in tallies) / below * 100:.1f}") if below else None

    return [
        share("all_faithful", None),
        share("faithful", "generated"),
        share("all_covered", None),
        share("covered", "truth"),
    ]


def _notes(counts: Mapping[str, int], printed: Mapping[str, list[float | None]], replies: Replies | None) -> list[str]:
    notes = failure_notes(replies, counts["no reply"], "left out") if counts["no reply"] else []
    for part, (_, faithfulness, _, coverage) in printed.items():
        if faithfulness is None:
            notes.append(f"{part}: nothing was generated: faithfulness is undefined")
        if coverage is None:
            notes.append(f"{part}: the ground truth is empty: coverage is undefined")
    if counts["replies not in form"]:
        notes.append(f"{counts['replies not in form']} images have no reply of the form asked for and are left out")
    if counts["missing"]:
        notes.append(f"{counts['missing']} images of these parts have no answer and are left out, as officially")
    if counts["matches outside the ground truth"]:
        notes.append(
            f"{counts['matches outside the ground truth']} matches are with what is not in the ground truth: official "
            "counts them in object_existence and relation_positional, fixed does not"
        )
    if replies is not None and len(replies.runs) > 1:
        notes.append(f"figures are of the first of {len(replies.runs)} runs of the judge")
    return notes
