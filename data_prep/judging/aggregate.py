"""Judges' replies into a rating for each response and aspect: texts back in place, orders and judges averaged."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep.judging.ratings import ParsedReply, parse
from data_prep.judging.rubric import Rubric
from data_prep.run import Gathered, JudgeReply
from data_prep.tables.fields import check_scale
from silkie_jax.corpus.schema import Record, Response
from silkie_jax.errors import UserError

if TYPE_CHECKING:
    from data_prep.judging.kinds import Reading

KINDS = ("complete", "missing", "refusal", "truncated", "unparsable", "failed")
RESERVED = ("licence", "judgements", "models_reported", "truncated_responses")
"""Keys of a record's `extra` that a build fills in."""


@dataclass(frozen=True)
class Judgement:
    """One judge's reply to one order, with its texts back in their places.

    Attributes:
        judge, order: as in the store.
        kind: of the reply (`ratings.ParsedReply.kind`), or "failed" where there is none.
        shown: index of the response that stood at each place.
        ratings: aspect -> rating of each response; NaN where there is none.
        rationales: aspect -> reason for each response.
        note: why the reply is not complete, for people.
    """

    judge: str
    order: int
    kind: str
    shown: tuple[int, ...]
    ratings: dict[str, list[float]]
    rationales: dict[str, list[str]]
    note: str

    def to_json(self, with_rationales: bool) -> dict[str, Any]:
        """As a record's `extra` keeps it; NaN is null."""
        ratings = {name: [_or_none(rating) for rating in row] for name, row in self.ratings.items()}
        value: dict[str, Any] = {"judge": self.judge, "order": self.order, "kind": self.kind, "shown": list(self.shown)}
        value["ratings"] = ratings
        if with_rationales:
            value["rationales"] = self.rationales
        return value


def judge(reply: JudgeReply, rubric: Rubric, places: Mapping[int, int], responses: int) -> Judgement:
    """Parses a reply and puts its texts back: `places` maps a response's slot to its index among `responses`."""
    shown = [places.get(slot, -1) for slot in reply.arrangement]
    if reply.text or reply.outcome in ("refusal", "content_filter"):
        refusal = reply.text if reply.outcome == "refusal" else None
        finish = "content_filter" if reply.outcome == "content_filter" else reply.finish_reason
        parsed = parse(reply.text, rubric, len(shown), finish_reason=finish, refusal=refusal)
        kind: str = parsed.kind
    else:
        parsed, kind = _nothing(rubric, len(shown), reply.outcome), "failed"
    ratings = {name: [math.nan] * responses for name in rubric.names}
    rationales = {name: [""] * responses for name in rubric.names}
    for place, response in enumerate(shown):
        if response >= 0:
            for name in rubric.names:
                ratings[name][response] = parsed.ratings[name][place]
                rationales[name][response] = parsed.rationales[name][place]
    return Judgement(reply.judge, reply.order, kind, tuple(shown), ratings, rationales, parsed.note)


def mean_ratings(
    judgements: Sequence[Judgement], aspects: Iterable[str], responses: int, verdicts: Collection[str] = ()
) -> list[dict[str, float]]:
    """Aspect -> rating of each response: the mean over each judge's orders, then over the judges; NaN for none.

    Judges weigh alike however many orders each has rated. A rating that one order lacks is the mean of the others, but
    for the judges in `verdicts`: theirs are of all orders or none, since a preference that was seen in one order alone
    may be one for a place.
    """
    rows: dict[str, dict[str, list[list[float]]]] = {aspect: {} for aspect in aspects}  # aspect -> judge -> its orders
    for judgement in judgements:
        for aspect, row in judgement.ratings.items():
            rows[aspect].setdefault(judgement.judge, []).append(row)

    def of_judge(judge: str, ratings: list[float]) -> float:
        return math.nan if judge in verdicts and any(map(math.isnan, ratings)) else _mean(ratings)

    return [
        {
            aspect: _mean([of_judge(judge, [row[n] for row in orders]) for judge, orders in rows[aspect].items()])
            for aspect in rows
        }
        for n in range(responses)
    ]


def judgements_of(gathered: Gathered, judges: Mapping[str, "Reading"]) -> list[Judgement]:
    """What all replies about an instruction say, judge by judge."""
    return [judgement for reading in judges.values() for judgement in reading.judgements(gathered)]


def to_record(
    gathered: Gathered, judges: Mapping[str, "Reading"], judgements: Sequence[Judgement], images: Sequence[bytes]
) -> Record:
    """The corpus's record of an instruction: responses by slot, averaged ratings, and every judgement in `extra`."""
    instruction, responses = gathered.instruction, gathered.responses
    aspects = list(dict.fromkeys(name for reading in judges.values() for name in reading.names))
    verdicts = [judge for judge, reading in judges.items() if reading.verdict]
    ratings = mean_ratings(judgements, aspects, len(responses), verdicts)
    extra: dict[str, Any] = {key: value for key, value in instruction.extra.items() if key not in RESERVED}
    if instruction.licence:
        extra["licence"] = instruction.licence
    extra["models_reported"] = [response.model for response in responses]
    if truncated := [index for index, response in enumerate(responses) if response.outcome == "truncated"]:
        extra["truncated_responses"] = truncated
    if judgements:
        extra["judgements"] = [judgement.to_json(number > 0) for number, judgement in enumerate(judgements)]
    return Record(
        id=instruction.id,
        images=tuple(images),
        prompt=instruction.prompt,
        responses=tuple(
            Response(
                text=response.text,
                model=response.agent,
                ratings=ratings[index],
                # the first judgement's reasons; those of the others are in `extra`
                rationales={n: row[index] for n, row in judgements[0].rationales.items() if row[index]}
                if judgements
                else {},
            )
            for index, response in enumerate(responses)
        ),
        history=instruction.history,
        source=instruction.source,
        extra=extra,
    )


def check_scales(judges: Mapping[str, "Reading"]) -> None:
    """Refuses judges whose ratings of one aspect cannot be averaged.

    Raises:
        UserError: they use different scales, or one that is too wide for a report.
    """
    seen: dict[str, tuple[str, str]] = {}
    for name, reading in judges.items():
        if reading.scale is not None:
            check_scale(reading.scale.low, reading.scale.high, f"judge {name}: scale.")
        ends = _ends(reading)
        for aspect in reading.names:
            other, others = seen.setdefault(aspect, (name, ends))
            if others != ends:
                raise UserError(
                    f"judges {other} and {name} rate {aspect} {others} and {ends}, which cannot be averaged: "
                    "choose with --judge"
                )


def _ends(reading: "Reading") -> str:
    """The scale of a judge, for people."""
    return "without a scale" if reading.scale is None else f"from {reading.scale.low} to {reading.scale.high}"


def _nothing(rubric: Rubric, texts: int, why: str) -> ParsedReply:
    nan, words = {name: [math.nan] * texts for name in rubric.names}, {name: [""] * texts for name in rubric.names}
    return ParsedReply("unparsable", nan, words, note=f"there is no reply ({why})")


def _mean(values: Sequence[float]) -> float:
    """The mean of those that are numbers; NaN of none. `fsum`, so that their order does not matter."""
    if len(values) == 1:
        return values[0]
    numbers = [value for value in values if not math.isnan(value)]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
