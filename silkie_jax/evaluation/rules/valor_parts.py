"""VALOR-Eval's five parts: what an image's matched features count as, by the official post-processing and scorers.

Source: haoyiq114/VALOR `evaluation/postprocess/` and `evaluation/scorer/`. A row is what the judge's matching leaves:
ground truth, generated features, `matched` (generated -> ground truth) and `broader` (the same, of more general words,
which count for faithfulness only).

`official` keeps the originals' slips; `fixed` mends them:

- attribute_object: an order number that stands for several pairs counts as one, of the matches of one order number
  only the first is seen, pairs at odd places keep a missing bracket, "unknown" is not dropped as "unspecified" is.
  Fixed: pairs are what is counted and taken from the pool.
- attribute_people: the last pair of every person is gone from the ground truth, and of all matches of a person one
  counts. Fixed: all pairs, all matches.
- relation_positional: two ways to say one relation count as two. Fixed: relations covered are counted.
- relation_comparative: broader matches out of order are subtracted, though they were never added; broader ones in order
  cover; alternatives ("a / b") are only seen in broader ones; a match with what is not in the ground truth stops the
  tool (both: it matches nothing). Fixed: what is in order is faithful, what of it is no broader match covers.
- object_existence: a match with what is not in the ground truth covers. Fixed: it matches nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Pairs = Mapping[str, Any]
"""Generated -> ground truth."""


@dataclass(frozen=True)
class Tally:
    """Counts of one image; `all_*`: whether the official tool has the image wholly faithful or covered."""

    generated: int
    faithful: int
    truth: int
    covered: int
    all_faithful: bool
    all_covered: bool

    @classmethod
    def of(cls, generated: int, faithful: int, truth: int, covered: int) -> "Tally":
        return cls(generated, faithful, truth, covered, faithful == generated, covered == truth)

    def counts(self) -> dict[str, float]:
        return {"images": 1, **{name: float(value) for name, value in vars(self).items()}}


COUNTS = ("images", "generated", "faithful", "truth", "covered", "all_faithful", "all_covered")


# Objects, and relations of place.


def object_existence(row: Mapping[str, Any], fixed: bool) -> Tally:
    """Distinct objects of the ground truth that were matched."""
    truth, matched, broader = set(row["gt_words"]), _known(row, "matched_objects"), _known(row, "broader_concept")
    if fixed:
        matched, broader = ({k: v for k, v in pairs.items() if v in truth} for pairs in (matched, broader))
    return Tally.of(len(row["generated_words"]), len(matched) + len(broader), len(truth), len(set(matched.values())))


def relation_positional(row: Mapping[str, Any], fixed: bool) -> Tally:
    """As `object_existence`, of {id: [ways to say it]}."""
    truth, matched, broader = row["gt_words"], _known(row, "matched_objects"), _known(row, "broader_concept")
    covered: set[Any] = set(matched.values())
    if fixed:
        ways = {way: number for number, said in truth.items() for way in said}
        matched, broader = ({k: v for k, v in pairs.items() if v in ways} for pairs in (matched, broader))
        covered = {ways[way] for way in matched.values()}
    return Tally.of(len(_relations(row)), len(matched) + len(broader), len(truth), len(covered))


def _known(row: Mapping[str, Any], name: str) -> Pairs:
    return row.get(name) or {}


def _relations(row: Mapping[str, Any]) -> list[Any]:
    """Relations, which some replies wrap into an object of one key."""
    generated = row["generated_words"]
    return next(iter(generated.values()), []) if isinstance(generated, dict) else generated


# Sizes.


def in_order(ranks: list[int]) -> list[int]:
    """The longest strictly increasing subsequence; of several the one that ends first."""
    best: list[list[int]] = []
    for i, rank in enumerate(ranks):
        line = [rank]
        for j in range(i):
            if ranks[j] < rank and len(best[j]) >= len(line):
                line = [*best[j], rank]
        best.append(line)
    return max(best, key=len, default=[])


def comparative_postprocess(row: Mapping[str, Any]) -> tuple[list[str], int, dict[str, str]]:
    """Ground-truth objects in order, how many broader ones are out of order, and broader ones without alternatives."""
    rank = {name: int(number) for number, name in row["gt_words"].items()}
    broader = {}
    for generated, name in _known(row, "broader_concept").items():
        choices = [name] if name in rank else [part.strip() for part in str(name).split("/")]
        broader[generated] = next((choice for choice in reversed(choices) if choice in rank), name)
    if row["generated_words"] == "":
        return [], 0, dict(_known(row, "broader_concept"))
    joined = {**broader, **_known(row, "matched_objects")}
    named = [joined[generated] for generated in row["generated_words"].values() if generated in joined]
    ranks = in_order([rank[name] for name in named if name in rank])
    outside = {rank[name] for name in broader.values() if name in rank} - set(ranks)
    return [row["gt_words"][str(i)] for i in ranks], len(outside), broader


def relation_comparative(row: Mapping[str, Any], fixed: bool) -> Tally:
    """Objects whose ranks rise in the order in which they were said."""
    generated = 0 if row["generated_words"] == "" else len(row["generated_words"])
    truth = len(set(row["gt_words"].values()))
    if fixed:
        ordered = _ordered(row)
        covered = {name for name, is_broader in ordered if not is_broader}
        return Tally.of(generated, len(ordered), truth, len(covered))
    names, outside, _ = comparative_postprocess(row)
    distinct = len(set(names))
    faithful = len(names) - outside
    return Tally(generated, faithful, truth, distinct - outside, faithful == generated, distinct == truth)


def _ordered(row: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """(ground-truth object, whether it is matched more broadly) in order, alternatives resolved on both sides."""
    ways = {
        way: name
        for name in row["gt_words"].values()
        for way in (*(part.strip() for part in str(name).split("/")), name)
    }
    rank = {name: int(number) for number, name in row["gt_words"].items()}
    found: list[tuple[str, bool]] = []
    generated = row["generated_words"] or {}
    for said in generated.values():
        for pairs, is_broader in ((_known(row, "matched_objects"), False), (_known(row, "broader_concept"), True)):
            if said in pairs and (way := _first_way(pairs[said], ways)):
                found.append((ways[way], is_broader))
                break
    kept, left = [], in_order([rank[name] for name, _ in found])
    for name, is_broader in found:
        if left and rank[name] == left[0]:
            kept.append((name, is_broader))
            left = left[1:]
    return kept


def _first_way(name: Any, ways: Mapping[str, str]) -> str | None:
    choices = (str(name), *(part.strip() for part in str(name).split("/")))
    return next((choice for choice in choices if choice in ways), None)


# Attributes: pairs written "(red, cup), (green, cup)".


def split_pairs(text: Any) -> list[str]:
    """The pairs of a text, brackets whole; anything but a text is one."""
    if not isinstance(text, str):
        return [] if text is None else [str(text)]
    pieces = (piece.strip() for piece in text.split("),"))
    return [piece if piece.endswith(")") else f"{piece})" for piece in pieces if piece]


def _take(pool: list[str], pairs: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Of generated -> ground truth, those whose ground truth the pool still has; each is taken out of it."""
    taken = {}
    for generated, truth in pairs:
        if truth in pool:
            taken[generated] = truth
            pool.remove(truth)
    return taken


