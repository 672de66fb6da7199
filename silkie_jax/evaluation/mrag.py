"""MRAG-Bench (Hu et al. 2024, arXiv 2410.08182): 1,353 multiple-choice questions on images, with or without retrieval.

Files and rules as in MRAG-Bench, `score.py`: a letter is read from the output, and where there is none a judge is asked
which option was meant. The official script stops at such outputs of more than five words; here they are judged too.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
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
    Picture,
    Replies,
    Score,
    Settings,
)
from silkie_jax.evaluation.prompts import judge_prompt
from silkie_jax.evaluation.rules.judged import failure_notes, named, until_said, what_was_said
from silkie_jax.evaluation.rules.letters import mrag_letter
from silkie_jax.evaluation.rules.ratings import choice_content, mrag_verdict
from silkie_jax.evaluation.rules.sums import Sums, Totals, ratio
from silkie_jax.evaluation.running.files import FilePicture, field
from silkie_jax.evaluation.running.parquet import ParquetPicture, parquet_rows
from silkie_jax.evaluation.running.records import id_field, kind, read_records, text_field

LETTERS = ("A", "B", "C", "D")
RAG = {"none": None, "retrieved": "retrieved_images", "examples": "gt_images"}
EXAMPLES = 5
WORDS = 5
"""Outputs without a letter and of more words stop the official script."""

ABOUT = About(
    title="MRAG-Bench",
    data="the parquet files of the hub's uclanlp/MRAG-Bench, or a folder with questions.jsonl (the same fields, images "
    "as file names)",
    figures=(Figure("Overall Accuracy", 100),),
    decoding=Decoding(4096),
    prompts={"official": "the request for a letter, the question and the four options, after the retrieved images"},
    parsers=("official", "content"),
    judge="gpt-3.5-turbo",
    judge_optional=True,
    settings={"rag": "none (default), retrieved (five images found by a retriever) or examples (five right ones)"},
    answers_hold_data=True,
)


def items(data: Path, settings: Settings) -> list[Item]:
    """The questions, with the images that the setting `rag` shows; images are read when they are needed.

    Raises:
        UserError: there are no such files, or a field is missing.
    """
    rag = settings.get("rag", "none")
    if rag not in RAG:
        raise UserError(f"--set rag={rag}: choose one of {', '.join(RAG)}")
    file = data if data.is_file() and data.suffix != ".parquet" else data / "questions.jsonl"
    found = _exported(file) if file.is_file() else _distributed(data)
    made: dict[str, Item] = {}
    for where, record, first, others in found:
        id = id_field(record, "qs_id" if "qs_id" in record else "id", where)
        if id in made:
            raise UserError(f"{where}: question {id} was there before")
        scenario = text_field(record, "scenario", where)
        shown = [] if RAG[rag] is None else list(others(RAG[rag]))[: 1 if scenario == "Incomplete" else EXAMPLES]
        made[id] = Item(
            id=id,
            question=text_field(record, "question", where),
            pictures=(first, *shown),
            truth=_choice(record, "answer_choice", where),
            part=scenario,
            options=tuple(text_field(record, letter, where) for letter in LETTERS),
            fields={"aspect": record.get("aspect"), "rag": rag},
        )
    if not made:
        raise UserError(f"{data}: no questions")
    return list(made.values())


def _choice(record: Mapping[str, Any], name: str, where: str) -> str:
    choice = text_field(dict(record), name, where)
    if choice not in LETTERS:
        raise UserError(f"{where}: {name!r} must be one of {', '.join(LETTERS)}, not {choice!r}")
    return choice


def _exported(file: Path) -> Iterator[tuple[str, dict[str, Any], Picture, Any]]:
    for where, record in read_records(file):

        def picture(name: Any, where: str = where) -> Picture:
            if not isinstance(name, str):
                raise UserError(f"{where}: images must be file names, not {kind(name)}")
            return FilePicture(name, (file.parent / name, file.parent / "images" / name), ABOUT.data)

        def others(column: str, record: dict[str, Any] = record, picture: Any = picture) -> list[Picture]:
            names = record.get(column) or []
            return [picture(name) for name in (names if isinstance(names, list) else [names])]

        yield where, record, picture(record.get("image")), others


def _distributed(data: Path) -> Iterator[tuple[str, dict[str, Any], Picture, Any]]:
    columns = ["id", "question", "answer_choice", "scenario", "aspect", *LETTERS]
    for file, row, record in parquet_rows(data, columns, ABOUT.data):

        def others(column: str, file: Path = file, row: int = row, id: Any = record["id"]) -> list[Picture]:
            return [ParquetPicture(f"{id}/{column}/{n}", file, column, row, n) for n in range(EXAMPLES)]

        first = ParquetPicture(f"{record['id']}", file, "image", row)
        yield f"{file}: row {row}", record, first, others


def prompt(item: Item, style: str) -> str:
    """Request, question and options; the images go before it, the question's own first."""
    retrieved = ""
    if len(item.pictures) > 1:
        retrieved = (
            "The first image is the one that the question is about; the others were retrieved to help you answer it. "
        )
    lines = [f"{letter}: {option}" for letter, option in zip(LETTERS, item.options, strict=True)]
    request = "Answer with the option's letter from the given choices directly."
    return f"{retrieved}{request}\n{item.question}\n Choices:\n" + "\n".join(lines)


