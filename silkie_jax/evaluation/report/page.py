"""`silkie evaluate report`: what the page shows, as data; the templates only lay it out."""

import base64
import io
import math
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from PIL import Image

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import Figure, Item
from silkie_jax.evaluation.report import plots
from silkie_jax.evaluation.report.runs import (
    Checkpoint,
    Measured,
    Outcome,
    changed_figures,
    comparable,
    differences,
    pictures_of,
    published,
    read_runs,
)
from silkie_jax.evaluation.table import find_benchmark
from silkie_jax.image_limits import FORMATS

try:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
except ImportError:
    raise UserError("reports need jinja2: pip install 'silkie-jax[evaluation]'") from None

_SIDE = 320  # pixels of an example's image
_MOST_SPOKES = 16


def write_report(runs: Sequence[str], out: Path, examples: int = 12) -> Path:
    """Writes OUT.html, OUT.md and OUT.png; the page needs no network.

    Raises:
        UserError: a run is not there or not scored, or matplotlib is missing.
    """
    if out.suffix != ".html":
        raise UserError(f"--out {out}: name a file that ends in .html")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder to write {out.name} in")
    checkpoints = read_runs(runs)
    shown = contents(checkpoints, examples)
    picture = overview(checkpoints, shown["benchmarks"])
    shown["overview"] = _data_url(picture, "png")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html"]),
    )
    environment.filters["figure"] = shown_figure
    environment.filters["signed"] = signed_figure
    out.write_text(environment.get_template("report.html.j2").render(shown), encoding="utf-8")
    out.with_suffix(".md").write_text(environment.get_template("report.md.j2").render(shown), encoding="utf-8")
    out.with_suffix(".png").write_bytes(picture)
    return out


def contents(checkpoints: Sequence[Checkpoint], examples: int) -> dict[str, Any]:
    """All that the templates show."""
    names = dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.measured)
    known = published()
    return {
        "checkpoints": [{"name": checkpoint.name, **_origin(checkpoint)} for checkpoint in checkpoints],
        "benchmarks": [_benchmark(name, checkpoints, known.get(name, {}), examples) for name in names],
    }


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint is known by."""
    answers = next((m.score["answers"] for m in checkpoint.measured.values() if m.score["answers"]), None) or {}
    return {
        "model": answers.get("endpoint") or answers.get("model") or "answers of others",
        "weights": answers.get("weights"),
        "adapter": answers.get("adapter"),
    }


def _benchmark(name: str, checkpoints: Sequence[Checkpoint], known: dict[str, Any], examples: int) -> dict[str, Any]:
    about = find_benchmark(name).ABOUT
    there = [(checkpoint.name, checkpoint.measured[name]) for checkpoint in checkpoints if name in checkpoint.measured]
    headline = [figure.name for figure in about.figures]
    figures = list(dict.fromkeys(figure for _, measured in there for figure in measured.score["figures"]))
    groups: dict[str, list[str]] = {}
    for figure in figures:
        if "/" in figure and figure not in headline:
            groups.setdefault(figure.split("/")[0], []).append(figure)
    return {
        "name": name,
        "title": about.title,
        "headline": about.figures,
        "rows": [{"name": n, "measured": m, "figures": m.score["figures"]} for n, m in there],
        "published": {
            whose: row
            for whose, row in known.items()
            if any(figure in row for figure in headline) and not all(_is_part(measured) for _, measured in there)
        },
        "groups": [_group(about.title, group, names, there) for group, names in groups.items()],
        "others": [figure for figure in figures if "/" not in figure and figure not in headline],
        "comparisons": [_comparison(there[0], other, headline, examples) for other in there[1:]],
    }


def _is_part(measured: Measured) -> bool:
    """Whether only some of a benchmark was asked, so that what others got of the whole says nothing beside it."""
    answers: dict[str, Any] = measured.score["answers"] or {}
    return answers.get("limit") is not None or bool(measured.score["settings"].get("tasks"))


def _group(title: str, group: str, figures: list[str], there: Sequence[tuple[str, Measured]]) -> dict[str, Any]:
    """Figures of the parts of one kind: a picture and a table."""
    values = {}
    for name, measured in there:
        found = {figure: measured.figure(figure) for figure in figures}
        values[name] = {
            figure.split("/", 1)[1]: (of["value"], of["low"] or of["value"], of["high"] or of["value"])
            for figure, of in found.items()
            if of is not None and of["value"] is not None
        }
    parts = [figure.split("/", 1)[1] for figure in figures]
    return {
        "name": group,
        "figures": figures,
        "parts": parts,
        "picture": _data_url(plots.bars(f"{title}: {group}", parts, values), "png"),
    }


def _comparison(
    first: tuple[str, Measured], second: tuple[str, Measured], headline: Sequence[str], examples: int
) -> dict[str, Any]:
    (first_name, a), (second_name, b) = first, second
    difference = differences(a, b)
    differing = [id for id in a.outcomes if id in b.outcomes and a.outcomes[id].outcome != b.outcomes[id].outcome]
    # The largest changes first, both directions in turn, so that neither is hidden.
    change = {id: b.outcomes[id].outcome - a.outcomes[id].outcome for id in differing}
    better = sorted((id for id in differing if change[id] > 0), key=lambda id: -change[id])
    worse = sorted((id for id in differing if change[id] < 0), key=lambda id: change[id])
    chosen: list[str] = []
    while (better or worse) and len(chosen) < examples:
        chosen += [ids.pop(0) for ids in (better, worse) if ids]
    items = pictures_of(b) if chosen else {}
    changed = changed_figures(a, b)
    return {
        "first": first_name,
        "second": second_name,
        "sentence": difference.sentence,
        "changes": {name: changed[name] for name in headline if name in changed},
        "different": comparable(a, b),
        "differing": len(differing),
        "examples": [_example(a.outcomes[id], b.outcomes[id], items.get(id)) for id in chosen[:examples]],
    }


def _example(first: Outcome, second: Outcome, item: Item | None) -> dict[str, Any]:
    texts = marked(first.answer, second.answer)
    return {"first": first, "second": second, "image": _thumbnail(item), "texts": texts}


def marked(first: str, second: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Two answers in pieces, each with whether the other answer lacks it; the pieces of a text make up the text."""
    words = [re.findall(r"\s*\S+|\s+$", text) for text in (first, second)]
    pieces: tuple[list[tuple[str, bool]], list[tuple[str, bool]]] = ([], [])
    ours, theirs = ([word.strip() for word in of] for of in words)
    matcher = SequenceMatcher(None, ours, theirs, autojunk=False)
    for kind, *ends in matcher.get_opcodes():
        for found, of, (start, end) in zip(pieces, words, (ends[:2], ends[2:]), strict=True):
            if start < end:
                found.append(("".join(of[start:end]), kind != "equal"))
    return pieces


