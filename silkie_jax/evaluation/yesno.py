"""Yes/no questions of your own: JSON lines {id, image, question, answer, response}, scored by any tool's rule.

There is no official scorer; `official` has the number of right answers under every rule, since the rules part on
sentences by tens of points (`rules/yesno.py`).
"""

from pathlib import Path
from typing import Any

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import About, Answer, Decoding, Figure, Item, Replies, Score, Settings
from silkie_jax.evaluation.rules.sums import Sums, Totals, ratio
from silkie_jax.evaluation.rules.yesno import CONFUSION, RULES, confusion, confusion_figures
from silkie_jax.evaluation.running.generic import read_questions, read_responses
from silkie_jax.evaluation.running.records import text_field

ABOUT = About(
    title="yes/no questions",
    data="JSON lines {id, image, question, answer}, answer yes or no; images beside the file or in images/",
    figures=(Figure("accuracy", 1.0), Figure("f1", 1.0)),
    decoding=Decoding(max_new_tokens=16),
    prompts={
        "question": "the question as it stands",
        "yes-no": 'with "Please answer yes or no." after it, as in MME',
        "short": 'with LLaVA\'s line after it: "Answer the question using a single word or phrase."',
    },
    parsers=tuple(RULES),
    answers_hold_data=True,
)
_ENDS = {
    "question": "",
    "yes-no": " Please answer yes or no.",
    "short": "\nAnswer the question using a single word or phrase.",
}


def items(data: Path, settings: Settings) -> list[Item]:
    """The questions of a JSON-lines file (a JSON list does too).

    Raises:
        UserError: a record is not of the form.
    """
    return read_questions(data, _truth)


def prompt(item: Item, style: str) -> str:
    """The question, with a style's end."""
    return item.question + _ENDS[style]


def read_answers(path: Path, items: list[Item] | None, settings: Settings) -> tuple[list[Item], list[Answer]]:
    """Responses {id, response}, which hold the questions too where no data is given.

    Raises:
        UserError: a record is not of the form.
    """
    return read_responses(path, items, _truth)


def _truth(record: dict[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    answer = text_field(record, "answer", where)
    if answer.strip().lower() not in ("yes", "no"):
        raise UserError(f"{where}: answer must be yes or no, found {answer!r}")
    return answer.strip().lower(), ()


def score(items: list[Item], answers: list[Answer], replies: Replies | None, parser: str, settings: Settings) -> Score:
    """Counts under one rule, and the number right under each. A question without an answer is not right."""
    texts = {answer.id: answer.text for answer in answers}
    readings = {item.id: RULES[parser](texts[item.id]) for item in items if item.id in texts}
    rows, outcomes = [], {}
    for item in items:
        counts = {"n": 1.0}
        if item.id in readings:
            reading = readings[item.id]
            cell = confusion(reading, item.truth)
            outcomes[item.id] = float(reading == item.truth)
            counts |= {"answered": 1.0, "right": outcomes[item.id], cell or "undecided": 1.0}
        rows.append((item.cluster, counts))
    undecided = sum(reading not in ("yes", "no") for reading in readings.values())
    missing = len(items) - len(readings)
    notes = [f"{undecided} of {len(readings)} answers are neither yes nor no under {parser}; they count as wrong."]
    if missing:
        notes.append(f"{missing} of {len(items)} questions have no answer; they count as wrong.")
    return Score(
        official={
            name: sum(item.id in texts and rule(texts[item.id]) == item.truth for item in items)
            for name, rule in RULES.items()
        },
        sums=Sums.of(rows, ("n", "answered", "right", "undecided", *CONFUSION), _figures),
        outcomes=outcomes,
        readings=readings,
        counts={"rows": len(items), "answers": len(readings), "undecided": undecided, "missing": missing},
        notes=notes if undecided else notes[1:],
    )


def _figures(sums: Totals) -> dict[str, Any]:
    return {
        "accuracy": ratio(sums["right"], sums["n"]),
        **confusion_figures(sums),
        "yes_ratio": ratio(sums["TP"] + sums["FP"], sums["answered"]),
        "undecided": ratio(sums["undecided"], sums["answered"]),
    }
