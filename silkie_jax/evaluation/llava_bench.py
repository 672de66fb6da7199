"""LLaVA-Bench in the wild (Liu et al. 2023, arXiv 2304.08485): a judge scores a reference and the model's answer.

Files and rules as in LLaVA, `llava/eval/eval_gpt_review_bench.py` and `summarize_gpt_review.py`. The official script
pairs its files by position; here they are paired by question, and an order of another kind is said.

Annotations in alpaca_eval's form (a JSON list with `preference` 1 or 2, 0 for a draw, null for none) give the win rate
of the second output instead.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import (
    About,
    Answer,
    Ask,
    Decoding,
    Dialogue,
    Figure,
    Item,
    Replies,
    Score,
    Settings,
)
from silkie_jax.evaluation.prompts import judge_prompt
from silkie_jax.evaluation.rules.judged import failure_notes, named, needed, one_reply
from silkie_jax.evaluation.rules.ratings import llava_pair, llava_pair_lmms_eval
from silkie_jax.evaluation.rules.sums import Sums, Totals, ratio
from silkie_jax.evaluation.running.files import FilePicture, field
from silkie_jax.evaluation.running.records import Record, id_field, read_records, text_field

CATEGORIES = ("conv", "detail", "complex")
RULES = {"official": llava_pair, "vlmevalkit": llava_pair, "lmms-eval": llava_pair_lmms_eval}
UNREAD = (-1.0, -1.0)
"""What an unreadable reply counts as; officially it is averaged in."""
_PREFIX = "llava_bench_"
_SYSTEM = "You are a careful and precise assistant who checks the quality of answers."

ABOUT = About(
    title="LLaVA-Bench (in the wild)",
    data="questions.jsonl, context.jsonl, answers_gpt4.jsonl and images/ of liuhaotian/llava-bench-in-the-wild",
    figures=(Figure("ratio", 100),),
    decoding=Decoding(1024),
    prompts={"official": "the question alone"},
    parsers=tuple(RULES),
    judge="gpt-4-0314",
    answers_hold_data=True,
)


def items(data: Path, settings: Settings) -> list[Item]:
    """The questions with the captions of their images and the reference answers.

    Raises:
        UserError: a file is missing, a category unknown, or a question has no context or reference.
    """
    if not data.is_dir():
        raise UserError(f"{data}: name the folder with questions.jsonl, context.jsonl and answers_gpt4.jsonl")
    # The questions first: an unknown category is found before anything is asked for or paid.
    questions = list(_questions(data / "questions.jsonl"))
    contexts = _contexts(data / "context.jsonl")
    # The file of the reference answers has a longer name in some copies.
    reference = data / "answers_gpt4.jsonl"
    if not reference.exists():
        reference = next(iter(sorted(data.glob("answers_gpt4*.jsonl"))), reference)
    texts = _texts(read_records(reference))
    made = []
    for where, id, image, text, category in questions:
        if image not in contexts:
            raise UserError(f"{where}: context.jsonl has no line for the image {image!r}")
        if id not in texts:
            raise UserError(f"{where}: {reference.name} has no answer to question {id}")
        places = (data / "images" / image, data / image)
        picture = FilePicture(image, places, "images/ of liuhaotian/llava-bench-in-the-wild")
        made.append(Item(id, text, (picture,), texts[id][0], category, fields={"context": contexts[image]}))
    return made


def _questions(path: Path) -> Iterator[tuple[str, str, str, str, str]]:
    """(where, id, image, question, category) of every line."""
    seen: set[str] = set()
    for where, record in read_records(path):
        id, category = id_field(record, "question_id", where), text_field(record, "category", where)
        if category.removeprefix(_PREFIX) not in CATEGORIES:
            raise UserError(f"{where}: unknown category {category!r}; there are {', '.join(CATEGORIES)}")
        if id in seen:
            raise UserError(f"{where}: question {id} was there before: remove one")
        seen.add(id)
        image, text = text_field(record, "image", where), text_field(record, "text", where)
        yield where, id, image, text, category.removeprefix(_PREFIX)


def _contexts(path: Path) -> dict[str, str]:
    """Image -> what stands for it before the judge."""
    contexts = {}
    for where, record in read_records(path):
        caption = record.get("caption")
        lines = [caption] if isinstance(caption, str) else caption
        if not isinstance(lines, list) or not all(isinstance(text, str) for text in lines):
            raise UserError(f"{where}: 'caption' must be a text or a list of texts")
        contexts[text_field(record, "image", where)] = "\n".join(lines)
    return contexts


def _texts(records: list[Record]) -> dict[str, tuple[str, str]]:
    """Question -> text, and where it stands."""
    texts: dict[str, tuple[str, str]] = {}
    for where, record in records:
        id = id_field(record, "question_id", where)
        if id in texts:
            raise UserError(f"{where}: question {id} was answered before: remove one")
        texts[id] = text_field(record, "text", where), where
    return texts


def prompt(item: Item, style: str) -> str:
    return item.question


def read_answers(path: Path, items: list[Item] | None, settings: Settings) -> tuple[list[Item], list[Answer]]:
    """{question_id, text} a line; or saved reviews, or annotations with preferences, which need no data.

    Raises:
        UserError: an answer is missing, unknown, there twice or no text.
    """
    records = read_records(path)
    first = records[0][1]
    if "preference" in first:
        return _read_preferences(records)
    if "content" in first or "tuple" in first:
        return _read_reviews(path, records, items)
    if items is None:
        raise UserError(f"{path}: these answers hold no questions: name the folder of the data with --data")
    texts = _texts(records)
    known = {item.id for item in items}
    if unknown := [id for id in texts if id not in known]:
        raise UserError(f"{texts[unknown[0]][1]}: the data has no question {unknown[0]}")
    if missing := [item.id for item in items if item.id not in texts]:
        raise UserError(f"{path}: no answer to question {named(missing)}: every question needs one")
    moved = list(texts) != [item.id for item in items]
    return items, [Answer(item.id, texts[item.id][0], {"moved": True} if moved else {}) for item in items]


def _read_reviews(path: Path, records: list[Record], items: list[Item] | None) -> tuple[list[Item], list[Answer]]:
    parts: dict[str, str] = {}
    answers = []
    for where, record in records:
        id = id_field(record, "question_id", where)
        if id in parts:
            raise UserError(f"{where}: question {id} was reviewed before: remove one")
        fields: dict[str, Any] = {}
        if "content" in record:
            fields["reply"] = text_field(record, "content", where)
        pair = record.get("tuple", record.get("score"))
        if pair is not None:
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(x, int | float) for x in pair):
                raise UserError(f"{where}: 'tuple' must be a list of two numbers")
            fields["pair"] = (float(pair[0]), float(pair[1]))
        if not fields:
            raise UserError(f"{where}: neither 'content' nor 'tuple': no review")
        parts[id] = str(record.get("category", "")).removeprefix(_PREFIX)
        answers.append(Answer(id, "", fields))
    if items is not None:
        if unknown := [id for id in parts if id not in {item.id for item in items}]:
            raise UserError(f"{path}: the data has no question {named(unknown)}")
        if missing := [item.id for item in items if item.id not in parts]:
            raise UserError(f"{path}: no review of question {named(missing)}")
        return items, answers
    return [Item(id=id, question="", part=part) for id, part in parts.items()], answers


def _read_preferences(records: list[Record]) -> tuple[list[Item], list[Answer]]:
    made, answers = [], []
    for n, (where, record) in enumerate(records):
        preference = field(record, "preference", where)
        number = isinstance(preference, int | float) and not isinstance(preference, bool)
        if preference is not None and not (number and (preference == 0 or 1 <= preference <= 2)):
            raise UserError(f"{where}: 'preference' must be from 1 to 2, 0 or null, not {preference!r}")
        made.append(Item(id=str(n), question=str(record.get("instruction", "")), part="preference"))
        answers.append(Answer(str(n), str(record.get("output_2", "")), {"preference": preference}))
    return made, answers


def official_replies(raw: Any, items: list[Item], answers: list[Answer]) -> dict[str, str] | None:
    """The replies in saved reviews, lines of {question_id, content}; None for another form."""
    if not isinstance(raw, list) or not all(isinstance(r, dict) and "content" in r for r in raw):
        return None
    texts = {}
    for n, record in enumerate(raw):
        id = id_field(record, "question_id", f"review {n + 1}")
        if id in texts:
            raise UserError(f"review {n + 1}: question {id} was reviewed before")
        texts[id] = text_field(record, "content", f"review {n + 1}")
    return texts


def dialogues(items: list[Item], answers: list[Answer], settings: Settings) -> dict[str, Dialogue]:
    """One request a question; none where the reviews came with the answers."""
    by_id = {item.id: item for item in items}

    def ask(answer: Answer) -> Ask:
        item = by_id[answer.id]
        values = {"context": item.fields["context"], "question": item.question, "reference": item.truth}
        return Ask(judge_prompt("llava_bench", **values, answer=answer.text), _SYSTEM, 0.2, 1024)

    return {answer.id: one_reply(partial(ask, answer)) for answer in answers if not answer.fields.keys() & _REVIEWED}


_REVIEWED = {"reply", "pair", "preference"}


def score(items: list[Item], answers: list[Answer], replies: Replies | None, parser: str, settings: Settings) -> Score:
    """Mean scores of reference and model, and their ratio in percent; failures count -1 and -1, as officially.

    Raises:
        UserError: there are no replies.
    """
    if any("preference" in answer.fields for answer in answers):
        return _win_rate(answers)
    if not all(answer.fields.keys() & _REVIEWED for answer in answers):
        replies = needed(replies, ABOUT.title)
    said = replies.runs[0] if replies else {}
    by_id = {item.id: item for item in items}
    official, chosen, readings = {}, {}, {}
    unread = without = 0
    for answer in answers:
        texts = said.get(answer.id) or ([answer.fields["reply"]] if "reply" in answer.fields else None)
        stored = answer.fields.get("pair")
        official[answer.id] = stored or (llava_pair(texts[-1]) if texts else None) or UNREAD
        pair = RULES[parser](texts[-1]) if texts else stored
        without += texts is None and stored is None
        unread += texts is not None and pair is None
        if texts is not None or stored is not None:
            chosen[answer.id] = pair or UNREAD
        readings[answer.id] = f"{pair[0]:g} {pair[1]:g}" if pair else "no scores" if texts else "no reply"
    groups: dict[str, list[tuple[float, float]]] = {}
    for id, pair in official.items():
        for group in ("all", *([_PREFIX + by_id[id].part] if by_id[id].part else [])):
            groups.setdefault(group, []).append(pair)
    notes = failure_notes(replies, without, "-1 and -1")
    if unread:
        notes.append(f"{unread} replies hold no two scores and count -1 and -1, as officially")
    if any("moved" in answer.fields for answer in answers):
        notes.append("the answers lie in another order than the questions; the official script would mix them up")
    figures = {group: _summary(groups[group]) for group in sorted(groups)}
    if any(row[0] is None for row in figures.values()):
        notes.append("a ratio is undefined: the mean of the reference's scores is 0")
    counts = {"items": len(items), "scored": len(chosen) - unread, "no scores": unread, "no reply": without}
    outcomes = {id: pair[1] for id, pair in chosen.items() if all(map(math.isfinite, pair))}
    if odd := len(chosen) - len(outcomes):
        counts["not a number"] = odd
        notes.append(f"{odd} replies hold nan or inf, which the official script takes: means are so too")
    return Score(dict(figures), _sums(by_id, chosen), outcomes, readings, counts, notes)


def _summary(pairs: Sequence[tuple[float, float]]) -> list[float | None]:
    """[ratio, reference x 10, model x 10] as `summarize_gpt_review.py` rounds them."""
    reference, model = (round(mean, 3) for mean in np.asarray(pairs).mean(0).tolist())
    return [round(model / reference * 100, 1) if reference else None, round(reference * 10, 1), round(model * 10, 1)]


def _sums(by_id: Mapping[str, Item], pairs: Mapping[str, tuple[float, float]]) -> Sums:
    rows = []
    for id, (reference, model) in pairs.items():
        values = {"reference": reference, "model": model, "n": 1.0}
        part = by_id[id].part
        rows.append((by_id[id].cluster, {**values, **({f"{part}/{k}": v for k, v in values.items()} if part else {})}))
    prefixes = ["", *(f"{part}/" for part in dict.fromkeys(item.part for item in by_id.values()) if part)]

    def formula(totals: Totals) -> dict[str, np.ndarray]:
        figures = {}
        for prefix in prefixes:
            reference, model, n = (totals[prefix + name] for name in ("reference", "model", "n"))
            figures[f"{prefix}ratio"] = 100 * ratio(model, reference)
            figures[f"{prefix}reference"] = 10 * ratio(reference, n)
            figures[f"{prefix}model"] = 10 * ratio(model, n)
        return figures

    return Sums.of(rows, [p + name for p in prefixes for name in ("reference", "model", "n")], formula)


def _win_rate(answers: Sequence[Answer]) -> Score:
    """Of the second output: 2 is won, 1 lost, 0 a draw; between 1 and 2 a share; null is left out."""
    given = {answer.id: answer.fields["preference"] for answer in answers}
    won = {id: 0.5 if value == 0 else value - 1.0 for id, value in given.items() if value is not None}
    official = {"win_rate": sum(won.values()) / len(won) if won else None, "annotations": len(won)}
    counts = {"items": len(given), "compared": len(won), "left out": len(given) - len(won)}
    rows = [(id, {"won": value, "n": 1.0}) for id, value in won.items()]
    sums = Sums.of(rows, ("won", "n"), lambda totals: {"win_rate": ratio(totals["won"], totals["n"])})
    notes = [f"{counts['left out']} annotations have no preference and are left out"] if counts["left out"] else []
    return Score(official, sums, won, {id: str(value) for id, value in given.items()}, counts, notes)
