"""MM-Vet (Yu et al. 2023, arXiv 2308.02490): 218 open questions, graded 0 to 1 by a judge, by capability.

Files and rules as in MM-Vet, `mm-vet_evaluator.py`. An unreadable reply is asked for again, five times at most, with
rising temperature; the sixth reply is never read there, and the answer then counts 0.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
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
from silkie_jax.evaluation.rules.judged import failure_notes, named, needed
from silkie_jax.evaluation.rules.ratings import first_grade, mmvet_grade, mmvet_grade_vlmevalkit
from silkie_jax.evaluation.rules.sums import Sums, Totals, ratio
from silkie_jax.evaluation.running.files import FilePicture, field, read_json
from silkie_jax.evaluation.running.records import kind, text_field

TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5, 2.0)
"""Of the six requests: the first retry is still at 0."""
READ = 5
"""Replies that are read."""
RULES = {"official": mmvet_grade, "vlmevalkit": mmvet_grade_vlmevalkit}

ABOUT = About(
    title="MM-Vet",
    data="mm-vet.json and images/ of mm-vet.zip (release v1 of yuweihao/MM-Vet)",
    figures=(Figure("total", 100),),
    decoding=Decoding(512),
    prompts={"official": "the question alone"},
    parsers=tuple(RULES),
    judge="gpt-4-0613",
    settings={
        "subset": "a JSON list of ids that are scored apart; by default bard_set.json beside the data, if it is there",
        "runs": "how many of the judge's runs are scored; by default all that there are",
    },
)


def items(data: Path, settings: Settings) -> list[Item]:
    """The questions in the order of the file: mm-vet.json, or a folder that holds it (or mm-vet/mm-vet.json).

    Raises:
        UserError: it is not the benchmark's.
    """
    path = data
    if data.is_dir():
        path = next((p for p in (data / "mm-vet.json", data / "mm-vet" / "mm-vet.json") if p.exists()), None) or (
            data / "mm-vet.json"
        )
    records = read_json(path, unique=True)
    if not isinstance(records, dict) or not records:
        raise UserError(f"{path}: expected an object of questions by id, found {kind(records)}")
    subset = _subset(path, settings, records)
    made = []
    for id, record in records.items():
        where = f"{path}: {id}"
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object, found {kind(record)}")
        capabilities = field(record, "capability", where)
        if not isinstance(capabilities, list) or not capabilities or not all(isinstance(c, str) for c in capabilities):
            raise UserError(f"{where}: 'capability' must be a list of names")
        image = text_field(record, "imagename", where)
        places = (path.parent / "images" / image, path.parent / image)
        made.append(
            Item(
                id=id,
                question=text_field(record, "question", where),
                pictures=(FilePicture(image, places, "images/ of mm-vet.zip"),),
                truth=text_field(record, "answer", where),
                part="_".join(sorted(set(capabilities))),
                fields={"capability": tuple(capabilities), "in_subset": subset is not None and id in subset},
            )
        )
    return made


def _subset(path: Path, settings: Settings, records: Mapping[str, Any]) -> set[str] | None:
    given = settings.get("subset")
    file = Path(given) if given else path.parent / "bard_set.json"
    if not given and not file.exists():
        return None
    ids = read_json(file)
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
        raise UserError(f"{file}: expected a list of ids, found {kind(ids)}")
    unknown = [id for id in ids if id not in records]
    if unknown and given:
        raise UserError(f"{file}: ids that the data does not have: {named(unknown)}")
    return set(ids) - set(unknown) or None


def prompt(item: Item, style: str) -> str:
    return item.question


def read_answers(path: Path, items: list[Item] | None, settings: Settings) -> tuple[list[Item], list[Answer]]:
    """{id: text}; ids that the data does not have are ignored, as officially.

    Raises:
        UserError: there is no data, an answer is missing or no text.
    """
    if items is None:
        raise UserError(f"{path}: MM-Vet's results hold no questions: name mm-vet.json with --data")
    texts = read_json(path, unique=True)
    if not isinstance(texts, dict):
        raise UserError(f"{path}: expected an object of answers by id, found {kind(texts)}")
    missing = [item.id for item in items if item.id not in texts]
    if missing:
        raise UserError(f"{path}: no answer to {named(missing)}: every question of the data needs one")
    return items, [Answer(item.id, text_field(texts, item.id, str(path))) for item in items]


def dialogues(items: list[Item], answers: list[Answer], settings: Settings) -> dict[str, Dialogue]:
    """Up to six requests an answer, until a reply can be read."""
    by_id = {item.id: item for item in items}

    def ask(answer: Answer, replies: Sequence[str]) -> Ask | None:
        tries = len(replies)
        if tries >= len(TEMPERATURES) or first_grade(replies, mmvet_grade, READ) is not None:
            return None
        item = by_id[answer.id]
        truth = item.truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        words = judge_prompt("mmvet", question=item.question, truth=truth, answer=answer.text, again=tries > 0)
        return Ask(words, temperature=TEMPERATURES[tries], max_tokens=3)

    return {answer.id: partial(ask, answer) for answer in answers}


def official_replies(raw: Any, items: list[Item], answers: list[Answer]) -> dict[str, list[list[str]]] | None:
    """The replies in a saved file of grades, {id: {"content": [last reply of each run], "score": [...]}}; None for
    another form.

    Raises:
        UserError: an entry of such a file without texts; the caller names the file.
    """
    if not isinstance(raw, dict) or not any(isinstance(entry, dict) and "content" in entry for entry in raw.values()):
        return None
    texts = {}
    for id, entry in raw.items():
        contents = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(contents, list) or not all(isinstance(text, str) for text in contents):
            raise UserError(f"{id}: 'content' must be a list of texts, one for each run")
        texts[id] = [[text] for text in contents]
    return texts


def score(items: list[Item], answers: list[Answer], replies: Replies | None, parser: str, settings: Settings) -> Score:
    """Grades by capability, in percent.

    `official` holds the figures over all runs, and again of run 0 ("one_run"), of runs 0 and 1 ("two_runs") and of
    run 0 on the subset ("subset").

    Raises:
        UserError: there are no replies, or fewer runs than were asked for.
    """
    runs = _runs(needed(replies, ABOUT.title), settings)
    answered = {answer.id for answer in answers}
    if missing := [item.id for item in items if item.id not in answered]:
        raise UserError(f"{ABOUT.title}: no answer to {named(missing)}: every question needs one")
    graded = {name: [_grades(items, run, rule) for run in runs] for name, rule in RULES.items()}
    first = graded["official"]
    official: dict[str, Any] = _figures(items, first)
    official["one_run"] = _figures(items, first[:1])
    if len(runs) >= 2:
        official["two_runs"] = _figures(items, first[:2])
    if some := [item for item in items if item.fields["in_subset"]]:
        official["subset"] = _figures(some, first[:1])

    chosen = graded[parser]
    outcomes, readings = {}, {}
    counts: Counter[str] = Counter(items=len(items), runs=len(runs), graded=0, unreadable=0, unfinished=0)
    counts.update({"no reply": 0, "not a number": 0})
    for item in items:
        known = []
        for run, grades in zip(runs, chosen, strict=True):
            grade = grades.get(item.id)
            if grade is None:
                counts["unfinished" if item.id in run else "no reply"] += 1
                continue
            unreadable = first_grade(run[item.id], RULES[parser], READ) is None
            counts["unreadable" if unreadable else "not a number" if math.isnan(grade) else "graded"] += 1
            known.append(grade)
        readings[item.id] = " ".join(f"{grade:g}" for grade in known) or "no grade"
        if known:
            outcomes[item.id] = sum(known) / len(known)
    notes = failure_notes(replies, counts["no reply"], "graded 0")
    if counts["unreadable"]:
        notes.append(f"{counts['unreadable']} grades are 0 because none of {READ} replies could be read")
    if counts["unfinished"]:
        notes.append(
            f"{counts['unfinished']} dialogues end before the official tool would give up, without a reply that can be "
            "read: graded 0 in the official figures, and left out of ours"
        )
    if counts["not a number"]:
        notes.append(f"{counts['not a number']} replies say nan, which the official tool takes: totals are nan with it")
    sums = _sums(items, outcomes)
    comparable = {id: grade for id, grade in outcomes.items() if not math.isnan(grade)}
    return Score(official, sums, comparable, readings, dict(counts), notes)


def _runs(replies: Replies, settings: Settings) -> list[Mapping[str, Sequence[str]]]:
    runs = list(replies.runs)
    wanted = settings.get("runs")
    if wanted is None:
        return runs
    if not wanted.isdecimal() or int(wanted) < 1:
        raise UserError(f"--set runs={wanted}: write a whole number from 1")
    if int(wanted) > len(runs):
        raise UserError(f"--set runs={wanted}: there are replies of {len(runs)} runs")
    return runs[: int(wanted)]


def _grades(items: list[Item], run: Mapping[str, Sequence[str]], rule: Any) -> dict[str, float]:
    """Grades of a run; 0 where all replies that are read say nothing, and none where more would have been asked for."""
    grades = {}
    for item in items:
        texts = run.get(item.id)
        if texts is None:
            continue
        grade = first_grade(texts, rule, READ)
        # Dialogues end with a reply that the official rule can read; another rule then has no more to go by.
        ended = len(texts) >= READ or first_grade(texts, mmvet_grade, READ) is not None
        if grade is not None or ended:
            grades[item.id] = 0.0 if grade is None else grade
    return grades


def _figures(items: list[Item], runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The official figures by capability and by exact set of capabilities; without a grade an answer counts 0."""
    capabilities = Counter(name for item in items for name in item.fields["capability"])
    sets = Counter(item.part for item in items)
    groups = {item.id: set(item.fields["capability"]) for item in items}
    return {
        **_table(groups, capabilities, runs),
        "capability_sets": _table({item.id: {item.part} for item in items}, sets, runs),
    }


