"""Reading what benchmarks distribute and tools leave: text by line feeds, JSON, JSON lines; errors name file and line.

Lines end at line feeds as for the official scripts: `str.splitlines` also splits at U+2028 and others, which real
answers hold.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silkie_jax.errors import UserError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with universal newlines; a byte-order mark is dropped.

    Raises:
        UserError: it is not there, or not text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without their line feeds."""
    text = read_text(path)
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_json(
    path: Path, *, unique: bool = False, hook: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Any:
    """A JSON file.

    Args:
        unique: refuse a key that an object has twice; otherwise the last one wins, as for the official scripts.
        hook: what each object becomes as soon as it was read, where memory would not hold the whole; not with `unique`.

    Raises:
        UserError: it is not there, or not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=_distinct if unique else None, object_hook=hook)
    except _Twice as error:
        raise UserError(f"{path}: the key {str(error)!r} is there twice: remove one") from None
    except json.JSONDecodeError as error:
        what = "empty" if not text.strip() else f"line {error.lineno}: not JSON ({error.msg})"
        raise UserError(f"{path}: {what}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists within lists without end
        raise UserError(f"{path}: not JSON that can be read ({error})") from None


class _Twice(Exception):
    """A key of an object that came before."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Twice(key)
            seen.add(key)
    return found


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) for every line that is not blank.

    Raises:
        UserError: a line is no JSON object.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number}: not JSON ({error.msg})") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number}: not JSON that can be read ({error})") from None
        if not isinstance(found, dict):
            raise UserError(f"{path}: line {number}: expected an object, found {type(found).__name__}")
        yield number, found


def field(record: dict[str, Any], name: str, where: str) -> Any:
    """A field that must be there.

    Raises:
        UserError: names what is missing.
    """
    if name not in record:
        raise UserError(f"{where}: no field {name!r} (there are {', '.join(map(repr, record)) or 'none'})")
    return record[name]


@dataclass(frozen=True)
class FilePicture:
    """An image file; the first of `places` that exists. `hint` says where it comes from."""

    name: str
    places: tuple[Path, ...]
    hint: str = ""

    def exists(self) -> bool:
        """Whether one of the places has it."""
        return any(path.is_file() for path in self.places)

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
            UserError: none of the places has it.
        """
        for path in self.places:
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                continue
        others = f" (nor at {len(self.places) - 1} other places)" if len(self.places) > 1 else ""
        raise UserError(f"{self.places[0]}: no such image{others}{'; ' + self.hint if self.hint else ''}")
