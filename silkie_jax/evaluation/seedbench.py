"""SEED-Bench (Li et al. 2023, arXiv 2307.16125): four choices, by the likelihood of their contents or by a letter.

Sources: AILab-CVC/SEED-Bench (`eval.py`, and `SEED-Bench-2/model/` for Qwen-VL-Chat: prompt without ChatML, mean loss
over a choice's tokens), whose own tool prints no accuracy; haotian-liu/LLaVA `scripts/convert_seed_for_submission.py`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import About, Answer, Decoding, Figure, Item, Replies, Score, Settings
from silkie_jax.evaluation.rules.letters import exact_letter, first_character, letters_of, vlmevalkit_letter
from silkie_jax.evaluation.rules.sums import Sums, Totals, ratio
from silkie_jax.evaluation.running.files import FilePicture, field, read_json
from silkie_jax.evaluation.running.records import Record, id_field, kind, read_records, text_field

ABOUT = About(
    title="SEED-Bench",
    data="SEED-Bench.json, or the folder that holds it, with the images in SEED-Bench-image/",
    figures=(Figure("image", 100.0), Figure("total", 100.0)),
    decoding=Decoding(max_new_tokens=16),
    prompts={
        "official": "the question; the choices' contents follow it directly, without ChatML",
        "qwen": "Qwen's eval_mm: question and lettered options; the letters follow it",
        "llava": "question, lettered options, the request for the letter: an answer is generated",
        "instructblip": "Question: .. Answer: as the authors ask InstructBLIP; the choices' contents follow it",
    },
    parsers=("official", "likelihood-sum", "vlmevalkit", "lmms-eval"),
    settings={"dimensions": "image: dimensions 1 to 9 alone; all (the default): those of videos, too"},
    answers_hold_data=True,
    likelihood=True,
)
_RULES: dict[str, Callable[[str, Sequence[str]], str | None]] = {
    "official": exact_letter,
    "likelihood-sum": exact_letter,
    "vlmevalkit": vlmevalkit_letter,
    "lmms-eval": first_character,
}
_OPTIONS = ("choice_a", "choice_b", "choice_c", "choice_d")
_LLAVA, _LEADERBOARD, _LOSSES = "llava", "leaderboard", "losses"


def items(data: Path, settings: Settings) -> list[Item]:
    """The questions; those of videos have no picture.

    Raises:
        UserError: the file is not of the form, or a question id is there twice.
    """
    file = data / "SEED-Bench.json" if data.is_dir() else data
    found = read_json(file)
    parts = [found.get(name) if isinstance(found, dict) else None for name in ("question_type", "questions")]
    dimensions, questions = parts
    if not isinstance(dimensions, dict) or not isinstance(questions, list) or not questions:
        raise UserError(f"{file}: expected an object of question_type and questions, as in SEED-Bench.json")
    if settings.get("dimensions", "all") not in ("all", "image"):
        raise UserError(f"dimensions must be all or image, found {settings['dimensions']!r}")
    names = {id_field(dimensions, name, f"{file}: question_type"): name for name in dimensions}
    items = [_item(row, f"{file}: question {k}", names, file.parent) for k, row in enumerate(questions, start=1)]
    seen: set[str] = set()
    for k, item in enumerate(items, start=1):
        if item.id in seen:
            raise UserError(f"{file}: question {k}: question_id {item.id!r} again; take one out")
        seen.add(item.id)
    if settings.get("dimensions") == "image":
        items = [item for item in items if item.fields["data_type"] == "image"]
    return items


def _item(row: Any, where: str, names: dict[str, str], folder: Path) -> Item:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {kind(row)}")
    dimension, data_type = id_field(row, "question_type_id", where), text_field(row, "data_type", where)
    answer = text_field(row, "answer", where)
    if dimension not in names:
        raise UserError(f"{where}: question_type_id {dimension} is not in question_type")
    if answer not in tuple("ABCD"):
        raise UserError(f"{where}: answer must be A, B, C or D, found {answer!r}")
    image = id_field(row, "data_id", where)
    places = (folder / "SEED-Bench-image" / image, folder / image, folder / "images" / image)
    return Item(
        id_field(row, "question_id", where),
        text_field(row, "question", where),
        (FilePicture(image, places, "from SEED-Bench-image.zip"),) if data_type == "image" else (),
        answer,
        names[dimension],
        tuple(str(field(row, name, where)) for name in _OPTIONS),
        {"data_type": data_type, "dimension": int(dimension) if dimension.isdecimal() else dimension},
    )


def prompt(item: Item, style: str) -> str:
    """What precedes an answer; `continuations` are what is compared under the styles of likelihoods."""
    lettered = [f"{letter}. {content}" for letter, content in zip(letters_of(item.options), item.options, strict=True)]
    match style:
        case "qwen":
            return "\n".join([f"Question: {item.question}", f"Options: {lettered[0]}", *lettered[1:], "Answer:"])
        case "llava":
            ask = "Answer with the option's letter from the given choices directly."
            return "\n".join([item.question, *lettered, ask])
        case "instructblip":
            return f"Question: {item.question}\nAnswer:"
        case _:
            return item.question


def continuations(item: Item, style: str) -> tuple[str, ...]:
    """What follows the prompt for each option, when their likelihoods are compared; none where a letter is generated.

    The authors' Qwen-VL adapter joins prompt and content without a space.
    """
    match style:
        case "qwen":
            return tuple(f" {letter}" for letter in letters_of(item.options))
        case "llava":
            return ()
        case "instructblip":
            return tuple(f" {content}" for content in item.options)
        case _:
            return item.options


def answerable(item: Item) -> bool:
    """Whether a model of images can be asked: questions about videos are for scoring other people's files."""
    return item.fields.get("data_type", "image") == "image"


