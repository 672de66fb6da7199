"""MME (Fu et al. 2023, arXiv 2306.13394): 14 tasks of yes/no questions, two for an image; scored as by its eval_tool.

Source: branch Evaluation of BradyFU/Awesome-Multimodal-Large-Language-Models, `tools/eval_tool.zip`, `calculation.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import About, Answer, Decoding, Figure, Item, Replies, Score, Settings
from silkie_jax.evaluation.rules import yesno
from silkie_jax.evaluation.rules.sums import Sums, Totals, ratio
from silkie_jax.evaluation.running.files import FilePicture, read_lines

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = PERCEPTION + COGNITION
GROUPS = {
    "perception": PERCEPTION,
    "cognition": COGNITION,
    "groups/coarse": PERCEPTION[:4],
    "groups/fine": PERCEPTION[4:9],
    "groups/OCR": PERCEPTION[9:],
}
"""Sums of tasks; coarse and fine grained perception as in the paper."""

_SENTENCE = " Please answer yes or no."
_SHORT = "\nAnswer the question using a single word or phrase."

ABOUT = About(
    title="MME",
    data="MME_Benchmark_release_version: a folder for each task, with eval_tool/Your_Results (or that folder itself: "
    "14 files {task}.txt), or with {image}.txt beside the images or in questions_answers_YN/",
    figures=(Figure("perception", 2000.0), Figure("cognition", 800.0)),
    decoding=Decoding(max_new_tokens=16),
    prompts={
        "official": "the question as it stands, which asks for yes or no",
        "lmms-eval": 'its last sentence replaced by "Answer the question using a single word or phrase."',
        "llava": "the same as lmms-eval",
    },
    parsers=("official", "vlmevalkit", "lmms-eval"),
    settings={
        "tasks": "some of the 14, with commas between, where the others are not to be had or not wanted: "
        "existence,count,position,color is what papers call the hallucination subset"
    },
    answers_hold_data=True,
)
_RULES: dict[str, Callable[[str], str]] = {
    "official": yesno.mme_official,
    "vlmevalkit": yesno.vlmevalkit,
    "lmms-eval": yesno.mme_lmms_eval,
}


def items(data: Path, settings: Settings) -> list[Item]:
    """The questions of a release folder, in the order of the tasks and of the files.

    Raises:
        UserError: a task is missing, or a file is not of the form.
    """
    tasks = wanted_tasks(settings)
    for forms in (data / "eval_tool" / "Your_Results", data / "Your_Results", data):
        if any((forms / f"{task}.txt").is_file() for task in tasks):
            return [item for item, _ in _read_folder(forms, _bases(data, forms), tasks, answered=False)]
    return list(_from_pictures(data, tasks))


def wanted_tasks(settings: Settings) -> tuple[str, ...]:
    """The tasks that are asked, in MME's order.

    Raises:
        UserError: the setting names none, or one that MME does not have.
    """
    if "tasks" not in settings:
        return TASKS
    named = [name.strip() for name in settings["tasks"].split(",") if name.strip()]
    if unknown := [name for name in named if name not in TASKS]:
        raise UserError(f"tasks={settings['tasks']}: MME has no task {unknown[0]!r}; it has {', '.join(TASKS)}")
    if not named:
        raise UserError("tasks is empty; name some of MME's, or leave it out")
    return tuple(task for task in TASKS if task in named)


def prompt(item: Item, style: str) -> str:
    """The question; other styles put LLaVA's last sentence in the place of MME's."""
    return item.question if style == "official" else item.question.strip().replace(_SENTENCE, "") + _SHORT


def read_answers(path: Path, items: list[Item] | None, settings: Settings) -> tuple[list[Item], list[Answer]]:
    """The official form: 14 files {task}.txt of lines `image, question, ground truth, response`, with tabs between.

    With `items` the pictures are theirs; questions and truths are always those of the files.

    Raises:
        UserError: a file is missing or not of the form, or has more or fewer questions than the data.
    """
    if not path.is_dir():
        raise UserError(
            f"{path}: {'not a folder' if path.exists() else 'no such folder'}; name the one of {{task}}.txt"
        )
    tasks = wanted_tasks(settings)
    rows = list(_read_folder(path, (path,), tasks, answered=True))
    if items is not None:
        for task in tasks:
            data, found = (sum(item.part == task for item in group) for group in (items, [item for item, _ in rows]))
            if data != found:
                raise UserError(f"{path / task}.txt: {found} questions, but the data has {data}")
    return [item for item, _ in rows], [Answer(item.id, text) for item, text in rows]


def _bases(data: Path, forms: Path) -> tuple[Path, ...]:
    above = (forms.parent, forms.parent.parent) if forms == data else ()
    return (data, data / "MME_Benchmark_release_version", *above)


def _read_folder(
    folder: Path, bases: tuple[Path, ...], tasks: tuple[str, ...], answered: bool
) -> Iterator[tuple[Item, str]]:
    """(item, response or "") for all lines; what is wrong in a file comes before what is missing."""
    missing = [task for task in tasks if not (folder / f"{task}.txt").is_file()]
    for task in tasks:
        if task not in missing:
            yield from _read_task(folder / f"{task}.txt", task, bases, answered)
    if missing:
        count = len(tasks)
        others = f", nor {len(missing) - 1} more of the {count} tasks" if len(missing) > 1 else ""
        needed = f"all {count} tasks are needed; --set tasks=... names some"
        raise UserError(f"{folder / missing[0]}.txt: no such file{others}; {needed}")


def _read_task(file: Path, task: str, bases: tuple[Path, ...], answered: bool) -> list[tuple[Item, str]]:
    rows = []
    seen: dict[str, int] = {}
    for number, line in enumerate(read_lines(file), start=1):
        where = f"{file}: line {number}"
        columns = line.split("\t")
        if not line.strip():
            raise UserError(f"{where}: blank; take the line out, two lines are one unit")
        if len(columns) == 3 and answered:
            raise UserError(f"{where}: three fields; the responses have not been filled in")
        if len(columns) not in (3, 4):
            names = {1: "one field", 2: "two fields", 5: "five fields"}.get(len(columns), f"{len(columns)} fields")
            raise UserError(f"{where}: {names}; expected image, question, ground truth, response, no tab in any")
        image, question, truth, *response = columns
        if truth.lower() not in (yesno.YES, yesno.NO):
            raise UserError(f"{where}: ground truth must be Yes or No, found {truth!r}")
        seen[image] = seen.get(image, 0) + 1
        picture = FilePicture(f"{task}/{image}", _places(bases, task, image), "from MME_Benchmark_release_version.zip")
        item = Item(
            f"{task}/{image}/{seen[image]}",
            question,
            (picture,),
            truth.lower(),
            task,
            fields={"pair": (number - 1) // 2},
        )
        rows.append((item, "".join(response)))
    if len(rows) % 2:
        raise UserError(f"{file}: an odd number of lines ({len(rows)}); two lines are one unit")
    if not rows:
        raise UserError(f"{file}: empty; every task needs its questions")
    return rows


def _places(bases: tuple[Path, ...], task: str, image: str) -> tuple[Path, ...]:
    inside = {"artwork": f"images/toy_dataset/{image}"}.get(task, f"images/{image}")
    return tuple(base / task / name for base in bases for name in (image, inside))


def _from_pictures(data: Path, tasks: tuple[str, ...]) -> Iterator[Item]:
    """From folders of a task with `{image}.txt`, two lines `question, answer`, where there are no forms."""
    missing = [task for task in tasks if not (data / task).is_dir()]
    if missing:
        raise UserError(
            f"{data}: neither eval_tool/Your_Results, nor {{task}}.txt, nor a folder {missing[0]}/; "
            f"expected {ABOUT.data}"
        )
    for task in tasks:
        files = [file for place in ("", "questions_answers_YN") for file in (data / task / place).glob("*.txt")]
        if not files:
            raise UserError(f"{data / task}: no {{image}}.txt with questions")
        pictures = {
            file.stem: file
            for place in ("", "images", "images/toy_dataset")
            for file in (data / task / place).glob("*")
            if file.suffix.lower() in (".jpg", ".jpeg", ".png")
        }
        pair = 0
        for file in sorted(files, key=lambda file: file.stem):
            lines = read_lines(file)
            picture = pictures.get(file.stem, data / task / f"{file.stem}.jpg")
            if not lines or len(lines) % 2:
                raise UserError(f"{file}: {len(lines)} lines; two questions are one unit")
            for k, line in enumerate(lines):
                question, _, truth = line.partition("\t")
                if truth.strip().lower() not in (yesno.YES, yesno.NO):
                    raise UserError(f"{file}: line {k + 1}: expected a question, a tab and Yes or No, found {line!r}")
                yield Item(
                    f"{task}/{picture.name}/{k + 1}",
                    question,
                    (FilePicture(f"{task}/{picture.name}", (picture,)),),
                    truth.strip().lower(),
                    task,
                    fields={"pair": pair + k // 2},
                )
            pair += len(lines) // 2


def score(items: list[Item], answers: list[Answer], replies: Replies | None, parser: str, settings: Settings) -> Score:
    """100 accuracy + 100 accuracy+ for a task, added up; accuracy+ is the share of pairs with both answers right.

    A question without an answer is not right. `official` pairs consecutive lines, VLMEvalKit questions of one image.
    With the setting `tasks` the sums are over those alone, and one without any of its tasks is undefined.
    """
    wanted = wanted_tasks(settings)
    texts = {answer.id: answer.text for answer in answers}
    readings = {item.id: _RULES[parser](texts[item.id]) for item in items if item.id in texts}
    official = readings if parser == "official" else {key: yesno.mme_official(text) for key, text in texts.items()}
    counts = _counts(items, official, by_image=False)
    tasks = {task: _official_score(counts, task) for task in wanted}
    notes = []
    if len(wanted) < len(TASKS):
        notes.append(
            f"{len(wanted)} of the {len(TASKS)} tasks, at most {200 * len(wanted)} points: no official number."
        )
    decided = {item.part for item in items if official.get(item.id) in (yesno.YES, yesno.NO)}
    if none := [task for task in wanted if task not in decided and any(item.part == task for item in items)]:
        notes.append(f"{', '.join(none)}: no answer is yes or no: 0 points (the official tool stops there).")
    other = sum(reading not in (yesno.YES, yesno.NO) for reading in readings.values())
    missing = len(items) - len(readings)
    if other:
        notes.append(f"{other} of {len(readings)} answers are neither yes nor no under {parser}; they count as wrong.")
    if missing:
        notes.append(f"{missing} of {len(items)} questions have no answer; they count as wrong.")
    rows = counts if parser == "official" else _counts(items, readings, by_image=parser == "vlmevalkit")
    names = [f"{name}/{task}" for task in wanted for name in ("n", "right", "pairs", "both")]
    return Score(
        official={
            "perception": _sum_of(tasks, PERCEPTION),
            "cognition": _sum_of(tasks, COGNITION),
            "tasks": tasks,
        },
        sums=Sums.of(rows, names, partial(_figures, wanted)),
        outcomes={item.id: float(readings[item.id] == item.truth) for item in items if item.id in readings},
        readings=readings,
        counts={"rows": len(items), "answers": len(readings), "undecided": other, "missing": missing},
        notes=notes,
    )


def _counts(items: Iterable[Item], readings: Mapping[str, str], by_image: bool) -> list[tuple[str, dict[str, float]]]:
    """Questions and pairs with their right ones, by image; a pair is counted at the image of its first question."""
    units: dict[tuple[str, Any], list[Item]] = {}
    for item in items:
        units.setdefault((item.part, item.cluster if by_image else item.fields["pair"]), []).append(item)
    rows = []
    for (task, _), unit in units.items():
        right = [readings.get(item.id) == item.truth for item in unit]
        rows += [
            (item.cluster, {f"n/{task}": 1.0, f"right/{task}": float(ok)}) for item, ok in zip(unit, right, strict=True)
        ]
        # Where VLMEvalKit finds more than two questions of an image, it looks at the first two.
        rows.append((unit[0].cluster, {f"pairs/{task}": 1.0, f"both/{task}": float(all(right[:2]))}))
    return rows


def _official_score(rows: list[tuple[str, dict[str, float]]], task: str) -> float:
    """A task's points by the tool's own float operations; nan without questions."""
    n, right, pairs, both = (
        sum(counts.get(f"{name}/{task}", 0.0) for _, counts in rows) for name in ("n", "right", "pairs", "both")
    )
    return right / n * 100 + both / pairs * 100 if n else float("nan")


def _sum_of(points: Mapping[str, Any], members: Iterable[str]) -> Any:
    """The sum over those members that there are; nan where there is none."""
    found = [points[task] for task in members if task in points]
    return sum(found) if found else float("nan") * next(iter(points.values()))


def _figures(wanted: tuple[str, ...], sums: Totals) -> dict[str, Any]:
    tasks = {
        task: 100 * ratio(sums[f"right/{task}"], sums[f"n/{task}"])
        + 100 * ratio(sums[f"both/{task}"], sums[f"pairs/{task}"])
        for task in wanted
    }
    return {
        **{name: _sum_of(tasks, members) for name, members in GROUPS.items()},
        **{f"tasks/{task}": points for task, points in tasks.items()},
    }
