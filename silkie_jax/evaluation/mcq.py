"""Multiple choice of your own: JSON lines {id, image, question, options, answer, response}, by any tool's rule.

There is no official scorer; `official` has the number of right answers under every rule (`rules/letters.py`).
"""

from pathlib import Path
from typing import Any

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import About, Answer, Decoding, Figure, Item, Replies, Score, Settings
from silkie_jax.evaluation.rules.letters import RULES, letters_of
from silkie_jax.evaluation.rules.sums import Sums, Totals, ratio
from silkie_jax.evaluation.running.files import field
from silkie_jax.evaluation.running.generic import read_questions, read_responses
from silkie_jax.evaluation.running.records import kind, text_field

ABOUT = About(
    title="multiple choice",
    data="JSON lines {id, image, question, options, answer}, answer a letter; images beside the file or in images/",
    figures=(Figure("accuracy", 1.0),),
    decoding=Decoding(max_new_tokens=16),
    prompts={
        "llava": "question, lettered options, LLaVA's request for the letter",
        "question": "question and lettered options",
    },
    parsers=tuple(RULES),
    answers_hold_data=True,
)


def items(data: Path, settings: Settings) -> list[Item]:
    """The questions of a JSON-lines file (a JSON list does too).

    Raises:
        UserError: a record is not of the form.
    """
    return read_questions(data, _truth)


def prompt(item: Item, style: str) -> str:
    """The question and its options, "A. .." a line; LLaVA's style asks for the letter."""
    lines = [item.question]
    lines += [f"{letter}. {content}" for letter, content in zip(letters_of(item.options), item.options, strict=True)]
    if style == "llava":
        lines.append("Answer with the option's letter from the given choices directly.")
    return "\n".join(lines)


def read_answers(path: Path, items: list[Item] | None, settings: Settings) -> tuple[list[Item], list[Answer]]:
    """Responses {id, response}, which hold the questions too where no data is given.

    Raises:
        UserError: a record is not of the form.
    """
    return read_responses(path, items, _truth)


def _truth(record: dict[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    options = field(record, "options", where)
    if not isinstance(options, list) or not 2 <= len(options) <= 26:
        found = f"{len(options)} of them" if isinstance(options, list) else kind(options)
        raise UserError(f"{where}: options must be a list of 2 to 26 texts, found {found}")
    wrong = next((option for option in options if not isinstance(option, str)), None)
    if wrong is not None or None in options:
        raise UserError(f"{where}: options must be texts, found {kind(wrong)}")
    answer = text_field(record, "answer", where)
    if len(answer) != 1 or answer not in letters_of(options):
        raise UserError(f"{where}: answer must be a letter from A to {letters_of(options)[-1]}, found {answer!r}")
    return answer, tuple(options)


def score(items: list[Item], answers: list[Answer], replies: Replies | None, parser: str, settings: Settings) -> Score:
    """Counts under one rule, and the number right under each. A question without an answer is not right."""
    texts = {answer.id: answer.text for answer in answers}
    readings = {item.id: RULES[parser](texts[item.id], item.options) for item in items if item.id in texts}
    rows, outcomes = [], {}
    for item in items:
        counts = {"n": 1.0}
        if item.id in readings:
            outcomes[item.id] = float(readings[item.id] == item.truth)
            counts |= {
                "answered": 1.0,
                "right": outcomes[item.id],
                "undecided": float(readings[item.id] is None),
            }
        rows.append((item.cluster, counts))
    undecided = sum(reading is None for reading in readings.values())
    missing = len(items) - len(readings)
    notes = [f"{undecided} of {len(readings)} answers name no option under {parser}; they count as wrong."]
    if missing:
        notes.append(f"{missing} of {len(items)} questions have no answer; they count as wrong.")
    return Score(
        official={
            name: sum(item.id in texts and rule(texts[item.id], item.options) == item.truth for item in items)
            for name, rule in RULES.items()
        },
        sums=Sums.of(rows, ("n", "answered", "right", "undecided"), _figures),
        outcomes=outcomes,
        readings={key: reading or "other" for key, reading in readings.items()},
        counts={"rows": len(items), "answers": len(readings), "undecided": undecided, "missing": missing},
        notes=notes if undecided else notes[1:],
    )


def _figures(sums: Totals) -> dict[str, Any]:
    return {
        "accuracy": ratio(sums["right"], sums["n"]),
        "undecided": ratio(sums["undecided"], sums["answered"]),
    }
