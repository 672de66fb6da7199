"""Answers and recorded replies in, a score out: no model, no network."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import Answer, Benchmark, Item, Replies, Score, Settings
from silkie_jax.evaluation.rules.statistics import intervals
from silkie_jax.evaluation.running import answers as ours
from silkie_jax.evaluation.running.replies import read_replies
from silkie_jax.evaluation.table import find_benchmark


@dataclass(frozen=True)
class Scored:
    """A score with all that it rests on.

    Attributes:
        name: of the benchmark.
        origin: of the answers; None where they came in the benchmark's own form.
    """

    name: str
    benchmark: Benchmark
    items: list[Item]
    answers: list[Answer]
    origin: ours.Origin | None
    replies: Replies | None
    parser: str
    settings: dict[str, str]
    score: Score

    def as_dict(self) -> dict[str, Any]:
        """For JSON; undefined figures are null."""
        found = {name: float(value) for name, value in self.score.sums.figures().items()}
        between = intervals(self.score.sums)
        origin = self.origin
        failed = sum("failed" in answer.fields for answer in self.answers)
        return {
            "benchmark": self.name,
            "title": self.benchmark.ABOUT.title,
            "official": _plain(self.score.official),
            "figures": {
                name: {"value": _plain(value), "low": _plain(between[name][0]), "high": _plain(between[name][1])}
                for name, value in found.items()
            },
            "parser": self.parser,
            "settings": self.settings,
            "rows": len(self.items),
            "images": len(self.score.sums.images),
            "counts": self.score.counts | ({"refused or failed at the endpoint": failed} if failed else {}),
            "notes": self.score.notes,
            "answers": None
            if origin is None
            else {
                "prompt": origin.prompt,
                "template": origin.template,
                "decoding": origin.decoding,
                "model": origin.model,
                "weights": origin.weights,
                "adapter": origin.adapter,
                "dtype": origin.dtype,
                "endpoint": origin.endpoint,
                "limit": origin.limit,
                "items": origin.items,
            },
            "judge": None
            if self.replies is None
            else {
                "runs": len(self.replies.runs),
                "models": dict(self.replies.models),
                "failed": dict(self.replies.failed),
            },
        }

    def lines(self) -> list[str]:
        """For the terminal."""
        shown = self.as_dict()
        rows = [f"{shown['title']}: {shown['rows']:,} rows of {shown['images']:,} images, parser {self.parser}"]
        width = max(map(len, shown["figures"]), default=0)
        for name, figure in shown["figures"].items():
            if figure["value"] is None:
                rows.append(f"  {name:<{width}}  undefined")
            else:
                between = f"[{_short(figure['low'])}, {_short(figure['high'])}]"
                rows.append(f"  {name:<{width}}  {_short(figure['value']):>9}  {between}")
        rows += [f"  {name}: {count:,}" for name, count in shown["counts"].items() if count]
        if self.replies is not None:
            judges = ", ".join(self.replies.models) or "not named in the replies"
            rows.append(f"  judge: {judges}; {len(self.replies.runs)} run(s)")
        if origin := self.origin:
            asked = origin.endpoint or f"{origin.model}{' with an adapter' if origin.adapter else ''}"
            decoding = ", ".join(f"{k} {v}" for k, v in origin.decoding.items())
            rows.append(f"  answers: {asked}; prompt {origin.prompt}, template {origin.template}, {decoding}")
        return rows + [f"  note: {note}" for note in shown["notes"]]


def score_answers(
    name: str,
    answers: Path,
    *,
    data: Path | None = None,
    replies: Path | None = None,
    parser: str | None = None,
    settings: Settings | None = None,
) -> Scored:
    """Scores a file or folder of answers, in our own form or in the benchmark's.

    Raises:
        UserError: it cannot be scored, in one line.
    """
    benchmark = find_benchmark(name)
    about, given = benchmark.ABOUT, dict(settings or {})
    check_settings(name, benchmark, given)
    parser = parser or about.parsers[0]
    if parser not in about.parsers:
        raise UserError(f"--parser {parser}: {name} has {', '.join(about.parsers)}")
    if replies is not None and about.judge is None:
        raise UserError(f"--replies: {name} has no judge")
    if not answers.exists():
        raise UserError(f"{answers}: no such file or folder")
    origin, items, found = read_all(name, benchmark, answers, data, given)
    told = None
    if replies is not None:
        told = read_replies(replies, benchmark, items, found, given)
    score = benchmark.score(items, found, told, parser, given)
    return Scored(name, benchmark, items, found, origin, told, parser, given, score)


def read_all(
    name: str, benchmark: Benchmark, answers: Path, data: Path | None, settings: dict[str, str]
) -> tuple[ours.Origin | None, list[Item], list[Answer]]:
    """Items and answers; `settings` is completed by those that the answers were made with.

    Raises:
        UserError: they do not belong together, or data is needed.
    """
    about = benchmark.ABOUT
    if not ours.is_ours(answers):
        items = benchmark.items(data, settings) if data is not None else None
        if items is None and not about.answers_hold_data:
            raise UserError(f"{name} needs --data: {about.data}")
        return None, *benchmark.read_answers(answers, items, settings)
    origin, found = ours.read_answers(answers)
    if origin.benchmark != name:
        raise UserError(f"{answers} holds answers to {origin.benchmark}, not to {name}")
    settings.update(ours.merged(origin.settings, settings))
    where = data if data is not None else Path(origin.data)
    if not where.exists():
        raise UserError(f"{where}: no such data; give --data: {about.data}")
    items = ours.asked_items(benchmark, where, settings, origin.limit)
    if ours.items_fingerprint(items) != origin.items:
        raise UserError(f"{answers} answers other items than those of {where}: give the --data that it was made with")
    return origin, items, found


def check_settings(name: str, benchmark: Benchmark, given: Mapping[str, str]) -> None:
    """Refuses settings that a benchmark does not have.

    Raises:
        UserError: names those that it has.
    """
    for key in given:
        if key not in benchmark.ABOUT.settings:
            there = ", ".join(benchmark.ABOUT.settings) or "none"
            raise UserError(f"--set {key}: {name} has no such setting; there are: {there}")


def write_json(path: Path, value: Any) -> None:
    """A JSON file, which is there whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)


def write_outcomes(path: Path, scored: Scored) -> None:
    """How each item came out, one JSON line each: what two checkpoints are compared by."""
    texts = {answer.id: answer.text for answer in scored.answers}
    with path.open("w", encoding="utf-8") as file:
        for item in scored.items:
            if item.id not in scored.score.outcomes:
                continue
            line = {
                "id": item.id,
                "outcome": float(scored.score.outcomes[item.id]),
                "reading": scored.score.readings.get(item.id, ""),
                "image": item.cluster,
                "question": item.question,
                "truth": item.truth if isinstance(item.truth, str) else json.dumps(_plain(item.truth)),
                "answer": texts.get(item.id, ""),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers of numpy become Python's, nan and infinities become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"
