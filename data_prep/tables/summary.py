"""What an import or a build counted, and the last step of both."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from data_prep.tables.rejections import Rejection
from silkie_jax.corpus import pairs as rules
from silkie_jax.corpus.schema import Record
from silkie_jax.corpus.shards import CorpusBuilder, Entry

_RULES = (rules.mean_rating, rules.longest_as_best, rules.model_as_best, rules.best_vs_worst, rules.given)
_COUNTED = (
    *("images", "text_only", "responses", "dropped_responses"),
    *("ratings", "missing_ratings", "ratings_off_scale"),
)


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
        ratings_off_scale: of the missing ones, numbers off the scale; each is listed in `rejected.jsonl`.
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
    ratings_off_scale: int
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
        fields = json.loads(text)
        fields.setdefault("ratings_off_scale", fields.pop("ratings_outside_1_to_5", 0))  # as it was called
        return cls(**fields)

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
    }


def pairs_by_rule(record: Record) -> dict[str, int]:
    """How many pairs each rule makes of a record: those without options, and each aspect alone."""
    counts = {rule.__name__: len(rule(record)) for rule in _RULES}
    aspects = dict.fromkeys(aspect for response in record.responses for aspect in response.ratings)
    return counts | {f"aspect {aspect}": len(rules.aspect(record, aspect)) for aspect in aspects}


def rejections_of(entries: Iterable[Entry]) -> list[Rejection]:
    """What was left out while the shards were made, as their notes keep it."""
    return [Rejection(**fields) for entry in entries for fields in entry.notes["rejections"]]


def finish(
    builder: CorpusBuilder,
    entries: list[Entry],
    rejections: Iterable[Rejection],
    facts: Mapping[str, Any],
    *,
    rows: int,
    renamed: Mapping[str, int] | None = None,
) -> Summary:
    """Sums up the shards and completes the corpus, with its `rejected.jsonl` and `summary.json`.

    Args:
        builder: of the corpus.
        entries: of every shard; their notes hold `counts` (see `counts_of`) and `pairs` (see `pairs_by_rule`).
        rejections: all that was left out, in the order in which it is listed.
        facts: for the manifest.
        rows: of the input.
        renamed: why rows got another id -> how many.
    """
    rejections = list(rejections)
    counts: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    for entry in entries:
        counts.update(entry.notes["counts"])
        pairs.update(entry.notes["pairs"])
    rejected = Counter(rejection.reason for rejection in rejections if rejection.what == "row")
    duplicates = rejected + Counter(renamed or {})
    summary = Summary(
        rows=rows,
        records=sum(entry.shard.records for entry in entries),
        **{key: counts[key] for key in _COUNTED},
        duplicate_ids_identical=duplicates["duplicate id, identical row"],
        duplicate_ids_differing=duplicates["duplicate id, differing row"],
        unreadable_images=rejected["unreadable image"] + rejected["image too large"],
        refused_files=sum(rejection.what == "file" for rejection in rejections),
        rejected=dict(sorted(rejected.items())),
        pairs=dict(pairs),
    )
    listed = (rejection.to_json() + "\n" for rejection in rejections)
    builder.finish(entries, {"rejected.jsonl": listed, "summary.json": [summary.to_json()]}, facts)
    return summary


def _lines(counts: Iterable[tuple[str, int]]) -> str:
    return "\n".join(f"  {name:<34} {count:>12,}" for name, count in counts)
