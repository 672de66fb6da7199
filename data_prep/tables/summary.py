"""What an import counted."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from silkie_jax.corpus import pairs as rules
from silkie_jax.corpus.schema import Record

_RULES = (rules.mean_rating, rules.longest_as_best, rules.model_as_best, rules.best_vs_worst, rules.given)


@dataclass(frozen=True)
class Summary:
    """The outcome of an import; `rows == records + sum(rejected.values())`.

    Attributes:
        rows: in the input.
        records: in the corpus.
        images: stored, counted once for each record that shows them.
        text_only: records without an image.
        responses: stored.
        dropped_responses: left out of a record that was kept, because they are no text.
        ratings: numbers found.
        missing_ratings: ratings absent or not a number (NaN in the corpus).
        ratings_outside_1_to_5: kept as they are.
        duplicate_ids_identical: rows that repeat an earlier one: left out (VLFeedback) or renamed (pairs).
        duplicate_ids_differing: rows with the id of an earlier row that says something else: renamed.
        unreadable_images: rows left out because an image is damaged, of an unknown format or too large.
        refused_files: image files that point outside their folder or zip, or cannot be opened safely.
        rejected: reason -> rows left out; each is listed in `rejected.jsonl`.
        pairs: rule -> number of pairs that it would train on.
    """

    rows: int
    records: int
    images: int
    text_only: int
    responses: int
    dropped_responses: int
    ratings: int
    missing_ratings: int
    ratings_outside_1_to_5: int
    duplicate_ids_identical: int
    duplicate_ids_differing: int
    unreadable_images: int
    refused_files: int
    rejected: Mapping[str, int]
    pairs: Mapping[str, int]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Summary":
        return cls(**json.loads(text))

    def table(self) -> str:
        """A small table for the terminal; counts of 0 that are only of interest when they are not are left out."""
        fields: dict[str, Any] = asdict(self)
        always = ("rows", "records", "responses", "ratings", "missing_ratings", "unreadable_images")
        duplicates = ("duplicate_ids_identical", "duplicate_ids_differing")
        counts = [
            (key.replace("_", " "), value)
            for key, value in fields.items()
            if isinstance(value, int) and (value or key in always + duplicates)
        ]
        parts = [_lines(counts)]
        if self.rejected:
            parts += ["rejected rows (listed in rejected.jsonl)", _lines(self.rejected.items())]
        parts += ["pairs by rule", _lines(self.pairs.items())]
        return "\n".join(parts)


def counts_of(record: Record) -> dict[str, int]:
    """What a record adds to the counts of a summary."""
    ratings = [rating for response in record.responses for rating in response.ratings.values()]
    numbers = [rating for rating in ratings if not math.isnan(rating)]
    return {
        "images": len(record.images),
        "text_only": not record.images,
        "responses": len(record.responses),
        "ratings": len(numbers),
        "missing_ratings": len(ratings) - len(numbers),
        "ratings_outside_1_to_5": sum(not 1 <= rating <= 5 for rating in numbers),
    }


def pairs_by_rule(record: Record) -> dict[str, int]:
    """How many pairs each rule makes of a record: those without options, and each aspect alone."""
    counts = {rule.__name__: len(rule(record)) for rule in _RULES}
    aspects = dict.fromkeys(aspect for response in record.responses for aspect in response.ratings)
    return counts | {f"aspect {aspect}": len(rules.aspect(record, aspect)) for aspect in aspects}


def _lines(counts: Iterable[tuple[str, int]]) -> str:
    return "\n".join(f"  {name:<34} {count:>12,}" for name, count in counts)
