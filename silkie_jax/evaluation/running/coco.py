"""COCO's annotation files of 2014: categories and human captions by image."""

import re
from collections.abc import Collection
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
    """Adds what a file says of the images that are wanted."""
    boxes = path.name.startswith("instances")
    whole = an_object(read_json(path, hook=_without_outlines if boxes else None), str(path))
    split = "val" if "val2014" in path.name else "train"
    names = _categories(whole, path) if boxes else {}
    for number, row in enumerate(_list(whole, "images", path), start=1):
        image: Any = row.get("id") if isinstance(row, dict) else None
        if type(image) is not int:
            where = f"{path}: images, row {number}"
            image = image_id(an_object(row, where).get("id"), where)
        if wanted is None or image in wanted:
            images.setdefault(image, CocoImage(split))
    for number, row in enumerate(_list(whole, "annotations", path), start=1):
        try:  # a million rows: what is wrong with one is looked up only where something is
            image, said = row["image_id"], names[row["category_id"]] if boxes else row["caption"]
            good = type(image) is int and type(said) is str
        except (KeyError, TypeError):
            good = False
        if not good:
            image, said = _checked(row, f"{path}: annotations, row {number}", names if boxes else None)
        if wanted is None or image in wanted:
            found = images.setdefault(image, CocoImage(split))
            (found.categories.add if boxes else found.captions.append)(said)


def _checked(row: Any, where: str, names: dict[Any, str] | None) -> tuple[int, str]:
    """Image, and category or caption, of a row that is not as usual.

    Raises:
        UserError: it says what is wrong.
    """
    image = image_id(an_object(row, where).get("image_id"), where)
    if names is None:
        return image, text_field(row, "caption", where)
    category = id_field(row, "category_id", where)
    if category not in names:
        raise UserError(f"{where}: category {category} is not among the file's categories")
    return image, names[category]


def _categories(whole: dict[str, Any], path: Path) -> dict[Any, str]:
    """Category -> name; the numbers of categories as they are, and as texts."""
    names: dict[Any, str] = {}
    for number, row in enumerate(_list(whole, "categories", path), start=1):
        where = f"{path}: categories, row {number}"
        names[id_field(an_object(row, where), "id", where)] = names[row["id"]] = text_field(row, "name", where)
    return names


def _list(whole: dict[str, Any], name: str, path: Path) -> list[Any]:
    return a_list(need(whole, name, str(path)), f"{path}: {name}")


def _without_outlines(row: dict[str, Any]) -> dict[str, Any]:
    row.pop("segmentation", None)  # nine tenths of a file
    return row
