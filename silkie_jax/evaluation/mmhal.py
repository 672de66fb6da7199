"""MMHal-Bench (Sun et al. 2023, arXiv 2309.14525): 96 open questions, rated 0 to 6 by a judge that sees no image.

Files and rules as in LLaVA-RLHF, `Eval/eval_gpt_mmhal.py` and `summarize_gpt_mmhal.py`. The official scorer takes
types and questions by position; so a file in another order is refused, or put in order where the data is given.
"""

from collections.abc import Mapping
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
from silkie_jax.evaluation.rules.ratings import mmhal_rating
from silkie_jax.evaluation.rules.sums import Sums, Totals, ratio
from silkie_jax.evaluation.running.files import FilePicture, read_json
from silkie_jax.evaluation.running.records import kind, text_field

TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
"""By index modulo 8."""
COUNT = 96

ABOUT = About(
    title="MMHal-Bench",
    data="response_template.json and images/ of the hub's Shengcao1006/MMHal-Bench",
    figures=(Figure("average_score", 6), Figure("hallucination_rate", 0, worst=1)),
    decoding=Decoding(1024),
    prompts={"official": "the question alone"},
    judge="gpt-4-0314",
    answers_hold_data=True,
)


def items(data: Path, settings: Settings) -> list[Item]:
    """The 96 questions, from a folder with `response_template.json` or from such a file.

    Raises:
        UserError: it is not the benchmark's.
    """
    path = data / "response_template.json" if data.is_dir() else data
    records = _records(path)
    if records and "choices" in records[0]:
        raise UserError(f"{path}: holds a judge's replies; the data is response_template.json")
    return _items(path, records)


def _records(path: Path) -> list[dict[str, Any]]:
    records = read_json(path)
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a list of {COUNT} records, found {kind(records)}")
    for n, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{path}: record {n}: expected an object, found {kind(record)}")
    return records


def _check_count(path: Path, found: int, missing: str = "") -> None:
    if found == COUNT:
        return
    if not missing:
        span = f"number {found}" if found == COUNT - 1 else f"numbers {found} to {COUNT - 1}"
        missing = f"{span} (from 0) missing" if found < COUNT else f"remove those after number {COUNT - 1} (from 0)"
    raise UserError(f"{path}: {COUNT} records expected, {found} came: {missing}")


def _items(path: Path, records: list[dict[str, Any]]) -> list[Item]:
    made = []
    for n, record in enumerate(records):
        where = f"{path}: record {n}"
        found, wanted = record.get("question_type"), TYPES[n % len(TYPES)]
        if found is not None and found != wanted:
            missing = f"{COUNT} records expected, {len(records)} came; " if len(records) != COUNT else ""
            raise UserError(
                f"{where}: {missing}type {found!r} where the official order has {wanted!r}: a record before it is "
                "missing, or the order is another: keep that of response_template.json"
            )
        contents = record.get("image_content", [])
        if not isinstance(contents, list) or not all(isinstance(c, str) for c in contents):
            raise UserError(f"{where}: 'image_content' must be a list of texts")
        source = str(record.get("image_src", record.get("image_id", n)))
        name = source.rsplit("/", 1)[-1]
        places = (path.parent / "images" / name, path.parent / name)
        made.append(
            Item(
                id=str(n),
                question=text_field(record, "question", where),
                pictures=(FilePicture(name, places, "images/ of the hub's Shengcao1006/MMHal-Bench"),),
                truth=text_field(record, "gt_answer", where),
                part=wanted,
                fields={"contents": contents, "image_id": record.get("image_id")},
            )
        )
    _check_count(path, len(records))
    return made


def prompt(item: Item, style: str) -> str:
    return item.question


def read_answers(path: Path, items: list[Item] | None, settings: Settings) -> tuple[list[Item], list[Answer]]:
    """`response.json` with `model_answer` filled in, or the saved evaluation: 96 chat completions.

    Raises:
        UserError: not 96 records, another order, or answers that were not filled in.
    """
    records = _records(path)
    if records and "choices" in records[0]:
        try:
            texts = list((official_replies(records, items or [], []) or {}).values())
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        _check_count(path, len(texts))
        blank = [Item(id=str(n), question="", part=TYPES[n % len(TYPES)]) for n in range(COUNT)]
        return items or blank, [Answer(str(n), "", {"reply": text}) for n, text in enumerate(texts)]
    if items is not None:
        records = _in_order(path, records, items)
    else:
        items = _items(path, records)
    answers = []
    for n, record in enumerate(records):
        where = f"{path}: record {n}"
        if record.get("model_answer") is None:
            raise UserError(f"{where}: no 'model_answer': fill in the model's answers")
        answers.append(Answer(str(n), text_field(record, "model_answer", where)))
    return items, answers


