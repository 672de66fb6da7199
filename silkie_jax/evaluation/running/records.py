"""Files of records: JSON lines, and what people make of them (a JSON list, objects with a comma after each)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from silkie_jax.errors import UserError
from silkie_jax.evaluation.running.files import field, read_json, read_lines

Record = tuple[str, dict[str, Any]]
"""Where it stands, for messages ("FILE: line 3"), and what it says."""


def read_records(path: Path) -> list[Record]:
    """Objects of a file: one a line, with or without a comma after it, or one JSON list of them.

    Raises:
        UserError: the file is not there, holds no object, or something else than objects.
    """
    lines = read_lines(path)
    first = next((line.strip() for line in lines if line.strip()), "")
    records = _from_list(path) if first.startswith("[") else _from_lines(path, lines)
    if not records:
        raise UserError(f"{path}: empty; expected one JSON object a line")
    return records


def _from_list(path: Path) -> list[Record]:
    found = enumerate(read_json(path), start=1)
    return [(f"{path}: entry {k}", _an_object(entry, f"{path}: entry {k}")) for k, entry in found]


def _from_lines(path: Path, lines: Iterable[str]) -> list[Record]:
    records = []
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line:
            continue
        where = f"{path}: line {number}"
        try:
            found = json.loads(line.removesuffix(","))
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg}); expected one JSON object a line") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON that can be read ({error})") from None
        records.append((where, _an_object(found, where)))
    return records


def _an_object(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected an object, found {kind(found)}")
    return found


def kind(value: Any) -> str:
    """What JSON calls a value, for messages."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def text_field(record: dict[str, Any], name: str, where: str) -> str:
    """A text that must be there.

    Raises:
        UserError: it is missing, or no text.
    """
    value = field(record, name, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be a text, found {kind(value)}")
    return value


def optional_text(record: dict[str, Any], name: str, where: str) -> str | None:
    """A text, or None where it is missing or null.

    Raises:
        UserError: it is something else.
    """
    return None if record.get(name) is None else text_field(record, name, where)


def id_field(record: dict[str, Any], name: str, where: str) -> str:
    """An identifier, a text or an integer, as a text.

    Raises:
        UserError: it is missing, or something else.
    """
    value = field(record, name, where)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{where}: {name} must be a text or an integer, found {kind(value)}")
    return str(value)