def read_answers(path: Path, items: list[Item] | None, settings: Settings) -> tuple[list[Item], list[Answer]]:
    """{qs_id, prompt, output, gt_choice, scenario} a line; without data, items are made of it.

    Raises:
        UserError: a field is missing, of another kind, or a question is there twice or unknown.
    """
    known = {item.id: item for item in items or ()}
    made: dict[str, Item] = {}
    answers = []
    for where, record in read_records(path):
        id = id_field(record, "qs_id", where)
        if id in made:
            raise UserError(f"{where}: question {id} was answered before: remove one")
        output = field(record, "output", where)
        output = "" if output is None else text_field(record, "output", where)
        if items is not None and id not in known:
            raise UserError(f"{where}: the data has no question {id}")
        made[id] = known[id] if items is not None else _from_answer(record, id, where)
        answers.append(Answer(id, output))
    return items or list(made.values()), answers


def _from_answer(record: dict[str, Any], id: str, where: str) -> Item:
    words = record.get("prompt")
    question = words.rpartition("<image>\n")[2] if isinstance(words, str) else ""
    options: tuple[str, ...] = ()
    head, mark, listed = question.rpartition("Choices:\n")
    lines = listed.split("\n")
    if mark and len(lines) >= 4 and all(lines[k].startswith(f"{letter}: ") for k, letter in enumerate(LETTERS)):
        question, options = head.strip(), tuple(line[3:] for line in lines[:4])
    return Item(
        id=id,
        question=question,
        truth=_choice(record, "gt_choice", where),
        part=text_field(record, "scenario", where),
        options=options,
    )


def _open(answers: list[Answer]) -> list[Answer]:
    """Answers whose letter a judge has to say; an empty one is wrong without asking, as officially."""
    return [answer for answer in answers if answer.text.strip() and mrag_letter(answer.text) is None]


def dialogues(items: list[Item], answers: list[Answer], settings: Settings) -> dict[str, Dialogue]:
    """One request an answer without a letter; an empty reply is asked for again."""
    by_id = {item.id: item for item in items}

    def ask(answer: Answer) -> Ask:
        item = by_id[answer.id]
        lines = [f"{letter}: {option}" for letter, option in zip(LETTERS, item.options, strict=False)]
        question = "\n".join([f"Question: {item.question}", *(["Choices:", *lines] if lines else [])])
        return Ask(judge_prompt("mrag", question=question, answer=answer.text), max_tokens=256)

    return {answer.id: until_said(partial(ask, answer)) for answer in _open(answers)}


