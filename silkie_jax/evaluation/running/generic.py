"""What `yesno` and `mcq` share: questions with answers and responses in one file, or in two that ids join."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import Answer, Item
from silkie_jax.evaluation.running.files import FilePicture
from silkie_jax.evaluation.running.records import Record, id_field, optional_text, read_records, text_field

Truth = Callable[[dict[str, Any], str], tuple[str, tuple[str, ...]]]
"""A record, and where it stands -> the right answer and the options (none for yes or no)."""


def read_questions(path: Path, truth: Truth) -> list[Item]:
    """The questions of a file.

    Raises:
        UserError: a record is not of the form, or an id occurs twice.
    """
    return _questions(path, read_records(path), truth)


def read_responses(path: Path, items: list[Item] | None, truth: Truth) -> tuple[list[Item], list[Answer]]:
    """The responses of a file; without `items` the file holds the questions too.

    Raises:
        UserError: a record is not of the form, an id occurs twice, or is of no question.
    """
    records = read_records(path)
    known = None if items is None else {item.id for item in items}
    items = _questions(path, records, truth) if items is None else items
    answers = []
    for identifier, (where, record) in zip(_ids(records), records, strict=True):
        if known is not None and identifier not in known:
            raise UserError(f"{where}: no question {identifier!r} in the data; is --data of the same questions?")
        answers.append(Answer(identifier, text_field(record, "response", where)))
    return items, answers


def _questions(path: Path, records: list[Record], truth: Truth) -> list[Item]:
    items = []
    for identifier, (where, record) in zip(_ids(records), records, strict=True):
        image = optional_text(record, "image", where)
        places = () if image is None else (path.parent / image, path.parent / "images" / image)
        right, options = truth(record, where)
        items.append(
            Item(
                identifier,
                text_field(record, "question", where),
                () if image is None else (FilePicture(image, places),),
                right,
                options=options,
            )
        )
    return items


def _ids(records: list[Record]) -> list[str]:
    """The records' ids; positions from 0 where the file has none."""
    seen: dict[str, str] = {}
    if not any("id" in record for _, record in records):
        return [str(k) for k in range(len(records))]
    for where, record in records:
        identifier = id_field(record, "id", where)
        if identifier in seen:
            raise UserError(f"{where}: id {identifier!r} again, after {seen[identifier].rpartition(': ')[2]}")
        seen[identifier] = where
    return list(seen)
