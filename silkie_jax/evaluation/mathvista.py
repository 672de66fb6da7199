"""MathVista (Lu et al. 2023, arXiv 2310.02255), testmini: 1,000 questions with one right answer in a given form.

Files and rules as in MathVista, `evaluation/extract_answer.py` and `calculate_score.py`: the answer is extracted from
the response, by a judge where no rule does it, brought into the truth's form and compared as a text.
"""

from collections.abc import Callable, Mapping
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
from silkie_jax.evaluation.rules.judged import failure_notes, named, switch, until_said, what_was_said
from silkie_jax.evaluation.rules.letters import letters_of, vlmevalkit_letter
from silkie_jax.evaluation.rules.ratings import mathvista_extraction, mathvista_normal
from silkie_jax.evaluation.rules.sums import Sums, Totals, ratio
from silkie_jax.evaluation.running.files import FilePicture, read_json
from silkie_jax.evaluation.running.records import kind

GROUPS = ("question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills")
KINDS = {"question_type": ("multi_choice", "free_form"), "answer_type": ("text", "integer", "float", "list")}
QUICK, IGNORE = "quick_extract", "ignore_empty_extractions"
Row = Mapping[str, Any]

ABOUT = About(
    title="MathVista",
    data="testmini.json (data/testmini.json), query.json beside it, and images/ of lupantech/MathVista",
    figures=(Figure("accuracy", 100),),
    decoding=Decoding(1024),
    prompts={"official": "the query of the data; without query.json one in our words, of the same form"},
    parsers=("official", "lmms-eval", "vlmevalkit"),
    judge="gpt-4-0613",
    judge_optional=True,
    settings={
        QUICK: 'true: read `The answer is "..."` without asking the judge; officially an option',
        IGNORE: "true: an empty extraction of a multiple choice is wrong, not the shortest choice; an official option",
    },
    answers_hold_data=True,
)


def items(data: Path, settings: Settings) -> list[Item]:
    """The questions of testmini.json, or of a folder with it (or with data/testmini.json), in its order.

    Raises:
        UserError: it is not the benchmark's.
    """
    path, root = data, data.parent
    if data.is_dir():
        path = data / "data" / "testmini.json"
        path, root = (path, data) if path.exists() else (data / "testmini.json", data)
    elif root.name == "data":
        root = root.parent
    records = _records(path)
    queries = {}
    if (path.parent / "query.json").exists():
        queries = read_json(path.parent / "query.json")
        if not isinstance(queries, dict) or not all(isinstance(query, str) for query in queries.values()):
            raise UserError(f"{path.parent / 'query.json'}: expected an object of queries by pid")
    return [_item(pid, record, f"{path}: pid {pid}", root, queries.get(pid)) for pid, record in records.items()]


def _records(path: Path) -> dict[str, dict[str, Any]]:
    records = read_json(path, unique=True)
    if not isinstance(records, dict) or not records:
        raise UserError(f"{path}: expected an object of records by pid, found {_nothing(records)}")
    for pid, record in records.items():
        if not isinstance(record, dict):
            raise UserError(f"{path}: pid {pid}: expected an object, found {kind(record)}")
    return records


def _nothing(value: Any) -> str:
    return "an empty one" if value == {} else kind(value)


def _item(pid: str, record: Row, where: str, root: Path, query: str | None = None, truth: bool = True) -> Item:
    for name, known in KINDS.items():
        if record.get(name) not in known:
            raise UserError(f"{where}: {name!r} must be one of {', '.join(known)}, not {record.get(name)!r}")
    choices = record.get("choices")
    choices = choices if record["question_type"] == "multi_choice" else []
    texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not texts or (not choices and record["question_type"] == "multi_choice"):
        raise UserError(f"{where}: 'choices' of a multiple choice must be a list of texts")
    if truth and "answer" not in record:
        raise UserError(f"{where}: no field 'answer': name the data with --data")
    if not isinstance(record.get("metadata", {}), dict):
        raise UserError(f"{where}: 'metadata' must be an object, not {kind(record['metadata'])}")
    image = str(record.get("image") or pid)
    hint = "images/ of lupantech/MathVista"
    return Item(
        id=pid,
        question=str(record.get("question", "")),
        pictures=(FilePicture(image, (root / image, root / "images" / Path(image).name), hint),),
        truth=record.get("answer"),
        part=record["question_type"],
        options=tuple(choices or ()),
        fields={"row": dict(record), "query": query or record.get("query") or _query(record)},
    )


_FORMS = {
    "integer": "a whole number, such as 1, 2 or 3",
    "list": "a Python list, such as [1, 2, 3] or [1.2, 1.3, 1.4]",
    1: "a number with one decimal place, such as 1.2, 1.3 or 1.4",
    2: "a number with two decimal places, such as 1.23, 1.34 or 1.45",
}