def _table(
    groups: Mapping[str, set[str]], counts: Mapping[str, int], runs: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Plain sums in the order of the file, over counts, x 100, mean over runs, rounded as numpy does."""
    sums = {name: np.zeros(len(runs)) for name in (*counts, "total")}
    for r, run in enumerate(runs):
        for id, names in groups.items():
            for name in (*names, "total"):
                sums[name][r] += run.get(id, 0.0)
    percent = {name: values / {**counts, "total": len(groups)}[name] * 100 for name, values in sums.items()}
    return {
        **{name: float(np.round(values.mean(), 1)) for name, values in percent.items()},
        "std": float(np.round(percent["total"].std(), 1)),
        "runs": np.round(percent["total"], 1).tolist(),
    }


def _sums(items: list[Item], outcomes: Mapping[str, float]) -> Sums:
    capabilities = list(dict.fromkeys(name for item in items for name in item.fields["capability"]))
    rows = []
    for item in items:
        if item.id in outcomes:
            groups = ["total", *(f"capabilities/{name}" for name in set(item.fields["capability"]))]
            counts = {f"grade {group}": outcomes[item.id] for group in groups} | {f"n {group}": 1.0 for group in groups}
            rows.append((item.cluster, counts))

    groups = ["total", *(f"capabilities/{name}" for name in capabilities)]

    def formula(totals: Totals) -> dict[str, np.ndarray]:
        return {group: 100 * ratio(totals[f"grade {group}"], totals[f"n {group}"]) for group in groups}

    return Sums.of(rows, [f"{what} {group}" for group in groups for what in ("grade", "n")], formula)