def overview(checkpoints: Sequence[Checkpoint], benchmarks: Sequence[dict[str, Any]]) -> bytes:
    """The picture of everything: a radar of headline figures, or of sub-tasks where there are too few of those."""
    spokes: list[tuple[str, str, Figure]] = [
        (benchmark["title"], benchmark["name"], figure) for benchmark in benchmarks for figure in benchmark["headline"]
    ]
    labels: list[str] = []
    lines: dict[str, list[float]] = {checkpoint.name: [] for checkpoint in checkpoints}
    for title, name, figure in spokes:
        found = [c.measured[name].figure(figure.name) if name in c.measured else None for c in checkpoints]
        values = [of["value"] for of in found if of is not None and of["value"] is not None]
        if len(values) < len(checkpoints):
            continue
        labels.append(f"{title}\n{figure.name}")
        for checkpoint, value in zip(checkpoints, values, strict=True):
            lines[checkpoint.name].append(_share(value, figure))
    if len(labels) >= 3:
        return plots.radar(labels[:_MOST_SPOKES], {name: of[:_MOST_SPOKES] for name, of in lines.items()})
    return plots.bars(
        "share of the best possible",
        [label.replace("\n", ": ") for label in labels],
        {
            name: {label.replace("\n", ": "): (v, v, v) for label, v in zip(labels, of, strict=True)}
            for name, of in lines.items()
        },
    )


def _share(value: float, figure: Figure) -> float:
    """How far from the worst to the best, in [0, 1]."""
    return min(max((value - figure.worst) / (figure.best - figure.worst), 0.0), 1.0)


def shown_figure(value: float | None) -> str:
    """A figure for a table."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def signed_figure(value: float | None) -> str:
    """A change for a table."""
    shown = shown_figure(value)
    return f"+{shown}" if value is not None and value > 0 else shown.replace("-", "−")


def _thumbnail(item: Item | None) -> str | None:
    """A small JPEG of an item's first image; None where it is not to be had."""
    if item is None or not item.pictures:
        return None
    try:
        with Image.open(io.BytesIO(item.pictures[0].read()), formats=FORMATS) as image:
            small = image.convert("RGB")
            small.thumbnail((_SIDE, _SIDE))
            file = io.BytesIO()
            small.save(file, "JPEG", quality=80)
    except (UserError, OSError):
        return None
    return _data_url(file.getvalue(), "jpeg")


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