def read_answers(path: Path, items: list[Item] | None, settings: Settings) -> tuple[list[Item], list[Answer]]:
    """LLaVA's {question_id, text}, the leaderboard's {question_id, prediction}, or losses of the choices' tokens.

    All as JSON lines, with commas after them or in a list. The last of repeated ids counts. Only files that have
    `gt_answer`, as the authors publish them, can do without data, and then have a total alone.

    Raises:
        UserError: a record is not of the form, or there is no data where it is needed.
    """
    records = read_records(path)
    form = next((f for f, key in _FORMS.items() if key in records[0][1]), None)
    if form is None:
        names = ", ".join(_FORMS.values())
        raise UserError(f"{records[0][0]}: expected question_id with one of {names}; found {', '.join(records[0][1])}")
    if items is None:
        items = _from_truths(records, path)
    known = {item.id: item for item in items}
    answers: dict[str, Answer] = {}
    exact: dict[Any, str] = {}
    for where, record in records:
        number = id_field(record, "question_id", where)
        times = 1 + (answers[number].fields["times"] if number in answers else 0)
        fields: dict[str, Any] = {"form": form, "times": times}
        if form == _LOSSES:
            fields["losses"] = _losses(record, where, len(known[number].options) if number in known else 4)
            text = ""
        else:
            text = text_field(record, _FORMS[form], where)
        if form == _LLAVA:  # LLaVA's script looks for integers: a text "12" is not question 12 to it
            exact[record["question_id"]] = text
            fields["exact"] = exact.get(_as_llava_asks(number))
        answers[number] = Answer(number, text, fields)
    return items, list(answers.values())


_FORMS = {_LOSSES: "token_losses_of_choices", _LEADERBOARD: "prediction", _LLAVA: "text"}


def _as_llava_asks(number: str) -> int | str:
    try:
        return int(number)
    except ValueError:
        return number


def _from_truths(records: list[Record], path: Path) -> list[Item]:
    if "gt_answer" not in records[0][1]:
        raise UserError(f"{path}: these answers do not hold the right ones; name SEED-Bench.json with --data")
    truths = {id_field(row, "question_id", where): text_field(row, "gt_answer", where) for where, row in records}
    return [Item(number, "", (), truth, "", tuple("ABCD"), {"data_type": ""}) for number, truth in truths.items()]


def _losses(record: dict[str, Any], where: str, count: int) -> list[list[float]]:
    name = _FORMS[_LOSSES]
    losses = field(record, name, where)
    if not isinstance(losses, list) or len(losses) != count:
        found = f"{len(losses)} lists" if isinstance(losses, list) else kind(losses)
        raise UserError(f"{where}: {name} must be {count} lists of losses, one a choice; found {found}")
    for tokens in losses:
        if not isinstance(tokens, list) or not tokens or not all(type(x) in (int, float) for x in tokens):
            raise UserError(f"{where}: {name} must be lists of one number or more a choice")
    return losses


