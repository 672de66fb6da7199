"""VLFeedback (arXiv 2312.10665, section 2) as published on the hub, into a corpus."""

import math
import os
from functools import partial
from typing import Any, Unpack

from data_prep.tables import fields
from data_prep.tables.importing import Draft, ImportOptions, run_import
from data_prep.tables.rejections import Rejected
from data_prep.tables.summary import Summary
from silkie_jax.corpus.schema import Response

SCALE = (1, 5)
ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
_FIELDS = ("id", "prompt", "models", "completions", "img_path", "image")


def import_vlfeedback(
    source: str | os.PathLike[str],
    images: str | os.PathLike[str] | None,
    dst: str | os.PathLike[str],
    *,
    scale: fields.Scale = SCALE,
    **options: Unpack[ImportOptions],
) -> Summary:
    """Imports VLFeedback rows and their images; run the same call again to resume one that was interrupted.

    A row has `id`, `prompt`, `completions` (a list of objects or an object of lists; each with `model`, `response` and
    `annotations`: aspect -> `Rating` and `Rationale`) and `img_path`. Its image is looked up by `img_path`, by the file
    name alone, and by `{id}.*`; a row without `img_path` and without such a file is text only. Order is the input's. A
    row that repeats an earlier one is left out; one that shares only the id is kept as `id#2`. A number off the scale
    is no rating. What is left out is listed in `rejected.jsonl` of the corpus.

    Args:
        source: a .jsonl or .parquet file, or a folder of them.
        images: a folder, zip or tar, read in place; None: beside the rows, where the rows do not carry them.
        dst: the corpus folder to make.
        scale: lowest and highest rating.
        options: see `ImportOptions`.

    Returns:
        What was imported, also saved as `summary.json`. A corpus finished before from the same input is left alone.

    Raises:
        UserError: a file is missing or of another kind, `dst` holds something else, or no row can be used.
    """
    fields.check_scale(*scale, "--scale: ")
    return run_import(
        source,
        images,
        dst,
        parse=partial(parse_row, scale=scale),
        name="vlfeedback",
        identical_rows="leave out",
        scale=scale,
        **options,
    )


def parse_row(row: dict[str, Any], scale: fields.Scale = SCALE) -> Draft:
    """One row in the corpus's terms.

    Raises:
        Rejected: it lacks an id, a prompt or any response.
    """
    id = fields.row_id(row.get("id"))
    if not id:
        raise Rejected("id is absent")
    draft = Draft(
        id=id,
        prompt=fields.text(row.get("prompt"), "prompt"),
        responses=[],
        images=fields.image_refs(row.get("image") or row.get("img_path")),
        image_id=id,
        extra={str(key): fields.json_value(value) for key, value in row.items() if key not in _FIELDS},
    )
    if row.get("img_path"):
        draft.extra["img_path"] = fields.json_value(row["img_path"])
    completions = _as_list(row.get("completions"))
    models = row.get("models")
    for index, completion in enumerate(completions):
        model = completion.get("model")
        if model is None and isinstance(models, list) and len(models) == len(completions):
            model = models[index]
        try:
            answer = fields.text(completion.get("response"), "response")
            ratings, rationales = _ratings(completion.get("annotations"))
            for aspect, rating in ratings.items():
                if not (math.isnan(rating) or scale[0] <= rating <= scale[1]):
                    ratings[aspect] = math.nan
                    draft.off_scale.append(
                        f"completion {index}, {aspect}: {rating:g} is not between {scale[0]:g} and {scale[1]:g}: "
                        "correct it, or name the scale with --scale"
                    )
            draft.responses.append(Response(answer, fields.text(model or "", "model"), ratings, rationales))
        except Rejected as why:
            draft.dropped.append(f"completion {index}: {why}")
    if not draft.responses:
        raise Rejected("no usable response", "; ".join(draft.dropped) or "completions is empty")
    return draft


def _as_list(completions: Any) -> list[dict[str, Any]]:
    """Completions as a list of objects, from that or, as `datasets` stores them, from an object of lists."""
    if isinstance(completions, dict):
        columns = {key: value for key, value in completions.items() if isinstance(value, list)}
        lengths = {len(column) for column in columns.values()}
        if len(lengths) != 1:
            raise Rejected("completions are malformed", "an object of lists must have lists of one length")
        return [{key: column[index] for key, column in columns.items()} for index in range(lengths.pop())]
    if isinstance(completions, list) and all(isinstance(completion, dict) for completion in completions):
        return completions
    raise Rejected("completions are malformed", f"neither a list of objects nor an object of lists: {completions!r}")


def _ratings(annotations: Any) -> tuple[dict[str, float], dict[str, str]]:
    """Ratings (NaN where there is no number) and rationales by aspect, the three and any further one."""
    annotations = annotations if isinstance(annotations, dict) else {}
    ratings: dict[str, float] = {}
    rationales: dict[str, str] = {}
    for aspect in dict.fromkeys((*annotations, *ASPECTS)):
        annotation = annotations.get(aspect)
        annotation = annotation if isinstance(annotation, dict) else {}
        name = fields.text(aspect, "aspect")
        ratings[name] = fields.rating(annotation.get("Rating")) if annotation else math.nan
        rationale = annotation.get("Rationale")
        if isinstance(rationale, str):
            rationales[name] = fields.text(rationale, "rationale")
    return ratings, rationales