def _in_order(path: Path, records: list[dict[str, Any]], items: list[Item]) -> list[dict[str, Any]]:
    """The records as the items lie, told apart by question and image."""
    places = {(str(item.fields["image_id"]), item.question): n for n, item in enumerate(items)}
    if len(places) < len(items):  # not told apart by these
        _check_count(path, len(records), "each question needs its record")
        return records
    found: dict[int, dict[str, Any]] = {}
    for n, record in enumerate(records):
        where = f"{path}: record {n}"
        key = (str(record.get("image_id")), text_field(record, "question", where))
        place = places.get(key)
        if place is None:
            raise UserError(f"{where}: the data has no question {key[1]!r} on image {key[0]!r}")
        if place in found:
            raise UserError(f"{where}: the question {key[1]!r} on image {key[0]!r} was there before")
        found[place] = record
    missing = [str(n) for n in range(len(items)) if n not in found]
    _check_count(path, len(records), f"there is none for questions {named(missing)} of the data (counted from 0)")
    return [found[n] for n in range(len(items))]


def official_replies(raw: Any, items: list[Item], answers: list[Answer]) -> dict[str, str] | None:
    """The replies in a saved evaluation, a list of chat completions, by position; None for another form.

    Raises:
        UserError: a completion without a text; the caller names the file.
    """
    if not isinstance(raw, list) or not raw or not isinstance(raw[0], dict):
        return None
    texts = {}
    for n, entry in enumerate(raw):
        try:
            text = entry["choices"][0]["message"]["content"]
        except (TypeError, KeyError, IndexError):
            text = None
        if not isinstance(text, str):
            raise UserError(f"record {n}: no text at choices[0].message.content")
        texts[str(n)] = text
    return texts


def dialogues(items: list[Item], answers: list[Answer], settings: Settings) -> dict[str, Dialogue]:
    """One request an answer; none where the replies came with the answers."""
    by_id = {item.id: item for item in items}

    def ask(answer: Answer) -> Ask:
        item = by_id[answer.id]
        contents = ", ".join(item.fields["contents"])
        return Ask(
            judge_prompt("mmhal", contents=contents, question=item.question, truth=item.truth, answer=answer.text)
        )

    return {
        answer.id: one_reply(lambda answer=answer: ask(answer))  # type: ignore[misc]
        for answer in answers
        if "reply" not in answer.fields
    }


def score(items: list[Item], answers: list[Answer], replies: Replies | None, parser: str, settings: Settings) -> Score:
    """The mean rating, and the share of ratings below 3; a reply without one clear rating is rated 0, as officially.

    Raises:
        UserError: there are no replies, or not 96 answers.
    """
    stored = {answer.id: answer.fields["reply"] for answer in answers if "reply" in answer.fields}
    replies = replies if stored else needed(replies, ABOUT.title)
    said: Mapping[str, Any] = replies.runs[0] if replies else {}
    if len(answers) != len(items) or len(items) != COUNT:
        raise UserError(f"{ABOUT.title}: {COUNT} answers are needed, {len(answers)} came")
    outcomes: dict[str, float] = {}
    readings: dict[str, str] = {}
    ratings: list[int] = []
    unclear = without = 0
    for answer in answers:
        texts = said.get(answer.id) or ([stored[answer.id]] if answer.id in stored else None)
        if texts is None:
            without += 1
            ratings.append(0)
            readings[answer.id] = "no reply"
            continue
        rating = mmhal_rating(texts[-1])
        unclear += rating is None
        ratings.append(rating or 0)
        outcomes[answer.id] = float(rating or 0)
        readings[answer.id] = "no clear rating" if rating is None else str(rating)
    by_type = [ratings[k :: len(TYPES)] for k in range(len(TYPES))]
    official = {
        "average_score": f"{sum(ratings) / COUNT:.2f}",
        "hallucination_rate": f"{sum(rating < 3 for rating in ratings) / COUNT:.2f}",
        "by_type_in_index_order": [round(sum(of_type) / len(of_type), 2) for of_type in by_type],
        "replies_with_zero_or_several_ratings": unclear,
    }
    notes = failure_notes(replies, without, "rated 0")
    if unclear:
        notes.append(f"{unclear} replies hold no rating, or several, and are rated 0 as officially")
    counts = {"items": COUNT, "rated": COUNT - unclear - without, "no clear rating": unclear, "no reply": without}
    return Score(official, _sums(items, outcomes), outcomes, readings, counts, notes)


def _sums(items: list[Item], outcomes: Mapping[str, float]) -> Sums:
    names = ("rating", "low", "n")
    rows = []
    for item in items:
        if item.id in outcomes:
            rating = outcomes[item.id]
            values = dict(zip(names, (rating, float(rating < 3), 1.0), strict=True))
            rows.append((item.cluster, {**values, **{f"{item.part}/{name}": value for name, value in values.items()}}))

    def formula(totals: Totals) -> dict[str, np.ndarray]:
        figures = {}
        for prefix in ("", *(f"{part}/" for part in TYPES)):
            count = totals[f"{prefix}n"]
            figures[f"{prefix}average_score"] = ratio(totals[f"{prefix}rating"], count)
            figures[f"{prefix}hallucination_rate"] = ratio(totals[f"{prefix}low"], count)
        return figures

    every = [*names, *(f"{part}/{name}" for part in TYPES for name in names)]
    return Sums.of(rows, every, formula)
