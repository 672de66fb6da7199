"""`/v1/logprobs`: the log-probability of texts as replies to a prompt, by the rows that training is made of."""

from typing import Any

from silkie_jax.corpus import Record, Response
from silkie_jax.nn.attention import ROW
from silkie_jax.preference.rows import Row
from silkie_jax.scoring.scorer import Scored
from silkie_jax.serving.chat_request import check_fields
from silkie_jax.serving.fields import image, read_json, shown, text
from silkie_jax.serving.limits import Limits, Refused
from silkie_jax.serving.model import ServedModel

_MOST_CONTEXTS = 4  # of a row, in contexts: what it computes grows with its square


def read_logprobs(body: bytes, model: ServedModel, limits: Limits) -> Record:
    """Reads and checks a request: a record whose responses are the texts.

    Raises:
      Refused: one line that names the field and the mend.
    """
    given = read_json(body)
    check_fields(given, {"model", "prompt", "images", "texts", "history", "views"}, {"user"})
    model.check_name(given.get("model"))
    texts, urls = given.get("texts"), given.get("images") or []
    if not isinstance(texts, list) or not texts:
        raise Refused("texts must be a list of at least one text", param="texts")
    if len(texts) >= ROW:
        raise Refused(
            f"texts: a row holds {ROW - 1}, not {len(texts)}; send the others in further requests", param="texts"
        )
    if not isinstance(urls, list):
        raise Refused(f"images must be a list of data URLs, not {shown(urls)}", param="images")
    if len(urls) > limits.images:
        raise Refused(f"images: a request may show {limits.images}, not {len(urls)}", param="images")
    views = read_views(given.get("views"), len(texts), len(urls))
    record = Record(
        id="request",
        images=tuple(_image(entry, f"images[{i}]", model, limits) for i, entry in enumerate(urls)),
        prompt=text(given.get("prompt"), "prompt"),
        responses=tuple(Response(text(entry, f"texts[{i}]"), images=views[i]) for i, entry in enumerate(texts)),
        history=_history(given.get("history")),
    )
    model.check_length(sum(map(len, (record.prompt, *texts, *(said for turn in record.history for said in turn)))))
    row = model.scorer.row(record)
    if not isinstance(row, Row) or row.truncated:
        raise Refused(
            f"the prompt with its images and the longest text exceed the context of {model.engine.context:,} tokens: "
            "shorten them, or serve with a larger --context",
            code="context_length_exceeded",
        )
    if len(row.tokens) > _MOST_CONTEXTS * model.engine.context:
        raise Refused(
            f"the prompt and all texts are {len(row.tokens):,} tokens, of at most "
            f"{_MOST_CONTEXTS * model.engine.context:,}: send some texts in another request",
            param="texts",
        )
    return record


def _image(entry: Any, name: str, model: ServedModel, limits: Limits) -> bytes:
    """The file of an image: a data URL, or an object that holds one, as in a chat's parts."""
    return image(entry.get("url") if isinstance(entry, dict) else entry, name, model.image_size, limits).file


def read_views(given: Any, texts: int, images: int) -> list[tuple[int, ...] | None]:
    """Of each text, which of the images it replies to, in the order in which they are shown; None: all of them.

    Raises:
      Refused: as `read_logprobs` does.
    """
    if given is None:
        return [None] * texts
    if not isinstance(given, list) or len(given) != texts:
        raise Refused(f"views must be a list with an entry for each of the {texts} texts", param="views")
    for i, view in enumerate(given):
        fits = view is None or (
            isinstance(view, list)
            and all(type(image) is int and 0 <= image < images for image in view)
            and len(set(view)) == len(view)
        )
        if not fits:
            raise Refused(
                f"views[{i}] must be null, or a list of different images by their number, from 0 and below {images}, "
                f"not {shown(view)}",
                param="views",
            )
    return [view if view is None else tuple(view) for view in given]


def _history(given: Any) -> tuple[tuple[str, str], ...]:
    """Earlier turns, each of a user's text and the reply."""
    turns = [] if given is None else given
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise Refused(f"history must be a list of turns [user, assistant], not {shown(given)}", param="history")
    return tuple((text(user, "history"), text(reply, "history")) for user, reply in turns)


def logprobs_reply(model: ServedModel, scored: Scored) -> dict[str, object]:
    """What the client gets."""
    assert isinstance(scored.row, Row)
    counts = [int((scored.row.label_branches == i + 1).sum()) for i in range(len(scored.logps))]
    data = [
        {"index": i, "logprob": float(logp), "tokens": tokens}
        for i, (logp, tokens) in enumerate(zip(scored.logps, counts, strict=True))
    ]
    prompt = int((scored.row.branches % ROW == 0).sum())  # of each view
    usage = {"prompt_tokens": prompt, "total_tokens": len(scored.row.tokens)}
    return {"object": "logprobs", "model": model.name, "data": data, "usage": usage}