def object_postprocess(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The official matches and broader ones that a pool of the ground truth allows."""
    pieces = [piece.strip() for text in row["gt_obj_atts"].values() for piece in str(text).split("),")]
    pool = [f"{p})" if i % 2 == 0 and not p.endswith(")") else p for i, p in enumerate(pieces)]

    def taken(name: str, unless: str | None = None) -> dict[str, Any]:
        firsts = {order: next(iter(mapping.values()), None) for order, mapping in _known(row, name).items()}
        allowed = {o: first for o, first in firsts.items() if unless is None or unless not in str(row[name][o])}
        return {order: row[name][order] for order in _take(pool, allowed.items())}

    matched = taken("matched_att_obj")
    return matched, taken("broader_concept", unless="unspecified")


def attribute_object(row: Mapping[str, Any], fixed: bool) -> Tally:
    """After the post-processing."""
    if not fixed:
        matched, broader = object_postprocess(row)
        return _by_order_number(row, matched, broader)
    pool = [pair for text in row["gt_obj_atts"].values() for pair in split_pairs(text)]
    truth, generated = len(pool), sum(len(split_pairs(text)) for text in row["generated_obj_atts"].values())
    numbered = [
        [(f"{order} {said}", name) for order, mapping in _known(row, kind).items() for said, name in mapping.items()]
        for kind in ("matched_att_obj", "broader_concept")
    ]
    matched = _take(pool, numbered[0])
    vague = ("unknown", "unspecified")
    broader = _take(pool, [(said, name) for said, name in numbered[1] if not any(word in said for word in vague)])
    return Tally.of(generated, len(matched) + len(broader), truth, len(matched))


def attribute_object_without_postprocess(row: Mapping[str, Any]) -> Tally:
    """The official scorer on the judge's matching as it is; an empty mapping, which stops it, matches nothing."""
    matched, broader = (
        {order: mapping for order, mapping in _known(row, name).items() if mapping}
        for name in ("matched_att_obj", "broader_concept")
    )
    return _by_order_number(row, matched, broader)


def _by_order_number(row: Mapping[str, Any], matched: Pairs, broader: Pairs) -> Tally:
    truth, generated = len(row["gt_obj_atts"]), len(row["generated_obj_atts"])
    return Tally.of(generated, len(matched) + len(broader), truth, len(matched))


def people_postprocess(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The official matches and broader ones that a pool of the ground truth allows, person by person."""
    pool = _cut_pairs(row)

    def taken(name: str) -> dict[str, Any]:
        found = {}
        for order, mapping in _known(row, name).items():
            if mapping.get("object") is None:
                continue
            pairs = _take(pool, mapping["object"].items())  # out of the pool even where the person is not known
            if mapping.get("person") is not None:
                found[order] = {"person": mapping["person"], "object": pairs}
        return found

    matched = taken("matched_att_obj")
    return matched, taken("broader_concept")


def _cut_pairs(row: Mapping[str, Any]) -> list[str]:
    """The ground truth as the official split leaves it: the last pair of every person, with its bracket, is gone."""
    texts = [person.get("object") or "" for person in row["gt_obj_atts"].values()]
    pieces = [piece.strip() for text in texts for piece in text.split("),")]
    return [f"{piece})" for piece in pieces if piece and not piece.endswith(")")]


def attribute_people(row: Mapping[str, Any], fixed: bool) -> Tally:
    """After the post-processing."""
    said = [person.get("object") for person in row["generated_obj_atts"].values()]
    generated = sum(len(split_pairs(text)) for text in said if text)
    if not fixed:
        kept = people_postprocess(row)
        matched, broader = (sum(bool(person["object"]) for person in people.values()) for people in kept)
        return Tally.of(generated, matched + broader, len(_cut_pairs(row)), matched)
    pool = [pair for person in row["gt_obj_atts"].values() for pair in split_pairs(person.get("object"))]
    truth = len(pool)
    taken = [
        sum(len(_take(pool, (person.get("object") or {}).items())) for person in _known(row, name).values())
        for name in ("matched_att_obj", "broader_concept")
    ]
    return Tally.of(generated, sum(taken), truth, taken[0])


PARTS: dict[str, Callable[[Mapping[str, Any], bool], Tally]] = {
    "object_existence": object_existence,
    "attribute_object": attribute_object,
    "attribute_people": attribute_people,
    "relation_positional": relation_positional,
    "relation_comparative": relation_comparative,
}
"""Name of a part -> (row, fixed) -> counts."""


def without_dropped(features: Iterable[str], dropped: Iterable[str]) -> list[str]:
    """Features of which no word, between blanks and as it is written, is in a stop list."""
    dropped = frozenset(dropped)
    return [feature for feature in features if dropped.isdisjoint(feature.split())]
