"""Evaluation runs as a report reads them: scores and outcomes that `silkie evaluate run` left, and the images."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import Item
from silkie_jax.evaluation.rules.statistics import Change, Difference, changes, compare
from silkie_jax.evaluation.rules.sums import Sums
from silkie_jax.evaluation.running.answers import asked_items, items_fingerprint
from silkie_jax.evaluation.running.answers import read_answers as read_our_answers
from silkie_jax.evaluation.running.files import read_json, read_json_lines
from silkie_jax.evaluation.running.run import ANSWERS, OUTCOMES, REPLIES, SCORE
from silkie_jax.evaluation.running.scoring import score_answers
from silkie_jax.evaluation.table import BENCHMARKS, find_benchmark


@dataclass(frozen=True)
class Outcome:
    """One item as it came out: `outcome` is 1 or 0 or a rating, `reading` what the answer was taken for."""

    id: str
    outcome: float
    reading: str
    image: str
    question: str
    truth: str
    answer: str


@dataclass(frozen=True)
class Measured:
    """One benchmark of a run: its score.json, and its outcomes by item."""

    folder: Path
    score: dict[str, Any]
    outcomes: dict[str, Outcome]

    def figure(self, name: str) -> dict[str, float | None] | None:
        """Value, low and high of a figure."""
        return self.score["figures"].get(name)


@dataclass(frozen=True)
class Checkpoint:
    """A run under the name that it has in the report."""

    name: str
    path: Path
    measured: dict[str, Measured] = field(default_factory=dict)


def read_run(text: str) -> Checkpoint:
    """`NAME=RUN` or `RUN`, named by its folder.

    Raises:
        UserError: there is no such run, or nothing in it was scored.
    """
    name, equals, path = text.partition("=")
    folder = Path(path) if equals and not Path(text).exists() else Path(text)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run; make one with `silkie evaluate run`")
    measured = {}
    for benchmark in BENCHMARKS:
        inside = folder / benchmark
        if (inside / SCORE).exists():
            rows = read_json_lines(inside / OUTCOMES) if (inside / OUTCOMES).exists() else ()
            outcomes = {line["id"]: Outcome(**line) for _, line in rows}
            measured[benchmark] = Measured(inside, read_json(inside / SCORE), outcomes)
    if not measured:
        raise UserError(f"{folder}: holds no {SCORE}; run `silkie evaluate run` to its end first")
    return Checkpoint(name if equals and folder != Path(text) else folder.resolve().name, folder, measured)


def read_runs(texts: Iterable[str]) -> list[Checkpoint]:
    """Runs with names that tell them apart."""
    found = [read_run(text) for text in texts]
    names = [checkpoint.name for checkpoint in found]
    if len(set(names)) < len(names):
        raise UserError("two runs have one name: give each its own, as NAME=RUN")
    return found


def differences(first: Measured, second: Measured) -> Difference:
    """The second checkpoint against the first, on the items that both have."""
    clusters = {id: outcome.image for id, outcome in first.outcomes.items()}
    ours, theirs = ({id: o.outcome for id, o in m.outcomes.items()} for m in (first, second))
    return compare(ours, theirs, clusters)


def changed_figures(first: Measured, second: Measured) -> dict[str, Change]:
    """What came of each figure, with its interval; {} where the answers or the data are no longer there to score."""
    a, b = sums_of(first), sums_of(second)
    return changes(a, b) if a is not None and b is not None else {}


def sums_of(measured: Measured) -> Sums | None:
    """Counts by image, by scoring the answers again as they were scored; None where that cannot be done."""
    score, answers, replies = measured.score, measured.folder / ANSWERS, measured.folder / REPLIES
    if not answers.exists():
        return None
    try:
        scored = score_answers(
            score["benchmark"],
            answers,
            replies=replies if replies.exists() else None,
            parser=score["parser"],
            settings=dict(score["settings"]),
        )
    except UserError:
        return None
    return scored.score.sums


def comparable(first: Measured, second: Measured) -> list[str]:
    """In which respects two scores are of different experiments."""
    a, b = first.score, second.score
    different = [name for name in ("parser", "settings", "rows") if a[name] != b[name]]
    asked = ("prompt", "template", "decoding", "items")
    different += [name for name in asked if (a["answers"] or {}).get(name) != (b["answers"] or {}).get(name)]
    if set((a["judge"] or {}).get("models", ())) != set((b["judge"] or {}).get("models", ())):
        different.append("judge")
    return different


def pictures_of(measured: Measured) -> dict[str, Item]:
    """The items with their images, if the data is still where it was when they were answered; {} otherwise."""
    answers = measured.folder / ANSWERS
    if not answers.exists():
        return {}
    origin, _ = read_our_answers(answers)
    if not origin.data or not Path(origin.data).exists():
        return {}
    try:
        items = asked_items(find_benchmark(origin.benchmark), Path(origin.data), origin.settings, origin.limit)
    except UserError:
        return {}
    return {item.id: item for item in items} if items_fingerprint(items) == origin.items else {}


def published() -> dict[str, dict[str, dict[str, float]]]:
    """Benchmark -> whose -> figure -> value, as papers print them."""
    return json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
