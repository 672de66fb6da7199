"""`silkie corpus report`: what a corpus holds, as one HTML page that needs nothing else, and as JSON."""

import base64
import hashlib
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import jinja2
from tqdm import tqdm

from data_prep.corpora import published
from data_prep.corpora.measures import Measures
from data_prep.corpora.show import images_shown
from data_prep.run import Run
from data_prep.tables.images import opened
from data_prep.tables.rejections import Rejected
from silkie_jax.corpus import CorpusReader, Record
from silkie_jax.corpus.reader import read_manifest
from silkie_jax.errors import UserError

_TEMPLATES = Path(__file__).parent / "templates"
_THUMBNAIL = 320  # pixels of the longer side
_LONGEST = 3000  # characters of a text that the page shows
_ENOUGH = 30  # observations below which no bias is claimed


def write_report(
    corpus: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    run: str | os.PathLike[str] | None = None,
    examples: int = 12,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Writes the page and, beside it, the numbers as JSON; returns the page's path.

    Args:
        corpus: the corpus folder.
        out: the page to write; `report.html` in the corpus folder by default.
        run: the run that the corpus came from, for everything that it cost, attempts in vain included.
        examples: how many instructions to show with their images.
        seed: of their choice.
        progress: whether to show progress on stderr.

    Raises:
        UserError: there is no such corpus or run, or the page cannot be written.
    """
    reader = CorpusReader(corpus)
    page = Path(out) if out is not None else reader.path / "report.html"
    if page.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {page}: name a file that ends in .html; the numbers go beside it as .json")
    numbers = measure(reader, run=run, progress=progress)
    shown = [_example(reader[number]) for number in _choose(reader, examples, seed)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    html = environment.get_template("report.j2").render(numbers=numbers, examples=shown, remarks=remarks(numbers))
    html = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", html)
    for path, text in (
        (page.with_suffix(".json"), json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False) + "\n"),
        (page, html),
    ):
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error})") from None
    return page


def measure(
    corpus: CorpusReader, *, run: str | os.PathLike[str] | None = None, progress: bool = False
) -> dict[str, Any]:
    """The numbers of a report (see `Measures.to_json`), with what the manifest knows and what was spent."""
    manifest = read_manifest(corpus.path)
    measures = Measures(manifest.get("weights"), manifest.get("scales"))
    for record in tqdm(
        corpus, total=len(corpus), unit="record", desc="counting", disable=not progress, mininterval=0.5
    ):
        measures.add(record)
    numbers = {"name": corpus.name, "fingerprint": corpus.fingerprint, **measures.to_json()}
    numbers["scales"] = manifest.get("scales", {})
    numbers["weights"] = manifest.get("weights", {})
    numbers["rejected"] = corpus.summary.get("rejected", {})
    numbers["spending"] = manifest.get("spending", [])
    numbers["cost"] = round(math.fsum(row["cost"] for row in numbers["spending"]), 6) if numbers["spending"] else None
    numbers["run"] = _run_costs(run) if run is not None else None
    if set(numbers["ratings"]) == set(published.ASPECTS):
        numbers["published"] = {
            "ratings": {aspect: list(shares) for aspect, shares in published.RATINGS.items()},
            "models": {model: published.published_mean(model) for model in numbers["models"]},
        }
    return numbers


def remarks(numbers: dict[str, Any]) -> list[str]:
    """What a reader should not miss: biases that are not chance, and gaps. Sentences for people."""
    found = []
    for judge, position in numbers["position"]["as_judged"].items():
        biased = _bias(position["places"])
        if biased:
            left = _bias(numbers["position"]["in_corpus"])
            rest = (
                f"in the corpus {left[0]:+.2f} is left of it: average more orders (orders: in the judge's file)"
                if left
                else "averaging the orders has taken it out of the corpus"
            )
            found.append(
                f"Judge {judge} rates the text shown at place {biased[1]} by {biased[0]:+.2f} off its instruction's "
                f"mean, which is not chance; {rest}."
            )
    longer = numbers["length"]["longer_response_preferred"]
    if longer["n"] >= _ENOUGH and abs(longer["share"] - 0.5) > 0.1:
        found.append(
            f"The longer of two responses is preferred in {longer['share']:.0%} of the pairs: length and rating are "
            "not independent here."
        )
    for aspect, row in numbers["ratings"].items():
        share = row["missing"] / max(row["n"] + row["missing"], 1)
        if share > 0.05:
            found.append(f"{row['missing']:,} ratings of {aspect} are missing ({share:.0%}).")
    for aspect, count in numbers["off_scale"].items():
        found.append(
            f"{count:,} ratings of {aspect} are off the scale and count in none of these numbers: correct them and "
            "import the corpus anew."
        )
    for judge, row in numbers["judges"].items():
        replies = row["replies"]
        lost = sum(count for kind, count in replies.items() if kind != "complete")
        if lost > 0.05 * sum(replies.values()):
            found.append(f"{lost:,} of {sum(replies.values()):,} replies of {judge} are not complete: see Judges.")
    return found


def _bias(places: dict[str, dict[str, Any]]) -> tuple[float, str] | None:
    """The largest mean deviation that is beyond four standard errors and a tenth of a point, and its place."""
    strong = [
        (row["mean"], place)
        for place, row in places.items()
        if row["n"] >= _ENOUGH and abs(row["mean"]) > max(0.1, 4 * (row["standard_error"] or 0.0))
    ]
    return max(strong, key=lambda item: abs(item[0]), default=None)


def _run_costs(path: str | os.PathLike[str]) -> dict[str, Any]:
    with Run.open(path) as run:
        rows = [  # not asdict, which takes a Counter for pairs to count
            vars(row) | {"requests": dict(row.requests), "attempts": dict(row.attempts)} for row in run.spending()
        ]
        return {"spent_at_most": round(run.spent(), 6), "agents": rows}


def _choose(reader: CorpusReader, count: int, seed: int) -> list[int]:
    """Numbers of some records, by a seeded hash of their ids, in order."""
    ranked = sorted(range(len(reader)), key=lambda n: hashlib.sha256(f"{seed}:{reader.index[n].id}".encode()).digest())
    return sorted(ranked[: max(0, count)])


def _example(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "source": record.source,
        "prompt": _shorten(record.prompt),
        "history": [(_shorten(user), _shorten(assistant)) for user, assistant in record.history],
        "images": [_thumbnail(image) for image in record.images],
        "responses": [
            {
                "model": (response.model or "unknown") + images_shown(response),
                "text": _shorten(response.text),
                "ratings": {a: "–" if math.isnan(r) else f"{r:.3g}" for a, r in response.ratings.items()},
                "rationales": {aspect: _shorten(why) for aspect, why in response.rationales.items()},
            }
            for response in record.responses
        ],
    }


def _thumbnail(data: bytes) -> str:
    """A small JPEG as a data URL; why not, in words, of what is no image that can be read."""
    try:
        with opened(data) as image:
            image.draft("RGB", (2 * _THUMBNAIL, 2 * _THUMBNAIL))
            small = image.convert("RGB")
    except Rejected as why:
        return str(why)
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text):,} characters)"
