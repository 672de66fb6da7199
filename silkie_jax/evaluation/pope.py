"""POPE (Li et al. 2023, arXiv 2305.10355): is there such an object in the image? Scored as by its `evaluate.py`.

Source: RUCAIBox/POPE `evaluate.py`; `llava_last_line` is LLaVA's copy, `llava/eval/eval_pope.py`.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import About, Answer, Decoding, Figure, Item, Replies, Score, Settings
from silkie_jax.evaluation.rules import yesno
from silkie_jax.evaluation.rules.sums import Sums, Totals, ratio
from silkie_jax.evaluation.running.files import FilePicture
from silkie_jax.evaluation.running.records import Record, id_field, optional_text, read_records, text_field

SPLITS = ("random", "popular", "adversarial")

ABOUT = About(
    title="POPE",
    data="coco_pope_{random,popular,adversarial}.json in a folder, or one JSON-lines file {question_id, image, text, "
    "label, [category]}; images of COCO val2014 beside them or in val2014/",
    figures=(Figure("f1", 1.0), Figure("accuracy", 1.0)),
    decoding=Decoding(max_new_tokens=16),
    prompts={
        "official": "the question as it stands",
        "llava": 'with "Answer the question using a single word or phrase." after it; lmms-eval does the same',
    },
    parsers=("official", "vlmevalkit", "lmms-eval"),
)
_RULES: dict[str, Callable[[str], str]] = {
    "official": yesno.pope_official,
    "vlmevalkit": yesno.vlmevalkit,
    "lmms-eval": yesno.pope_lmms_eval,
}


def items(data: Path, settings: Settings) -> list[Item]:
    """The questions of a file, or of the splits in a folder.

    Raises:
        UserError: there is no such file, or a record is not of the form.
    """
    if not data.is_dir():
        return _items(data, "", data.parent)
    for folder in (data, data / "coco", data / "output" / "coco"):
        found = {split: folder / f"coco_pope_{split}.json" for split in SPLITS}
        if any(file.is_file() for file in found.values()):
            return [i for split, file in found.items() if file.is_file() for i in _items(file, split, data)]
    raise UserError(f"{data}: no coco_pope_random.json, _popular or _adversarial; name their folder or one file")


def _items(file: Path, split: str, base: Path) -> list[Item]:
    items: list[Item] = []
    seen: dict[str, int] = {}
    for where, record in read_records(file):
        number = id_field(record, "question_id", where) if "question_id" in record else str(len(items) + 1)
        part = split or optional_text(record, "category", where) or ""
        name = f"{part}/{number}" if part else number
        seen[name] = seen.get(name, 0) + 1
        image = optional_text(record, "image", where)
        places = () if image is None else (base / "val2014" / image, base / image, base / "images" / image)
        items.append(
            Item(
                name if seen[name] == 1 else f"{name}#{seen[name]}",
                optional_text(record, "text", where) or optional_text(record, "question", where) or "",
                () if image is None else (FilePicture(image, places, "from COCO's val2014.zip"),),
                text_field(record, "label", where),
                part,
                fields={"question_id": number},
            )
        )
    return items


def prompt(item: Item, style: str) -> str:
    """The question, with a style's end.

    Raises:
        UserError: the data holds no question, which only scoring can do without.
    """
    if not item.question:
        raise UserError(f"question {item.id}: the data holds no text of it")
    return item.question + ("" if style == "official" else "\nAnswer the question using a single word or phrase.")


def read_answers(path: Path, items: list[Item] | None, settings: Settings) -> tuple[list[Item], list[Answer]]:
    """Answers {question_id, answer}, or LLaVA's {question_id, text}; each goes to the label at its position.

    A folder holds a file for each split, whose name contains the split's. In one file of several splits an answer
    belongs to the split of its `category` or question id; else the splits follow each other in whichever order the
    questions agree.

    Raises:
        UserError: there is no data, or a record is not of the form.
    """
    if items is None:
        raise UserError(f"{path}: POPE's answers do not hold the labels; name them with --data")
    splits: dict[str, list[Item]] = {}
    for item in items:
        splits.setdefault(item.part, []).append(item)
    if path.is_dir():
        sorted_records = {split: read_records(_file_of(path, split)) for split in splits}
    else:
        sorted_records = _by_split(read_records(path), splits, items)
    answers = []
    for split, records in sorted_records.items():
        for k, (where, record) in enumerate(records):
            number = id_field(record, "question_id", where) if "question_id" in record else None
            fields = {"part": split, "question_id": number, "question": _question(record)}
            at = splits[split][k].id if k < len(splits[split]) else f"{split or 'answer'} beyond the labels, {k + 1}"
            answers.append(Answer(at, _text(record, where), fields))
    return items, answers


def _file_of(folder: Path, split: str) -> Path:
    files = sorted(file for file in folder.iterdir() if file.is_file() and split in file.name)
    if len(files) != 1 or not split:
        found = "no file" if not files else f"{len(files)} files"
        raise UserError(f"{folder}: {found} with {split!r} in the name; expected one for each split, or name one file")
    return files[0]


def _text(record: dict[str, Any], where: str) -> str:
    if "answer" not in record and "label" in record:
        raise UserError(f"{where}: has a label and no answer; ANSWERS must be the answers, --data the labels")
    return text_field(record, "answer" if "answer" in record or "text" not in record else "text", where)


def _question(record: dict[str, Any]) -> str:
    return str(record.get("question") or record.get("prompt") or "")


def _by_split(records: list[Record], splits: Mapping[str, list[Item]], items: list[Item]) -> dict[str, list[Record]]:
    """The records of each split, in order."""
    if len(splits) == 1:
        return dict.fromkeys(splits, records)
    known: dict[str, str | None] = {}
    for item in items:  # None: an id that several splits have says nothing
        number = item.fields["question_id"]
        known[number] = item.part if known.get(number, item.part) == item.part else None
    parts = [
        str(record["category"]) if str(record.get("category")) in splits else known.get(str(record.get("question_id")))
        for _, record in records
    ]
    if None in parts:
        orders: Iterable[list[Item]] = (
            [item for split in order for item in splits[split]] for order in itertools.permutations(splits)
        )
        agreeing = (order for order in itertools.chain([items], orders) if _agree(records, order))
        parts = [item.part for item in next(agreeing, items)]
        parts += parts[-1:] * (len(records) - len(parts))
    found: dict[str, list[Record]] = {split: [] for split in splits}
    for part, record in zip(parts, records, strict=False):
        found[str(part)].append(record)
    return found


def _agree(records: list[Record], items: list[Item]) -> bool:
    return all(item.question in _question(record) for (_, record), item in zip(records, items, strict=False))


def score(items: list[Item], answers: list[Answer], replies: Replies | None, parser: str, settings: Settings) -> Score:
    """Counts of yes and no by split, F1 with yes as positive; the headline figures are means over the splits.

    `official` pairs answers and labels by position, the harnesses' parsers by question id. Under vlmevalkit an answer
    that is neither counts as no in precision, recall and F1; under lmms-eval it is in none of the three; in both it is
    wrong.
    """
    splits = list(dict.fromkeys(item.part for item in items))
    by_id = {item.id: item for item in items}
    by_number = {(item.part, item.fields.get("question_id")): item for item in reversed(items)}
    notes = _doubts(answers, by_id)
    rows, outcomes, readings = [], {}, {}
    undecided = beyond = 0
    for answer in answers:
        item = by_id.get(answer.id)
        if parser != "official" and answer.fields.get("question_id") is not None:
            item = by_number.get((answer.fields["part"], answer.fields["question_id"]))
        part = item.part if item else answer.fields.get("part", "")
        reading = _RULES[parser](answer.text)
        undecided += reading not in (yesno.YES, yesno.NO)
        counts = {"answers": 1.0, "yes": float(reading == yesno.YES)}
        if item is None:
            beyond += 1
        else:
            truth = _truth(item)
            cell = yesno.confusion(yesno.NO if reading == yesno.UNKNOWN else reading, truth)
            counts |= {"n": 1.0, "right": float(reading == truth)} | ({cell: 1.0} if cell else {})
            outcomes[item.id] = float(reading == truth)
            readings[item.id] = reading
        rows.append((item.cluster if item else answer.id, {f"{name}/{part}": v for name, v in counts.items()}))
    missing = len(items) - len(outcomes)
    if missing:
        notes.append(f"{missing} of {len(items)} questions have no answer; they are in no figure, as officially.")
    if beyond:
        notes.append(f"{beyond} answers have no label; they count in the yes ratio only, as officially.")
    if undecided:
        notes.append(f"{undecided} of {len(answers)} answers are neither yes nor no under {parser}.")
    official = {split: _official([a for a in answers if _part(a, by_id) == split], by_id) for split in splits}
    for split, figures in official.items():
        if not figures["TP"] + figures["FP"]:
            name = f"{split}: " if split else ""
            notes.append(f"{name}no answer is yes: precision and F1 are 0 (the official tool stops there).")
    mean = {"mean_f1_score": sum(figures["f1_score"] for figures in official.values()) / max(len(official), 1)}
    names = [f"{name}/{split}" for split in splits for name in ("answers", "yes", "n", "right", *yesno.CONFUSION)]
    return Score(
        official=official[splits[0]] if len(splits) == 1 else {**official, **mean},
        sums=Sums.of(rows, names, lambda sums: _figures(sums, splits)),
        outcomes=outcomes,
        readings=readings,
        counts={
            "rows": len(items),
            "answers": len(answers),
            "undecided": undecided,
            "missing": missing,
            "without a label": beyond,
        },
        notes=notes,
    )


def _truth(item: Item) -> str:
    """Only "no" is no, officially: "No" is yes."""
    return yesno.NO if item.truth == "no" else yesno.YES


def _part(answer: Answer, by_id: Mapping[str, Item]) -> str:
    return by_id[answer.id].part if answer.id in by_id else answer.fields.get("part", "")


def _doubts(answers: list[Answer], by_id: Mapping[str, Item]) -> list[str]:
    """What suggests that answers and labels do not belong together."""
    notes = []
    pairs = [(answer, by_id[answer.id]) for answer in answers if answer.id in by_id]
    numbers = sum(a.fields.get("question_id") not in (None, i.fields["question_id"]) for a, i in pairs)
    if numbers:
        notes.append(f"{numbers} answers have another question id than the label at their position, which decides.")
    questions = sum(
        bool(a.fields.get("question")) and not a.fields["question"].startswith(i.question) for a, i in pairs
    )
    if questions:
        notes.append(f"{questions} answers are to another question than the label at their position has.")
    odd = sum(item.truth not in (yesno.YES, yesno.NO) for item in by_id.values())
    if odd:
        notes.append(f"{odd} labels are neither yes nor no; officially they are yes.")
    return notes


def _official(answers: list[Answer], by_id: Mapping[str, Item]) -> dict[str, Any]:
    """The tool's figures by its own float operations; 0 where it would divide by zero."""
    counts = dict.fromkeys(yesno.CONFUSION, 0)
    said_yes = 0
    for answer in answers:
        reading = yesno.pope_official(answer.text)
        said_yes += reading == yesno.YES
        if answer.id in by_id:
            cell = yesno.confusion(reading, _truth(by_id[answer.id]))
            counts[str(cell)] += 1
    tp, fp, tn, fn = counts.values()
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    figures = {
        "accuracy": (tp + tn) / max(tp + tn + fp + fn, 1),
        "precision": precision,
        "recall": recall,
        "f1_score": 2 * precision * recall / (precision + recall) if tp else 0.0,
        "yes_ratio": said_yes / max(len(answers), 1),
    }
    order = ("f1_score", "accuracy", "precision", "recall", "yes_ratio")
    return {**counts, **figures, "llava_last_line": ", ".join(f"{figures[name]:.3f}" for name in order)}


def _figures(sums: Totals, splits: list[str]) -> dict[str, Any]:
    names = ("n", "right", "answers", "yes", *yesno.CONFUSION)
    parts = {}
    for split in splits:
        counts = {name: sums[f"{name}/{split}"] for name in names}
        parts[split] = {
            "accuracy": ratio(counts["right"], counts["n"]),
            **yesno.confusion_figures(counts),
            "yes_ratio": ratio(counts["yes"], counts["answers"]),
        }
    means = {name: np.mean([part[name] for part in parts.values()], axis=0) for name in next(iter(parts.values()))}
    if len(splits) == 1:
        return means
    return means | {f"{split}/{name}": value for split, part in parts.items() for name, value in part.items()}
