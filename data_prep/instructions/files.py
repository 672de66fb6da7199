"""Files of instructions as `Table` reads them: JSON arrays and CSV become JSON lines first, one row at a time."""

import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.tables.archives import Images, open_images
from data_prep.tables.table import MAX_LINE, Table
from silkie_jax.errors import UserError
from silkie_jax.image_limits import SUFFIXES

_TABLES = (".jsonl", ".parquet")
_TO_CONVERT = (".json", ".csv", ".tsv")
_CHUNK = 1 << 20  # characters
_BETWEEN = tuple(" \t\r\n,")


def is_table(path: Path) -> bool:
    """Whether a path holds rows (a file of them, or a folder of such files) rather than images."""
    if path.is_dir():
        return any(file.suffix in (*_TABLES, *_TO_CONVERT) for file in path.iterdir())
    return path.suffix in (*_TABLES, *_TO_CONVERT)


def open_rows(path: Path, work: Path) -> Table:
    """The rows of a file or of a folder of them; what has to be converted is written to the folder `work`.

    Raises:
        UserError: there is no such file, or it is of another kind.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    to_convert = [file for file in files if file.suffix in _TO_CONVERT]
    if not to_convert or any(file.suffix in _TABLES for file in files):
        return Table(path)
    folder = work / "rows"
    folder.mkdir(parents=True)
    for number, file in enumerate(to_convert):
        with open(folder / f"{number:04d}-{file.stem}.jsonl", "w", encoding="utf-8") as lines:
            for row in _json_rows(file) if file.suffix == ".json" else _csv_rows(file):
                lines.write(json.dumps(row) + "\n")
    source = Table(folder)
    source.titles = [file.name for file in to_convert]
    return source


def write_image_rows(
    path: Path, prompts: list[str], draw: Callable[[str, int], int], work: Path, max_bytes: int
) -> tuple[Table, Images]:
    """A row for each image of a folder, zip or tar, with one of `prompts`, chosen by `draw(name, count) -> index`."""
    images = open_images(path, max_bytes=max_bytes)
    folder = work / "rows"
    folder.mkdir(parents=True)
    with open(folder / "images.jsonl", "w", encoding="utf-8") as lines:
        for name in images.names:
            if name.lower().endswith(SUFFIXES):
                prompt = prompts[draw(name, len(prompts))]
                lines.write(json.dumps({"id": os.path.splitext(name)[0], "image": name, "prompt": prompt}) + "\n")
    return Table(folder), images


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_LINE)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","):
                yield {str(key): value for key, value in row.items() if key is not None}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV ({error})") from None


def _json_rows(path: Path) -> Iterator[Any]:
    """The items of a JSON array; memory holds one item and a chunk."""
    decoder = json.JSONDecoder()
    try:
        with open(path, encoding="utf-8-sig") as file:
            text, at = file.read(_CHUNK).lstrip(), 1
            if not text.startswith("["):
                raise UserError(f"{path}: a JSON array of rows is expected (name the file .jsonl if it is JSON lines)")
            while True:
                while text.startswith(_BETWEEN, at):
                    at += 1
                if text.startswith("]", at):
                    return
                try:
                    item, end = decoder.raw_decode(text, at)
                    if end == len(text):
                        raise ValueError("may go on")
                except (ValueError, RecursionError):
                    more = file.read(max(_CHUNK, len(text) - at))  # doubles, lest a large item be parsed ever again
                    if not more or len(text) - at > MAX_LINE:
                        raise UserError(f"{path}: not valid JSON at {text[at : at + 60]!r}") from None
                    text, at = text[at:] + more, 0
                    continue
                yield item
                at = end
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
