"""The one parser of judges' replies: text or JSON in, ratings by aspect and text out. It never raises, never guesses.

A rating counts only where the reply says it in so many words for this aspect and this text: a lone number within the
scale on a line labelled as a rating, under a heading that names the aspect and one that names the text, in either
order of nesting; or the same in a JSON value. Whatever is less clear is missing: a number among other words, a number
on another scale, a heading that names no known aspect, two ratings that contradict each other. A missing rating can be
asked for again, an invented one is never found out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from data_prep.judging.ratings.found import Found
from data_prep.judging.ratings.json_form import read_json
from data_prep.judging.ratings.text_form import read_text
from data_prep.judging.ratings.verdict import read_verdict
from data_prep.judging.ratings.words import rating_in
from data_prep.judging.rubric import Rubric
from data_prep.replies import MAX_REPLY, declines, without_thoughts

__all__ = ["Kind", "ParsedReply", "parse", "rating_in"]

Kind = Literal["complete", "missing", "refusal", "truncated", "unparsable"]


@dataclass(frozen=True)
class ParsedReply:
    """What a judge said. Texts are indexed from 0 in the order in which the judge saw them.

    Attributes:
        kind: "complete": every rating is a number or an explicit N/A, at least one a number; "missing": some are
            absent or unclear; "refusal": the judge or its server declined; "truncated": cut off before all was said;
            "unparsable": no rating found.
        ratings: aspect -> rating of each text; NaN where there is none.
        rationales: aspect -> reason for each text; "" where there is none.
        missing: (aspect, text) of ratings that are absent or unclear; explicit N/As are not among them.
        note: why it is not complete, for people.
    """

    kind: Kind
    ratings: dict[str, list[float]]
    rationales: dict[str, list[str]]
    missing: list[tuple[str, int]] = field(default_factory=list)
    note: str = ""

    @property
    def usable(self) -> bool:
        """Whether there is any rating in it."""
        return any(not math.isnan(rating) for row in self.ratings.values() for rating in row)

    @property
    def retry(self) -> bool:
        """Whether asking the same again can help: not where a rule declined, nor where the same limit would cut."""
        return self.kind in ("missing", "unparsable")


def parse(
    reply: str | None, rubric: Rubric, texts: int, *, finish_reason: str | None = None, refusal: str | None = None
) -> ParsedReply:
    """Reads a judge's reply, in whichever of the two forms it came.

    Args:
        reply: the message's content; None or "" where there is none.
        rubric: whose aspects and scale were asked for.
        texts: how many texts the judge saw.
        finish_reason: as the server gave it; "length" and "content_filter" matter.
        refusal: the message's `refusal` field.
    """
    reply = without_thoughts(reply if isinstance(reply, str) else "")
    cut = finish_reason == "length"
    if rubric.verdict:
        return _verdict(reply, rubric, texts, cut, finish_reason, refusal)
    found = Found(rubric, texts)
    if len(reply) <= MAX_REPLY:
        read_json(reply, found)
        if not found.any:
            found = Found(rubric, texts, found.broken)
            read_text(reply, found, cut)
    ratings, missing = found.result()
    rationales = {name: [found.reasons.get((name, n), "") for n in range(1, texts + 1)] for name in rubric.names}
    kind, note = _kind(reply, found, ratings, missing, cut, finish_reason, refusal)
    if kind == "unparsable" and found.broken:  # nothing it says can be placed
        ratings = {name: [math.nan] * texts for name in rubric.names}
    return ParsedReply(kind, ratings, rationales, missing, note)


def _verdict(
    reply: str, rubric: Rubric, texts: int, cut: bool, finish_reason: str | None, refusal: str | None
) -> ParsedReply:
    """1 for the text that a reply names, 0 for the others; the words before it are its reason."""
    (name,) = rubric.names
    found = None if refusal or len(reply) > MAX_REPLY else read_verdict(reply, texts)
    if found is not None:
        best, reason = found
        ratings = {name: [float(text == best) for text in range(texts)]}
        reasons = {name: [reason if text == best else "" for text in range(texts)]}
        return ParsedReply("complete", ratings, reasons)
    kind: Kind
    if refusal or finish_reason == "content_filter" or declines(reply):
        kind, note = "refusal", " ".join((refusal or reply or "the server's content filter").split())[:300]
    elif cut:
        kind, note = "truncated", "the reply reached the limit of tokens before its verdict"
    else:
        kind, note = "unparsable", f"there is no whole [[1]] to [[{texts}]] at its end" if reply.strip() else _EMPTY
    nothing: dict[str, list[float]] = {name: [math.nan] * texts}
    return ParsedReply(kind, nothing, {name: [""] * texts}, [(name, text) for text in range(texts)], note)


def _kind(
    reply: str,
    found: "Found",
    ratings: Mapping[str, Sequence[float]],
    missing: Sequence[tuple[str, int]],
    cut: bool,
    finish_reason: str | None,
    refusal: str | None,
) -> tuple[Kind, str]:
    any_number = any(not math.isnan(rating) for row in ratings.values() for rating in row)
    if any_number and not missing:
        return "complete", ""
    if refusal or finish_reason == "content_filter":
        return "refusal", " ".join(str(refusal or "the server's content filter").split())[:300]
    if cut:
        return "truncated", "the reply reached the limit of tokens"
    if found.broken:
        return "unparsable", found.broken
    if any_number:
        first = ", ".join(f"{aspect} of text {text + 1}" for aspect, text in missing[:3])
        more = ", ..." if missing[3:] else ""
        return "missing", f"{len(missing)} ratings are absent, unclear or off the scale: {first}{more}"
    if declines(reply):
        return "refusal", " ".join(reply.split())[:300]
    if found.any and not missing:
        return "refusal", "every rating is N/A"
    return "unparsable", _EMPTY if not reply.strip() else "no rating was found"


_EMPTY = "the reply is empty"
