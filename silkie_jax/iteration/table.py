"""What came of each round: pairs and ties, how far judges agree, rewards, and lengths, in which preferences drift."""

import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from silkie_jax.corpus import CorpusReader, Record
from silkie_jax.corpus.pairs import pairs
from silkie_jax.iteration.plan import Round
from silkie_jax.preference.drift import drift_of

FILE = "table.json"
_COLUMNS = {
    "round": "round",
    "instructions": "instructions",
    "pairs": "pairs",
    "ties": "ties",
    "agreement": "agreement",
    "chosen": "reward of chosen",
    "rejected": "of rejected",
    "accuracy": "accuracy",
    "chosen_length": "length of chosen",
    "rejected_length": "of rejected",
}


def measured(of: Round, train: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a round that is done; those that were counted before are read again.

    instructions, pairs: of its corpus, under its training's rule; ties: instructions with ratings and no pair.
    agreement: how often two judges, or two orders of the one judge there is, order two responses alike.
    chosen, rejected, accuracy: rewards as training logged them last. Lengths are mean characters.
    warning: where chosen and rejected differ in length by more than chance.
    """
    path = of.folder / FILE
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    corpus = CorpusReader(of.corpus)
    rule = {**train, **json.loads(of.changes)}.get("pair_rule") or ("mean_rating" if corpus.aspects else "given")
    found: dict[str, Any] = {"round": of.number, "instructions": len(corpus), "pairs": 0, "ties": 0}
    lengths: list[tuple[int, int]] = []
    differences: list[np.ndarray] = []
    alike: list[bool] = []
    for record in corpus:
        made = pairs(record, rule)
        found["pairs"] += len(made)
        found["ties"] += not made and sum(map(_rated, record.responses)) > 1
        sizes = [max(len(response.text), 1) for response in record.responses]
        lengths += [(sizes[w], sizes[l]) for w, l in made]
        differences.append(np.array([math.log(sizes[w] / sizes[l]) for w, l in made]))
        alike += agreements(record)
    found["agreement"] = sum(alike) / len(alike) if alike else None
    for side, values in zip(("chosen", "rejected"), zip(*lengths, strict=True), strict=False):
        found[f"{side}_length"] = sum(values) / len(values)
    for name, metric in (("chosen", "chosen"), ("rejected", "rejected"), ("accuracy", "accuracies")):
        found[name] = _last(of.folder / "train" / "metrics.jsonl", f"rewards/{metric}")
    drift = drift_of(differences, "characters")
    found["warning"] = str(drift) if drift.matters else None
    write_json(path, found)
    return found


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def agreements(record: Record) -> Iterable[bool]:
    """Whether two judges order two responses alike, for all of which both prefer one; orders, of a single judge."""
    by_judge: dict[str, list[list[float]]] = defaultdict(list)
    for judgement in record.extra.get("judgements") or ():
        rows = judgement["ratings"].values()
        scores = [_mean([math.nan if row[n] is None else row[n] for row in rows]) for n in range(len(record.responses))]
        by_judge[judgement["judge"]].append(scores)
    raters = [[_mean(values) for values in zip(*orders, strict=True)] for orders in by_judge.values()]
    if len(by_judge) == 1:
        raters = next(iter(by_judge.values()))
    for a, b in itertools.combinations(raters, 2):
        for m, n in itertools.combinations(range(len(record.responses)), 2):
            one, other = a[m] - a[n], b[m] - b[n]
            if one * other and not math.isnan(one * other):  # neither ties
                yield one * other > 0


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For the terminal and for Markdown."""
    cells = [list(_COLUMNS.values()), *([_shown(row.get(key)) for key in _COLUMNS] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(_COLUMNS))]
    lines = [
        "| " + " | ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    warnings = [f"warning: round {row['round']}: {row['warning']}" for row in rows if row.get("warning")]
    return "\n".join([*lines, *warnings]) + "\n"


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _rated(response: Any) -> bool:
    return bool(response.ratings) and not any(map(math.isnan, response.ratings.values()))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _last(path: Path, name: str) -> float | None:
    """The value that training logged last."""
    if not path.is_file():
        return None
    found = [json.loads(line).get(name) for line in path.read_text(encoding="utf-8").splitlines()]
    return next((value for value in reversed(found) if value is not None), None)
