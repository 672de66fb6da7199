"""HallusionBench (Guan et al. 2023, arXiv 2310.14566): yes/no questions on original and edited figures, judged.

Source: tianyi-lab/HallusionBench, `evaluation.py` and `utils.py`. Its "easy aAcc" and "hard aAcc" are not per question:
they are the share of question pairs that are all right within the original or within the edited figures.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
from silkie_jax.evaluation.rules import yesno
from silkie_jax.evaluation.rules.sums import Sums, Totals, ratio
from silkie_jax.evaluation.rules.verdicts import RIGHT, UNCLEAR, WRONG, blame, read_same, read_verdict
from silkie_jax.evaluation.running.files import FilePicture, read_json
from silkie_jax.evaluation.running.records import id_field, kind, optional_text, text_field

ABOUT = About(
    title="HallusionBench",
    data="HallusionBench.json, or the folder that holds it, with {category}/{subcategory}/{set}_{figure}.png beside it "
    "or in hallusion_bench/",
    figures=(Figure("aAcc", 100.0), Figure("qAcc", 100.0), Figure("fAcc", 100.0), Figure("mean", 100.0)),
    decoding=Decoding(max_new_tokens=512),
    prompts={"official": "the question as it stands"},
    parsers=("official", "vlmevalkit", "lmms-eval"),
    judge="gpt-4",
    answers_hold_data=True,
)
_GROUPS = ("question", "pair", "figure", "easy", "hard")
_SAVED = ("hallusion_output_vd_model.json", "hallusion_output_vs_model.json")


def items(data: Path, settings: Settings) -> list[Item]:
    """The questions, in the order of the file.

    Raises:
        UserError: a row is not of the form, or there twice.
    """
    file = data / "HallusionBench.json" if data.is_dir() else data
    return [_item(row, where, file.parent) for where, row in _rows(file).values()]


def prompt(item: Item, style: str) -> str:
    """The question alone; rows without a figure are asked without one."""
    return item.question


def read_answers(path: Path, items: list[Item] | None, settings: Settings) -> tuple[list[Item], list[Answer]]:
    """`HallusionBench_result.json`: the data's rows with `model_prediction`; saved verdicts are kept.

    A folder holds the two files that the official tool saves.

    Raises:
        UserError: a row is not of the form, there twice, or not in the data.
    """
    rows: dict[str, tuple[str, dict[str, Any]]] = {}
    for file in [path / name for name in _SAVED] if path.is_dir() else [path]:
        rows |= _rows(file)
    answers = []
    known = None if items is None else {item.id for item in items}
    for key, (where, row) in rows.items():
        if known is not None and key not in known:
            raise UserError(f"{where}: no question {key} in the data; is --data of the same release?")
        stored = {name: _verdict(row, field, where) for name, field in _STORED if row.get(field) is not None}
        answers.append(Answer(key, text_field(row, "model_prediction", where), stored))
    return [_item(row, where, path.parent) for where, row in rows.values()] if items is None else items, answers


_STORED = (("verdict", "correct"), ("verdict", "gpt4v_output_gpt_check"), ("same", "same"))
"""What an answer's fields call a saved digit, and what the tool does; `correct` knows no "unclear"."""


def _verdict(row: dict[str, Any], name: str, where: str) -> str:
    digit = id_field(row, name, where)
    if digit not in (WRONG, RIGHT, UNCLEAR):
        raise UserError(f"{where}: {name} must be 0, 1 or 2, found {digit!r}")
    return digit