def score(items: list[Item], answers: list[Answer], replies: Replies | None, parser: str, settings: Settings) -> Score:
    """Accuracy in percent, overall and by scenario, over the answers that are there.

    Under the parser `content` an answer without a letter is the option whose content alone occurs in it, and no judge
    is needed; `official` is then empty unless there are replies, or nothing to ask.

    Raises:
        UserError: the official rule needs a judge's replies, and there are none.
    """
    by_id = {item.id: item for item in items}
    said = replies.runs[0] if replies else {}
    asked = {answer.id for answer in _open(answers)}
    if asked and replies is None and parser == "official":
        raise UserError(
            f"{ABOUT.title}: {len(asked)} answers name no letter ({named(asked)}), and a judge is to say which option "
            "they mean: give its replies with --replies, a judge with --judge, or use the parser content"
        )
    letters: dict[str, str | None] = {}
    chosen: dict[str, str | None] = {}
    counts: Counter[str] = Counter(items=len(items), answers=len(answers), empty=0, missing=len(items) - len(answers))
    counts.update({"by a judge": 0, "undecided": 0, "no reply": 0, "long without a letter": 0})
    for answer in answers:
        id = answer.id
        counts["empty"] += not answer.text.strip()
        letters[id] = mrag_verdict(what_was_said(said[id])) if id in asked & said.keys() else mrag_letter(answer.text)
        counts["long without a letter"] += id in asked and len(answer.text.split()) > WORDS
        if parser == "content":
            chosen[id] = mrag_letter(answer.text) or choice_content(answer.text, by_id[id].options)
        elif id in asked and id not in said:
            counts["no reply"] += 1
            continue
        else:
            counts["by a judge"] += id in asked
            chosen[id] = letters[id]
        counts["undecided"] += chosen[id] is None
    right = {id: letter == by_id[id].truth for id, letter in letters.items()}
    official = _accuracies(right, by_id) if replies is not None or not asked else {}
    outcomes = {id: float(letter == by_id[id].truth) for id, letter in chosen.items()}
    readings = {id: chosen.get(id) or "none" for id in letters}
    notes = failure_notes(replies, counts["no reply"], "wrong")
    if counts["long without a letter"]:
        notes.append(
            f"{counts['long without a letter']} answers of more than {WORDS} words name no letter: the official script "
            "stops there; here they are judged like the shorter ones"
        )
    if counts["missing"]:
        notes.append(f"{counts['missing']} of {len(items)} questions have no answer: accuracy is of the others")
    return Score(official, _sums(by_id, outcomes), outcomes, readings, dict(counts), notes)


def _accuracies(right: Mapping[str, bool], by_id: Mapping[str, Item]) -> dict[str, Any]:
    parts: dict[str, list[bool]] = {}
    for id, good in right.items():
        parts.setdefault(by_id[id].part, []).append(good)
    overall = float(f"{100 * sum(right.values()) / len(right):.2f}")
    return {"Overall Accuracy": overall, **{p: round(100 * sum(good) / len(good), 2) for p, good in parts.items()}}


def _sums(by_id: Mapping[str, Item], outcomes: Mapping[str, float]) -> Sums:
    rows = []
    for id, good in outcomes.items():
        part = by_id[id].part
        rows.append((by_id[id].cluster, {"right": good, "n": 1.0, f"right {part}": good, f"n {part}": 1.0}))
    parts = list(dict.fromkeys(item.part for item in by_id.values()))

    def formula(totals: Totals) -> dict[str, np.ndarray]:
        figures = {"Overall Accuracy": 100 * ratio(totals["right"], totals["n"])}
        return figures | {f"scenarios/{p}": 100 * ratio(totals[f"right {p}"], totals[f"n {p}"]) for p in parts}

    return Sums.of(rows, ["right", "n", *(f"{what} {part}" for part in parts for what in ("right", "n"))], formula)
