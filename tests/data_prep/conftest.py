"""Small VLFeedback-form data, made on the spot."""

import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


def encode(format="JPEG", size=(32, 24), mode="RGB", colour=0, **options):
    """An image file of one colour, as bytes."""
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, format, **options)
    return file.getvalue()


def completion(text, rating=3, model="m"):
    """A completion whose three aspects share a rating, given as the text or value that the row is to hold."""
    rating = str(rating) if isinstance(rating, int) else rating
    return {
        "annotations": {aspect: {"Rating": rating, "Rationale": f"because {rating}"} for aspect in ASPECTS},
        "model": model,
        "response": text,
    }


def row(id, *ratings, **changes):
    """A row with a completion for each rating; `changes` replace fields."""
    completions = [completion(f"{id} {n}", rating, f"m{n}") for n, rating in enumerate(ratings or (3, 1))]
    fields = {
        "id": id,
        "prompt": f"prompt of {id}",
        "models": [c["model"] for c in completions],
        "completions": completions,
        "img_path": f"merged_images/{id}.jpg",
    }
    return {**fields, **changes}


def write_rows(path, rows):
    """Writes JSON lines; a text is written as it is."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def rejections(corpus):
    """The lines of `rejected.jsonl`."""
    return [json.loads(line) for line in (corpus / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


def lock(monkeypatch, name):
    """Makes listing a folder of this name fail: permissions do not stop root, who runs tests in containers."""

    def guarded(list_folder):
        def listing(path):
            if isinstance(path, str | Path) and Path(path).name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return list_folder(path)

        return listing

    for function in (os.scandir, os.listdir):
        monkeypatch.setattr(os, function.__name__, guarded(function))


@pytest.fixture
def images(tmp_path):
    """A folder of JPEG files a.jpg to f.jpg, each of its own colour."""
    folder = tmp_path / "images"
    (folder / "merged_images").mkdir(parents=True)
    for n, name in enumerate("abcdef"):
        (folder / "merged_images" / f"{name}.jpg").write_bytes(encode(colour=(n * 40, 0, 0)))
    return folder