def _rows(file: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Key -> (where, row); keys are category_subcategory_set_figure_question."""
    found = read_json(file)
    if not isinstance(found, list) or not found:
        raise UserError(f"{file}: expected a JSON list of rows, found {kind(found) if found != [] else 'an empty one'}")
    rows: dict[str, tuple[str, dict[str, Any]]] = {}
    for number, row in enumerate(found, start=1):
        where = f"{file}: row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object, found {kind(row)}")
        if row.get("category") not in ("VD", "VS"):
            raise UserError(f"{where}: category must be VD or VS, found {row.get('category')!r}")
        key = "_".join(id_field(row, name, where) for name in _KEY)
        if key in rows:
            raise UserError(f"{where}: {key} again, after {rows[key][0].rpartition(': ')[2]}; take one out")
        rows[key] = (where, row)
    return rows


_KEY = ("category", "subcategory", "set_id", "figure_id", "question_id")


def _item(row: dict[str, Any], where: str, folder: Path) -> Item:
    fields = {name: id_field(row, name, where) for name in (*_KEY, "visual_input", "gt_answer")}
    fields["where"] = where
    fields["details"] = optional_text(row, "gt_answer_details", where) or ""
    for name, allowed in (("gt_answer", "01"), ("visual_input", "012")):
        if fields[name] not in tuple(allowed):
            raise UserError(f"{where}: {name} must be one of {', '.join(allowed)}, found {fields[name]!r}")
    category, subcategory, set_id, figure, _ = (fields[name] for name in _KEY)
    name = f"{category}/{subcategory}/{set_id}_{figure}.png"
    picture = FilePicture(name, (folder / name, folder / "hallusion_bench" / name), "from hallusion_bench.zip")
    return Item(
        "_".join(fields[name] for name in _KEY),
        text_field(row, "question", where),
        () if fields["visual_input"] == "0" else (picture,),
        fields["gt_answer"],
        category,
        fields=fields,
    )


def _pair(item: Item) -> str:
    return "_".join(item.fields[name] for name in ("category", "subcategory", "set_id", "question_id"))


def _without_figure(item: Item) -> bool:
    """What may be answered by "I cannot tell": the question of a VS set before there is a figure."""
    return item.part == "VS" and item.fields["figure_id"] == "0"


def _originals(items: list[Item]) -> dict[str, Item]:
    originals = {_pair(item): item for item in items if item.fields["figure_id"] == "0"}
    for item in items:
        if _pair(item) not in originals:
            raise UserError(
                f"{item.fields['where']}: {item.id}: its original figure is missing: no row of question {_pair(item)} "
                "with figure_id 0 and an answer"
            )
    return originals


def dialogues(items: list[Item], answers: list[Answer], settings: Settings) -> dict[str, Dialogue]:
    """Two requests an answer: is it right, and does it say the same as the answer on the original figure?

    The second feeds LH, VI and Mixed only. Answers with saved verdicts are not asked about.

    Raises:
        UserError: a question has no row, or no answer, for its original figure.
    """
    given = {answer.id: answer for answer in answers}
    originals = _originals([item for item in items if item.id in given])
    asked = [item for item in items if item.id in given and "verdict" not in given[item.id].fields]
    return {item.id: _dialogue(item, given[item.id].text, given[originals[_pair(item)].id].text) for item in asked}


def _dialogue(item: Item, text: str, original: str) -> Dialogue:
    def ask(replies: Sequence[str]) -> Ask | None:
        if not replies:
            return Ask(_CORRECTNESS.format(question=item.question, truth=item.fields["details"], text=text), **_JUDGE)
        return Ask(_SAME.format(text=text, original=original), **_JUDGE) if len(replies) == 1 else None

    return ask


_JUDGE: dict[str, Any] = {"temperature": 1.0}  # the API's default, which the tool leaves as it is
_CORRECTNESS = """\
You grade answers as a careful teacher does. Read the question, the reference answer and the prediction.
Reply "correct" if the prediction agrees with the reference answer, "incorrect" if it contradicts it, and "unclear" if \
it does not commit itself to an answer.

Question: {question}
Reference answer: {truth}
Prediction: {text}
Verdict:"""
_SAME = """\
You compare answers as a careful teacher does. Below are two responses to two questions that you are not shown.
Reply "same" if both can be true together, and "different" if they contradict each other.

Response 1: {text}
Response 2: {original}
Verdict:"""


def official_replies(raw: Any, items: list[Item], answers: list[Answer]) -> dict[str, list[str]]:
    """{"correctness": {key: reply}, "same": {key: reply}} as the replies of each dialogue.

    Raises:
        UserError: it is not of this form.
    """
    parts = [raw.get(name) if isinstance(raw, dict) else None for name in ("correctness", "same")]
    for name, part in zip(("correctness", "same"), parts, strict=True):
        if not isinstance(part, dict) or not all(isinstance(reply, str) for reply in part.values()):
            raise UserError(f"judge's replies: {name!r} must be an object of texts, found {kind(part)}")
    correctness, same = (part or {} for part in parts)
    return {key: [reply, *([same[key]] if key in same else [])] for key, reply in correctness.items()}


def score(items: list[Item], answers: list[Answer], replies: Replies | None, parser: str, settings: Settings) -> Score:
    """aAcc, qAcc, fAcc and the tool's other figures.

    `vlmevalkit` takes yes or no as a word instead of a judge, `lmms-eval` takes the judge's verdicts; both leave out
    the rows without a figure.

    Raises:
        UserError: a question has no row for its original figure, or a judge is needed and has not been asked.
    """
    given = {answer.id: answer for answer in answers}
    items_ = [item for item in items if item.id in given]
    missing = len(items) - len(items_)
    runs = replies.runs if replies else ()
    said = runs[0] if runs else {}
    verdicts = {item.id: _judged(given[item.id], said.get(item.id, ())) for item in items_}
    failed = [key for key, (verdict, _) in verdicts.items() if verdict is None]
    judged = len(failed) < len(items_)
    if parser != "vlmevalkit" and not judged:
        raise UserError(f"{parser} needs the judge's replies, and there are none; parser vlmevalkit needs no judge")
    notes = []
    official: dict[str, Any] = {}
    if judged:
        official, official_notes = _official(items_, _originals(items_), verdicts)
        notes += official_notes
        if failed:
            notes.append(f"{len(failed)} answers have no usable reply of the judge; they count as unclear.")
    if missing:
        notes.append(f"{missing} of {len(items)} questions have no answer; they are in no figure.")
    if len(runs) > 1:
        notes.append(f"{len(runs)} runs of the judge; the first is scored.")
    if parser == "vlmevalkit":
        readings = {item.id: yesno.vlmevalkit(given[item.id].text) for item in items_}
        right = {item.id: readings[item.id] == (yesno.YES if item.truth == "1" else yesno.NO) for item in items_}
    else:
        words = {WRONG: "incorrect", RIGHT: "correct", UNCLEAR: "unclear", None: "unclear"}
        readings = {key: words[verdict] for key, (verdict, _) in verdicts.items()}
        right = {item.id: _is_right(item, verdicts[item.id][0]) for item in items_}
    scored = items_ if parser == "official" else [item for item in items_ if item.pictures]
    if len(scored) < len(items_):
        notes.append(f"{parser} leaves out {len(items_) - len(scored)} rows without a figure.")
    return Score(
        official=official,
        sums=Sums.of(_counts(scored, right), [f"{g}{end}" for g in _GROUPS for end in ("", " right")], _figures),
        outcomes={item.id: float(right[item.id]) for item in scored},
        readings={item.id: readings[item.id] for item in scored},
        counts={
            "rows": len(items),
            "answers": len(items_),
            "undecided": sum(readings[item.id] in ("unclear", yesno.UNKNOWN) for item in scored),
            "missing": missing,
            "without a verdict": len(failed),
        },
        notes=notes,
    )


def _judged(answer: Answer, replies: Sequence[str]) -> tuple[str | None, str | None]:
    """(verdict, whether it says the same as the original's), saved ones first; None: not there."""
    verdict = read_verdict(replies[0]) if replies else None
    same = (RIGHT if read_same(replies[1]) else WRONG) if len(replies) > 1 else None
    return answer.fields.get("verdict", verdict), answer.fields.get("same", same)


def _is_right(item: Item, verdict: str | None) -> bool:
    return verdict == RIGHT or (_without_figure(item) and verdict != WRONG)


def _groups(item: Item) -> list[tuple[str, str]]:
    """(kind, name) of the groups that are right if all in them are."""
    pair = _pair(item)
    groups = [("question", item.id), ("pair", pair), ("hard" if item.fields["visual_input"] == "2" else "easy", pair)]
    if not _without_figure(item):
        groups.append(("figure", "_".join(item.fields[name] for name in _KEY[:4])))
    return groups


def _counts(items: list[Item], right: Mapping[str, bool]) -> Iterable[tuple[str, dict[str, float]]]:
    """Groups and those all right, by set: a pair of questions spans the figures of its set, so sets are drawn."""
    groups: dict[tuple[str, str], tuple[str, list[bool]]] = {}
    for item in items:
        unit = "/".join(item.fields[name] for name in _KEY[:3])
        for group in _groups(item):
            groups.setdefault(group, (unit, []))[1].append(right[item.id])
    for (kind_, _), (unit, oks) in groups.items():
        yield unit, {kind_: 1.0, f"{kind_} right": float(all(oks))}


def _figures(sums: Totals) -> dict[str, Any]:
    names = {"question": "aAcc", "pair": "qAcc", "figure": "fAcc", "easy": "easy aAcc", "hard": "hard aAcc"}
    figures = {name: 100 * ratio(sums[f"{group} right"], sums[group]) for group, name in names.items()}
    return figures | {"mean": (figures["aAcc"] + figures["qAcc"] + figures["fAcc"]) / 3}


def _official(
    items: list[Item], originals: Mapping[str, Item], verdicts: Mapping[str, tuple[str | None, str | None]]
) -> tuple[dict[str, Any], list[str]]:
    """The tool's figures by its own operations, and notes on those that it would stop at: they are None."""
    notes = []
    right = {item.id: _is_right(item, verdicts[item.id][0]) for item in items}
    totals: dict[str, float] = {}
    for _, counts in _counts(items, right):
        for name, value in counts.items():
            totals[name] = totals.get(name, 0.0) + value
    figures: dict[str, list[bool]] = {}
    for item in items:
        for group, name in _groups(item):
            if group == "figure":
                figures.setdefault(name, []).append(right[item.id])
    consistent = sum(all(oks) for oks in figures.values())
    wrong = sum(not any(oks) for oks in figures.values())
    said_yes = sum(right[item.id] == (item.truth == "1") for item in items)
    yes = sum(item.truth == "1" for item in items)
    faults = [item for item in items if not right[item.id]]
    causes = [
        blame(
            item.part,
            item.fields["figure_id"] != "0",
            item.fields["visual_input"] == "2",
            verdicts[item.id][0] or UNCLEAR,
            verdicts[originals[_pair(item)].id][0] or UNCLEAR,
            verdicts[item.id][1] == RIGHT,
        )
        for item in items
    ]
    blamed = {name: causes.count(name) for name in ("LH", "VI", "Mixed")}
    if not faults:
        notes.append("No answer is wrong: FP Ratio and LH, VI and Mixed are undefined (the official tool stops there).")
    uncompared = sum(
        same is None and verdict == WRONG for same, verdict in ((verdicts[i.id][1], verdicts[i.id][0]) for i in items)
    )
    if uncompared:
        notes.append(f"{uncompared} wrong answers were not compared to the original's: taken for different ones.")
    return {
        **{
            title: _percent(totals.get(f"{group} right", 0.0), totals.get(group, 0.0))
            for title, group in (
                ("Acc per question pair (qAcc)", "pair"),
                ("Acc per figure (fAcc)", "figure"),
                ("Acc per easy question (easy aAcc)", "easy"),
                ("Acc per hard question (hard aAcc)", "hard"),
                ("Acc per question (aAcc)", "question"),
            )
        },
        "Yes/No Bias (Pct Diff)": said_yes / len(items) - yes / len(items),
        "Yes/No Bias (FP Ratio)": sum(item.truth == "0" for item in faults) / len(faults) if faults else None,
        "Consistency Test (correct)": _percent(consistent, len(figures)),
        "Consistency Test (inconsistent)": _percent(len(figures) - consistent - wrong, len(figures)),
        "Consistency Test (wrong)": _percent(wrong, len(figures)),
        **{name: _percent(count, sum(blamed.values())) for name, count in blamed.items()},
    }, notes


def _percent(part: float, whole: float) -> float | None:
    return round(100 * part / whole, 4) if whole else None
