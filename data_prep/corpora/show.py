"""One record of a corpus, for people to read."""

import json
import math
import os
import shutil
import textwrap
import unicodedata
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.tables.images import opened, suffix
from data_prep.tables.rejections import Rejected
from silkie_jax.corpus import CorpusReader, Record, Response
from silkie_jax.corpus import pairs as rules
from silkie_jax.errors import UserError


def show(
    corpus: str | os.PathLike[str],
    *,
    id: str | None = None,
    number: int | None = None,
    images: str | os.PathLike[str] | None = None,
    as_json: bool = False,
) -> str:
    """A record by its id or its number as text, or as JSON; with `images`, its image files are written there.

    Raises:
        UserError: there is no such record.
    """
    reader = CorpusReader(corpus)
    if number is None:
        number = next((n for n, row in enumerate(reader.index) if row.id == id), None)
        if number is None:
            near = [row.id for row in reader.index if id and id.casefold() in row.id.casefold()][:3]
            hint = f"; there are {', '.join(near)}" if near else f"; the first is {reader.index[0].id}"
            raise UserError(f"{corpus} has no record {id!r}{hint}")
    elif not 0 <= number < len(reader):
        raise UserError(f"{corpus} has records 0 to {len(reader) - 1}, not {number}")
    record = reader[number]
    paths = _write_images(record, Path(images)) if images is not None else []
    return _as_json(record, paths) if as_json else _as_text(record, number, paths)


def _write_images(record: Record, folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for data, sha256 in zip(record.images, record.image_sha256, strict=True):
        path = folder / (sha256[:16] + suffix(data))
        path.write_bytes(data)
        paths.append(str(path))
    return paths


def _as_json(record: Record, paths: list[str]) -> str:
    value: dict[str, Any] = asdict(record)
    value["images"] = [
        {"sha256": sha256, "bytes": len(data)} for data, sha256 in zip(record.images, record.image_sha256, strict=True)
    ]
    for image, path in zip(value["images"], paths, strict=False):
        image["path"] = path
    for response in value["responses"]:
        ratings = response["ratings"]
        response["ratings"] = {aspect: None if math.isnan(rating) else rating for aspect, rating in ratings.items()}
        if response["images"] is None:
            del response["images"]
    return json.dumps(value, indent=1, ensure_ascii=False)


def _as_text(record: Record, number: int, paths: list[str]) -> str:
    width = min(shutil.get_terminal_size().columns, 120)

    def block(words: str, indent: str = "    ") -> str:
        lines = [
            textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent) if line.strip() else ""
            for line in _printable(words).splitlines()
        ]
        return "\n".join(lines) or f"{indent}(empty)"

    facts = [f"record {number}: {_printable(record.id)}"]
    facts.append(f"source: {_printable(record.source)}" if record.source else "source: unknown")
    if licence := record.extra.get("licence"):
        facts.append(f"licence: {_printable(str(licence))}")
    lines = ["   ".join(facts)]
    for position, data in enumerate(record.images):
        try:
            with opened(data) as image:
                size = f"{image.format} {image.width} x {image.height}, {len(data):,} bytes"
        except Rejected as why:
            size = _printable(str(why))
        lines.append(f"image {position + 1}: {size}{'   ' + paths[position] if paths else ''}")
    for user, assistant in record.history:
        lines += ["", "earlier, user:", block(user), "earlier, assistant:", block(assistant)]
    lines += ["", "prompt:", block(record.prompt)]
    for index, response in enumerate(record.responses):
        ratings = "  ".join(
            f"{aspect} {'-' if math.isnan(rating) else f'{rating:g}'}" for aspect, rating in response.ratings.items()
        )
        about = f"[{index}] {_printable(response.model) or 'unknown model'}   {ratings}"
        lines += ["", f"{about}{images_shown(response)}", block(response.text)]
        lines += [block(f"{aspect}: {why}", "      | ") for aspect, why in response.rationales.items()]
    rule = "given" if record.pairs else "mean_rating"
    found = ", ".join(f"{chosen} > {rejected}" for chosen, rejected in rules.pairs(record, rule)) or "none"
    lines += ["", f"pairs ({rule}): {found}"]
    for judgement in record.extra.get("judgements", ()):
        lines.append(
            f"judged by {_printable(judgement['judge'])}, order {judgement['order']} "
            f"(shown {judgement['shown']}): {judgement['kind']}"
        )
    return "\n".join(lines)


def images_shown(response: Response) -> str:
    """The images that a response answers, numbered from 1, where it does not answer all."""
    if response.images is None:
        return ""
    numbers = ", ".join(str(image + 1) for image in response.images)
    return f"   of image {numbers}" if numbers else "   of no image"


def _printable(words: str) -> str:
    """A text without control characters, which could move the cursor of a terminal or worse."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in words)
