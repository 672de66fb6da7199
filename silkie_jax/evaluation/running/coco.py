"""COCO's annotation files of 2014: categories and human captions by image."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silkie_jax.errors import UserError
from silkie_jax.evaluation.running.files import field as need
from silkie_jax.evaluation.running.files import read_json
from silkie_jax.evaluation.running.records import id_field, text_field
from silkie_jax.evaluation.running.shapes import a_list, an_object

FILES = tuple(f"{kind}_{split}2014.json" for split in ("val", "train") for kind in ("instances", "captions"))


@dataclass
class CocoImage:
    """What the files say of an image; `split` is val or train."""

    split: str
    categories: set[str] = field(default_factory=set)
    captions: list[str] = field(default_factory=list)


def image_id(value: Any, where: str) -> int:
    """An image's number, which results files also write as a text.

    Raises:
        UserError: it is something else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value):
        return int(value)
    raise UserError(f"{where}: the image's id is {value!r}, not an integer")


def missing_files(folder: Path) -> list[str]:
    """Of `FILES`.

    Raises:
        UserError: no instances are there, or no captions.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    for kind in ("instances", "captions"):
        names = [name for name in FILES if name.startswith(kind)]
        if all(name in missing for name in names):
            raise UserError(f"{folder}: neither {' nor '.join(names)} is there (COCO's annotations_trainval2014.zip)")
    return missing


def read_annotations(folder: Path, wanted: Collection[int] | None = None) -> dict[int, CocoImage]:
    """The images of the files that are there, or of them those that are wanted.

    Raises:
        UserError: a file is not in COCO's form, or too few are there.
    """
    images: dict[int, CocoImage] = {}
    missing = missing_files(folder)
    for name in FILES:
        if name not in missing:
            _add(folder / name, images, wanted)
    return images


def _add(path: Path, images: dict[int, CocoImage], wanted: Collection[int] | None) -> None:
    whole = an_object(read_json(path, hook=_without_outlines), str(path))
    split = "val" if "val2014" in path.name else "train"
    names = dict(_categories(whole, path)) if path.name.startswith("instances") else None

    def find(value: Any, where: str) -> CocoImage | None:
        number = image_id(value, where)
        return images.setdefault(number, CocoImage(split)) if wanted is None or number in wanted else None

    for where, row in _rows(whole, "images", path):
        find(row.get("id"), where)
    for where, row in _rows(whole, "annotations", path):
        image = find(row.get("image_id"), where)
        if names is None:
            caption = text_field(row, "caption", where)
            if image is not None:
                image.captions.append(caption)
            continue
        category = id_field(row, "category_id", where)
        if category not in names:
            raise UserError(f"{where}: category {category} is not among the file's categories")
        if image is not None:
            image.categories.add(names[category])


def _categories(whole: dict[str, Any], path: Path) -> Iterable[tuple[str, str]]:
    return [
        (id_field(row, "id", where), text_field(row, "name", where)) for where, row in _rows(whole, "categories", path)
    ]


def _rows(whole: dict[str, Any], name: str, path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    rows = a_list(need(whole, name, str(path)), f"{path}: {name}")
    for number, row in enumerate(rows, start=1):
        where = f"{path}: {name}, row {number}"
        yield where, an_object(row, where)


def _without_outlines(row: dict[str, Any]) -> dict[str, Any]:
    row.pop("segmentation", None)  # nine tenths of a file
    return row