def score(items: list[Item], answers: list[Answer], replies: Replies | None, parser: str, settings: Settings) -> Score:
    """Accuracy in per cent over questions: total, image (dimensions 1-9), video, and by dimension.

    A question without an answer is not right, but under lmms-eval, which divides by the answered ones. Losses are
    compared by their mean over tokens, in float32, the first of equals; `likelihood-sum` adds them up.
    """
    given = {answer.id: answer for answer in answers}
    readings = {item.id: _reading(given[item.id], item, parser) for item in items if item.id in given}
    rows = []
    for item in items:
        if item.id in readings or parser != "lmms-eval":
            right = float(readings.get(item.id) == item.truth)
            counts = {f"n {place}": 1.0 for place in _places(item)} | {
                f"right {place}": right for place in _places(item)
            }
            rows.append((item.cluster, counts))
    places = dict.fromkeys(["total", "image", "video", *(place for item in items for place in _places(item))])
    undecided = sum(reading is None for reading in readings.values())
    missing = len(items) - len(readings)
    unknown = len(given.keys() - {item.id for item in items})
    repeated = sum(answer.fields.get("times", 1) > 1 for answer in answers)
    notes = []
    if undecided:
        notes.append(f"{undecided} of {len(readings)} answers are no letter under {parser}; they count as wrong.")
    if missing:
        how = "they are in no figure" if parser == "lmms-eval" else "they count as wrong"
        notes.append(f"{missing} of {len(items)} questions have no answer; {how}.")
    if unknown:
        notes.append(f"{unknown} answers are to no question of the data; they are left out.")
    if repeated:
        notes.append(f"{repeated} questions were answered more than once; the last answer counts.")
    by_script = readings
    if parser != "official":
        by_script = {key: _reading(given[key], item, "official") for item in items if (key := item.id) in given}
    official, official_notes = _official(items, given, by_script)
    return Score(
        official=official,
        sums=Sums.of(rows, [f"{n} {place}" for place in places for n in ("n", "right")], _figures),
        outcomes={item.id: float(readings[item.id] == item.truth) for item in items if item.id in readings},
        readings={key: reading or "other" for key, reading in readings.items()},
        counts={
            "rows": len(items),
            "answers": len(readings),
            "undecided": undecided,
            "missing": missing,
            "repeated": repeated,
            "to no question": unknown,
        },
        notes=notes + official_notes,
    )


def _places(item: Item) -> tuple[str, ...]:
    """What a question is counted under; the authors' published files say nothing of dimensions."""
    return ("total", item.fields["data_type"], f"dimensions/{item.part}") if item.part else ("total",)


def _figures(sums: Totals) -> dict[str, Any]:
    places = [name.removeprefix("n ") for name in sums if name.startswith("n ")]
    return {place: 100 * ratio(sums[f"right {place}"], sums[f"n {place}"]) for place in places}


def _reading(answer: Answer, item: Item, parser: str) -> str | None:
    losses = answer.fields.get("losses")
    if losses is None:
        return _RULES[parser](answer.text, item.options)
    add_up = np.sum if parser == "likelihood-sum" else np.mean
    found = np.array([add_up(np.asarray(tokens, np.float32)) for tokens in losses])
    return letters_of(item.options)[int(np.argsort(found, kind="stable")[0])]


def _official(
    items: list[Item], given: dict[str, Answer], readings: dict[str, str | None]
) -> tuple[dict[str, Any], list[str]]:
    """The figures of the script that an answers' form belongs to."""
    first = next(iter(given.values()), Answer("", ""))
    form = first.fields.get("form", _LOSSES if "losses" in first.fields else _LLAVA)
    if form == _LLAVA:
        return _llava_script(items, {key: answer.fields.get("exact", answer.text) for key, answer in given.items()})
    right = {item.id: readings.get(item.id) == item.truth for item in items}

    def count(chosen: list[Item]) -> list[int]:
        return [sum(right[item.id] for item in chosen), len(chosen)]

    groups: dict[str, list[Item]] = {}
    for item in items:
        for name in (item.fields["data_type"], str(item.fields.get("dimension", ""))):
            groups.setdefault(name, []).append(item)
    if form == _LOSSES:
        return {"likelihood_mean_image": count(groups.get("image", []))}, []
    by_dimension = {name: count(group) for name, group in groups.items() if name.isdecimal()}
    named = {name: count(groups[name]) for name in ("image", "video") if name in groups}
    official: dict[str, Any] = {"leaderboard_form": {"all": count(items), **named}}
    return official | ({"leaderboard_form_by_dimension": by_dimension} if by_dimension else {}), []


def _llava_script(items: list[Item], texts: dict[str, str | None]) -> tuple[dict[str, Any], list[str]]:
    """Per cent to two decimals, of all questions; letters must be exact, ids integers wherever they can be."""
    groups: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda item: str(item.fields["dimension"]).zfill(9)):
        groups.setdefault(item.part, []).append(item)
    groups["Total"] = items
    for name in ("image", "video"):
        groups[name] = [item for item in items if item.fields["data_type"] == name]
    official: dict[str, Any] = {
        name: float(f"{sum(texts.get(item.id) == item.truth for item in group) / len(group) * 100:.2f}")
        for name, group in groups.items()
        if group
    }
    if any(item.id not in texts for item in items):
        official["upload_file"] = "KeyError for a question without an answer"
    overlooked = sum(text is None for text in texts.values())
    notes = [f"llava_script does not find {overlooked} answers whose question_id is a text of digits."]
    return {"llava_script": official}, notes if overlooked else []
