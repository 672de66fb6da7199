"""Judges' replies as files: ours, dialogue by dialogue, and the forms that others leave."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from silkie_jax.durable import sync
from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import Answer, Benchmark, Exchange, Item, Replies, Settings
from silkie_jax.evaluation.rules.judged import named
from silkie_jax.evaluation.running.files import read_json, read_json_lines, read_text
from silkie_jax.evaluation.running.records import kind

EMPTY = "no reply"
"""The outcome of a dialogue that a file names without any reply."""


def read_replies(
    path: Path, benchmark: Benchmark, items: list[Item], answers: list[Answer], settings: Settings
) -> Replies:
    """The replies to a benchmark's dialogues, from any of these forms.

    - Lines of {"key", "run", "replies", "models", "outcome"}, as `write_replies` leaves them.
    - A list of texts (or of lists of texts) in the order of the dialogues.
    - {key: text}, {key: [texts]} or {key: [[texts of run 0], [texts of run 1], ...]}.
    - The official tool's own file, where the benchmark has a function `official_replies` for it.

    Keys of items that no judge needs to be asked about may be there.

    Raises:
        UserError: another form, a key that is unknown or there twice, a dialogue without a reply.
    """
    wanted = list(benchmark.dialogues(items, answers, settings))
    known = {*wanted, *(item.id for item in items)}
    raw = _read(path)
    official = getattr(benchmark, "official_replies", None)
    if _ours(raw):
        exchanges = _from_lines(path, raw)
    else:
        if official is not None and not _plain(raw):
            try:
                found = official(raw, items, answers)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            raw = raw if found is None else found
        exchanges = _from_list(path, raw, wanted) if isinstance(raw, list) else _from_mapping(path, raw)
    if unknown := [e.key for e in exchanges if e.key not in known]:
        raise UserError(f"{path}: replies to {named(dict.fromkeys(unknown))}, which the data does not have")
    # What was asked under other settings is kept: benchmarks have figures for those too.
    exchanges = [e for e in exchanges if e.key in set(wanted) or e.outcome == "ok"]
    _check_whole(path, exchanges, wanted)
    return Replies.of(exchanges)


def _read(path: Path) -> Any:
    """JSON, or a list of the objects of JSON lines."""
    text = read_text(path).lstrip()
    if not text and path.suffix == ".jsonl":
        return []
    lines = path.suffix == ".jsonl"
    if not lines and text.startswith("{"):
        first = text.partition("\n")[0]
        try:
            lines = isinstance(json.loads(first), dict) and bool(text[len(first) :].strip())
        except (ValueError, RecursionError):
            lines = False
    if lines:
        return [record for _, record in read_json_lines(path)]
    return read_json(path, unique=True)


def _ours(raw: Any) -> bool:
    if isinstance(raw, dict) and isinstance(raw.get("replies"), list) and isinstance(raw.get("key"), str):
        return True  # a single line
    return isinstance(raw, list) and bool(raw) and all(isinstance(r, dict) and "key" in r for r in raw)


def _plain(raw: Any) -> bool:
    """Whether it is a list or an object of texts or lists, which needs no benchmark to be read."""
    values = raw.values() if isinstance(raw, dict) else raw if isinstance(raw, list) else [None]
    return all(isinstance(value, str | list) for value in values)


def _from_lines(path: Path, raw: Any) -> list[Exchange]:
    exchanges = []
    for number, record in enumerate(raw if isinstance(raw, list) else [raw], start=1):
        where = f"{path}: record {number}"
        key, run = record["key"], record.get("run", 0)
        replies, models, outcome = record.get("replies"), record.get("models", []), record.get("outcome", "ok")
        if not isinstance(key, str):
            raise UserError(f"{where}: 'key' must be a text, not {kind(key)}")
        if isinstance(run, bool) or not isinstance(run, int) or not 0 <= run < 10_000:
            raise UserError(f"{where}: 'run' must be a whole number from 0, not {run!r}")
        for name, texts in (("replies", replies), ("models", models)):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{where}: {name!r} must be a list of texts")
        if not isinstance(outcome, str):
            raise UserError(f"{where}: 'outcome' must be a text, not {kind(outcome)}")
        if outcome == "ok" and not replies:
            outcome = EMPTY
        exchanges.append(Exchange(key, run, tuple(replies), tuple(models), outcome))  # type: ignore[arg-type]
    return exchanges


def _from_list(path: Path, raw: Sequence[Any], wanted: Sequence[str]) -> list[Exchange]:
    if len(raw) != len(wanted):
        raise UserError(f"{path}: a list of {len(raw)} replies, but {len(wanted)} are needed, one for each request")
    return _from_mapping(path, dict(zip(wanted, raw, strict=True)))


def _from_mapping(path: Path, raw: Any) -> list[Exchange]:
    if not isinstance(raw, Mapping):
        raise UserError(f"{path}: expected replies by key, or a list of them, found {kind(raw)}")
    exchanges = []
    for key, value in raw.items():
        runs = [[value]] if isinstance(value, str) else value
        if isinstance(runs, list) and not (runs and all(isinstance(run, list) for run in runs)):
            runs = [runs]  # replies of one run
        if not isinstance(runs, list) or not all(isinstance(text, str) for run in runs for text in run):
            raise UserError(
                f"{path}: {key}: expected a text, a list of texts, or such a list for each run, found {kind(value)}"
                + (" with something else in it" if isinstance(value, list) else "")
            )
        for run, texts in enumerate(runs):
            exchanges.append(Exchange(str(key), run, tuple(texts), outcome="ok" if texts else EMPTY))
    return exchanges


def _check_whole(path: Path, exchanges: Sequence[Exchange], wanted: Sequence[str]) -> None:
    """Every run must have every dialogue, once; a failed one counts, one that is not there does not."""
    seen: set[tuple[int, str]] = set()
    for exchange in exchanges:
        if (exchange.run, exchange.key) in seen:
            raise UserError(f"{path}: replies to {exchange.key} (run {exchange.run}) are there twice: remove one")
        seen.add((exchange.run, exchange.key))
    for run in range(max((e.run for e in exchanges), default=0) + 1):
        if missing := [key for key in wanted if (run, key) not in seen]:
            of = f" of run {run}" if run else ""
            raise UserError(
                f"{path}: no reply{of} to {named(missing)}: {len(wanted)} requests to the judge need one each"
            )


def write_replies(path: Path, replies: Replies) -> None:
    """Writes dialogues as JSON lines, by run and key, so that the same replies give the same bytes; durably."""
    exchanges = replies.exchanges or [
        Exchange(key, run, tuple(texts)) for run, of in enumerate(replies.runs) for key, texts in of.items()
    ]
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for e in sorted(exchanges, key=lambda e: e.run):
            record = {"key": e.key, "run": e.run, "replies": e.replies, "models": e.models, "outcome": e.outcome}
            # ASCII: no reader takes a line separator within a reply for the end of a line.
            file.write(json.dumps(record) + "\n")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