def _query(record: Row) -> str:
    """Hint, question and choices, in the form of query.json."""
    if record["question_type"] == "multi_choice":
        lines = ["Hint: Answer the question and give the letter of the right option, such as A, B, C or D, at the end."]
    else:
        precision, answer_type = record.get("precision"), record["answer_type"]
        key = int(precision) if answer_type == "float" and isinstance(precision, int | float) else answer_type
        form = _FORMS.get(key, "a short answer")
        lines = [f"Hint: Answer the question; give the final value, {form}, at the end."]
    unit = f" (Unit: {record['unit']})" if record.get("unit") else ""
    lines.append(f"Question: {record.get('question', '')}{unit}")
    if record["question_type"] == "multi_choice":
        choices = record["choices"]
        lines += [
            "Choices:",
            *(f"({letter}) {choice}" for letter, choice in zip(letters_of(choices), choices, strict=False)),
        ]
    return "\n".join(lines)


def prompt(item: Item, style: str) -> str:
    return item.fields["query"]


def read_answers(path: Path, items: list[Item] | None, settings: Settings) -> tuple[list[Item], list[Answer]]:
    """Results by pid, {pid: {.., response, extraction?}}; they repeat the data's fields, and count as they stand.

    Raises:
        UserError: a record without a response, of another form, or without a truth where there is no data.
    """
    records = _records(path)
    known = {item.id: item for item in items or ()}
    rows, answers = [], []
    for pid, record in records.items():
        where = f"{path}: pid {pid}"
        if items is not None and pid not in known:
            raise UserError(f"{where}: the data has no such question")
        data = known[pid] if items is not None else None
        merged = {**(data.fields["row"] if data else {}), **record}
        query = data.fields["query"] if data else None
        rows.append(_item(pid, merged, where, path.parent, query))
        if "response" not in record and "extraction" not in record:
            raise UserError(f"{where}: no field 'response': the model's answer is missing")
        response = record.get("response")
        if response is not None and not isinstance(response, str):
            raise UserError(f"{where}: 'response' must be a text, not {kind(response)}")
        stored = {"extraction": record["extraction"]} if "extraction" in record else {}
        answers.append(Answer(pid, response or "", stored))
    by_id = {row.id: row for row in rows}
    return ([by_id.get(item.id, item) for item in items] if items else rows), answers


def dialogues(items: list[Item], answers: list[Answer], settings: Settings) -> dict[str, Dialogue]:
    """One request an answer that no rule extracts and no file has extracted; an empty reply is asked for again."""
    by_id = {item.id: item for item in items}
    quick = switch(settings, QUICK)

    def ask(answer: Answer) -> Ask:
        query = by_id[answer.id].fields["query"]
        return Ask(judge_prompt("mathvista", query=query, answer=answer.text), max_tokens=1024)

    return {
        answer.id: until_said(partial(ask, answer))
        for answer in answers
        if "extraction" not in answer.fields
        and mathvista_extraction(answer.text, by_id[answer.id].fields["row"], quick) is None
    }


def score(items: list[Item], answers: list[Answer], replies: Replies | None, parser: str, settings: Settings) -> Score:
    """Right answers over answers that are there, by every group of the data.

    `official` has the options asked for flat, with "by" for the groups, and every other pair of options for which all
    extractions are there; "stored_extractions" where the answers' file has them.

    Raises:
        UserError: an extraction is missing, and there are no replies of a judge.
    """
    by_id = {item.id: item for item in items}
    said = replies.runs[0] if replies else {}
    quick, ignore = switch(settings, QUICK), switch(settings, IGNORE)
    extractions = {a.id: _extraction(a, by_id[a.id], said, quick, stored=True) for a in answers}
    lacking = [id for id, extraction in extractions.items() if extraction is _NONE]
    if lacking and replies is None:
        raise UserError(
            f"{ABOUT.title}: no extraction for pid {named(lacking)}: no rule finds the answer there, so give a judge's "
            "replies with --replies, or a judge to ask with --judge"
        )
    taken = {id: "" if extraction is _NONE else extraction for id, extraction in extractions.items()}
    right = _right(taken, by_id, partial(_official, ignore=ignore))
    official: dict[str, Any] = {**_accuracy(right.values()), "by": _by(right, by_id)}
    for quick_ in (False, True):
        fresh = {a.id: _extraction(a, by_id[a.id], said, quick_, stored=False) for a in answers}
        if answers and _NONE not in fresh.values():
            for ignore_ in (False, True):
                name = "+".join([QUICK if quick_ else "default", *([IGNORE] if ignore_ else [])])
                official[name] = _accuracy(_right(fresh, by_id, partial(_official, ignore=ignore_)).values())
    if answers and all("extraction" in answer.fields for answer in answers):
        given = {answer.id: answer.fields["extraction"] for answer in answers}
        official["stored_extractions"] = _accuracy(_right(given, by_id, partial(_official, ignore=ignore)).values())

    rules: dict[str, Callable[[Any, Item], bool]] = {
        "official": partial(_official, ignore=ignore),
        "lmms-eval": partial(_lmms_eval, ignore=ignore),
        "vlmevalkit": _vlmevalkit,
    }
    known = {id: extraction for id, extraction in extractions.items() if extraction is not _NONE}
    outcomes = {id: float(good) for id, good in _right(known, by_id, rules[parser]).items()}
    readings = {id: str(mathvista_normal(known[id], by_id[id].fields["row"], ignore)) for id in known}
    asked = len(dialogues(items, answers, settings))
    stored = sum("extraction" in answer.fields for answer in answers)
    counts = {
        "items": len(items), "answers": len(answers), "missing": len(items) - len(answers),
        "stored": stored, "by a rule": len(answers) - stored - asked, "by a judge": asked - len(lacking),
        "empty extractions": sum(extraction in ("", None) for extraction in known.values()),
        "out of form": sum(mathvista_normal(known[id], by_id[id].fields["row"], ignore) is None for id in known),
        "no reply": len(lacking),
    }  # fmt: skip
    notes = failure_notes(replies, len(lacking), "extracted as empty")
    if counts["missing"]:
        notes.append(
            f"{counts['missing']} of {len(items)} questions have no answer: accuracy is of the others, as officially"
        )
    return Score(official, _sums(by_id, outcomes), outcomes, readings, counts, notes)


_NONE = object()
"""No extraction yet: a judge has not been asked, or did not answer. (None is one that files may hold.)"""


def _extraction(answer: Answer, item: Item, said: Mapping[str, Any], quick: bool, stored: bool) -> Any:
    if stored and "extraction" in answer.fields:
        return answer.fields["extraction"]
    found = mathvista_extraction(answer.text, item.fields["row"], quick)
    if found is None:
        return what_was_said(said[answer.id]) if answer.id in said else _NONE
    return found


def _official(extraction: Any, item: Item, ignore: bool) -> bool:
    return mathvista_normal(extraction, item.fields["row"], ignore) == item.truth


def _lmms_eval(extraction: Any, item: Item, ignore: bool) -> bool:
    """As officially, but stripped texts are compared (with precisions as whole numbers, as this data has them)."""
    return str(mathvista_normal(extraction, item.fields["row"], ignore)).strip() == str(item.truth).strip()


def _vlmevalkit(extraction: Any, item: Item) -> bool:
    """Letters or contents by its own rule, numbers as Python reads them, floats as they are; lists are never right."""
    text = "" if extraction is None else str(extraction)
    if item.options:
        letter = vlmevalkit_letter(text, item.options)
        return (
            letter is not None
            and dict(zip(letters_of(item.options), item.options, strict=False)).get(letter) == item.truth
        )
    number = {"integer": int, "float": float}.get(item.fields["row"]["answer_type"])
    try:
        return number is not None and number(text) == number(item.truth)
    except (ValueError, TypeError):
        return False


def _right(extractions: Mapping[str, Any], by_id: Mapping[str, Item], rule: Any) -> dict[str, bool]:
    return {id: rule(extraction, by_id[id]) for id, extraction in extractions.items()}


def _accuracy(right: Any) -> dict[str, Any]:
    right = list(right)
    return {"accuracy": sum(right) / len(right) if right else None, "correct": sum(right), "total": len(right)}


def _groups(item: Item) -> list[tuple[str, str]]:
    """(group, value) of an item: of its record or the metadata in it; several skills."""
    row = item.fields["row"]
    every = {**row.get("metadata", {}), **row}
    found = []
    for group in GROUPS:
        values = every.get(group)
        values = values if isinstance(values, list) else [] if values is None else [values]
        found += [(group, str(value)) for value in dict.fromkeys(map(str, values))]
    return found


def _by(right: Mapping[str, bool], by_id: Mapping[str, Item]) -> dict[str, dict[str, Any]]:
    lists: dict[str, dict[str, list[bool]]] = {}
    for id, good in right.items():
        for group, value in _groups(by_id[id]):
            lists.setdefault(group, {}).setdefault(value, []).append(good)
    return {group: {value: _accuracy(goods) for value, goods in of.items()} for group, of in lists.items()}


def _sums(by_id: Mapping[str, Item], outcomes: Mapping[str, float]) -> Sums:
    rows, groups = [], {"accuracy": None}
    for id, good in outcomes.items():
        names = ["accuracy", *(f"{group}/{value}" for group, value in _groups(by_id[id]))]
        groups |= dict.fromkeys(names)
        counts = {f"right {name}": good for name in names} | {f"n {name}": 1.0 for name in names}
        rows.append((by_id[id].cluster, counts))

    def formula(totals: Totals) -> dict[str, np.ndarray]:
        return {name: 100 * ratio(totals[f"right {name}"], totals[f"n {name}"]) for name in groups}

    return Sums.of(rows, [f"{what} {name}" for name in groups for what in ("right", "n")], formula)
