"""Rules that turn an instruction's responses into (chosen, rejected) pairs.

The corpus keeps every response and rating; which of them are compared is chosen at training time, by name:

    mean_rating       Silkie (arXiv 2312.10665, section 3): all pairs of responses; the one with the higher mean
                      of the aspects is chosen, ties are dropped
    weighted          as mean_rating with a weight for each aspect
    aspect            as mean_rating by one aspect alone
    longest_as_best   the paper's first heuristic (section 4): the longest response against each of the others
    model_as_best     its second heuristic: the response of one model (GPT-4V) against each of the others
    best_vs_worst     one pair an instruction: the highest mean against the lowest
    given             the pairs that the source itself gave
    by_source         another rule for some sources of instructions: red-teaming ones, for instance (arXiv 2410.09421)

A configuration says `pair_rule: mean_rating` or, with options,
`pair_rule: {name: weighted, weights: {Helpfulness: 2, Visual Faithfulness: 1}}`, and a rule of rules
`pair_rule: {name: by_source, red-team: {name: aspect, aspect: Ethical Considerations}, other: mean_rating}`.
A response without a number for one of the aspects that a rule needs is in none of that rule's pairs.
"""

import functools
import hashlib
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from silkie_jax.corpus.schema import Record
from silkie_jax.corpus.scores import check_weights, is_number, rated, scores
from silkie_jax.errors import UserError

Pairs = list[tuple[int, int]]
Rule = str | Mapping[str, Any]


def pairs(record: Record, rule: Rule = "mean_rating", **options: Any) -> Pairs:
    """The (chosen, rejected) indices into `record.responses` under a rule.

    Args:
        record: an instruction.
        rule: a rule's name, or a mapping with `name` and the rule's options.
        options: the rule's options, where `rule` is a name.

    Raises:
        UserError: there is no such rule, or an option is unknown, missing or of the wrong kind.
    """
    name, options = _name_and_options(rule, options)
    return _RULES[name](record, **options)


def check_rule(rule: Rule, aspects: Sequence[str] | None = None) -> None:
    """Refuses a rule that `pairs` would refuse and, given a corpus's aspects, one that the corpus cannot serve.

    Raises:
        UserError: one line that names the key and the mend.
    """
    name, options = _name_and_options(rule, {})
    if aspects is None:
        return
    if name == "by_source":
        for source, inner in options.items():
            _within(source, inner, aspects)
        return
    wanted = [options["aspect"]] if name == "aspect" else list(options.get("weights") or ())
    for aspect in wanted:
        if aspect not in aspects:
            have = ", ".join(aspects) or "no ratings at all"
            raise UserError(f"pair_rule {name}: this corpus has no aspect {aspect!r}; it has {have}")
    if not aspects and name in ("mean_rating", "best_vs_worst", "best_vs_lower"):
        raise UserError(f"pair_rule {name}: this corpus has no ratings; use pair_rule: given")


def mean_rating(record: Record, margin: float = 0.0) -> Pairs:
    """All pairs of responses; the one with the higher mean of the aspects is chosen; ties are dropped.

    Silkie's rule (section 3). Pairs come in the order of `itertools.combinations`, like the original's.
    """
    return _all_pairs(scores(record), margin)


def weighted(record: Record, weights: Mapping[str, float], margin: float = 0.0) -> Pairs:
    """All pairs of responses by the weighted mean of the aspects; one not named, or of weight 0, does not count."""
    total = math.fsum(weights.values())
    return _all_pairs([score / total for score in scores(record, weights)], margin)


def aspect(record: Record, aspect: str, margin: float = 0.0) -> Pairs:
    """All pairs of responses by one aspect's rating."""
    return _all_pairs([response.ratings.get(aspect, math.nan) for response in record.responses], margin)


def longest_as_best(record: Record) -> Pairs:
    """The response with the most characters (of several, the first) against each shorter one."""
    lengths = [len(response.text) for response in record.responses]
    best = lengths.index(max(lengths)) if lengths else 0
    return [(best, other) for other, length in enumerate(lengths) if length < lengths[best]]


def model_as_best(record: Record, model: str = "GPT-4V") -> Pairs:
    """The response of `model`, if it gave one, against each other model's, whatever their ratings.

    Names are compared by letters and digits alone: "gpt-4v", "GPT-4V" and "gpt4v" are one model.
    """
    is_best = [plain_name(response.model) == plain_name(model) for response in record.responses]
    chosen = [index for index, best in enumerate(is_best) if best]
    rejected = [index for index, best in enumerate(is_best) if not best]
    return list(itertools.product(chosen, rejected))


def best_vs_worst(record: Record, margin: float = 0.0) -> Pairs:
    """The response with the highest mean rating against the one with the lowest; of equals, the first."""
    found = rated(scores(record))
    if not found:
        return []
    high, best = max(found, key=lambda item: item[0])
    low, worst = min(found, key=lambda item: item[0])
    return [(best, worst)] if _beats(high, low, margin) else []


def best_vs_lower(record: Record, margin: float, weights: Mapping[str, float] | None = None, seed: int = 0) -> Pairs:
    """The response with the highest score, of equals the first, against one drawn from those `margin` lower or more.

    The rule of arXiv 2402.10884, as its released notebook applies it with weights of 1 for Helpfulness, Correctness and
    Coherence and a margin of 2. Where no response is so much lower there is no pair. The lot falls by `seed` and the
    record's id alone, so that it is the same in any order and on any machine.

    Args:
        record: an instruction.
        margin: in points of the score.
        weights: of the aspects; the score is the weighted sum. None: the mean of all aspects.
        seed: another one draws other rejected responses.
    """
    found = rated(scores(record, weights))
    if not found:
        return []
    high, best = max(found, key=lambda item: item[0])
    lower = [index for score, index in found if _beats(high, score, margin)]
    if not lower:
        return []
    lot = hashlib.sha256(f"{seed}:{record.id}".encode()).digest()
    return [(best, lower[int.from_bytes(lot[:8], "big") % len(lower)])]


def best_response(
    record: Record, weights: Mapping[str, float] | None = None, at_least: float | None = None
) -> int | None:
    """The response with the highest score (`scores.scores`), of equals the first.

    None where no response has all ratings that count, or where the highest score is below `at_least`.
    """
    found = rated(scores(record, weights))
    if not found:
        return None
    high, best = max(found, key=lambda item: item[0])
    return best if at_least is None or high >= at_least else None


def given(record: Record) -> Pairs:
    """The pairs that the source gave."""
    return list(record.pairs)


def by_source(record: Record, /, other: Rule = "mean_rating", **sources: Rule) -> Pairs:
    """The pairs under the rule of the record's source, or under `other` where it has none of its own."""
    return pairs(record, sources.get(record.source, other))


_RULES: dict[str, Callable[..., Pairs]] = {
    rule.__name__: rule
    for rule in (
        *(mean_rating, weighted, aspect, longest_as_best, model_as_best, best_vs_worst, best_vs_lower, given),
        by_source,
    )
}
RULES = tuple(_RULES)


def _beats(high: float, low: float, margin: float) -> bool:
    """Whether a score is higher, and by at least `margin`; a tie, or NaN on either side, is not."""
    return high > low and high - low >= margin


def _all_pairs(scores: Sequence[float], margin: float = 0.0) -> Pairs:
    found = []
    for first, second in itertools.combinations(range(len(scores)), 2):
        if _beats(scores[first], scores[second], margin):
            found.append((first, second))
        elif _beats(scores[second], scores[first], margin):
            found.append((second, first))
    return found


@functools.lru_cache(256)
def plain_name(model: str) -> str:
    """A model's name by its letters and digits alone: what names are compared by."""
    return "".join(character for character in model.casefold() if character.isalnum())


def _name_and_options(rule: Rule, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Splits a configured rule into its name and options, both checked."""
    options = dict(options)
    if isinstance(rule, Mapping):
        options = {**{str(key): value for key, value in rule.items() if key != "name"}, **options}
        rule = rule.get("name", "")
    if not isinstance(rule, str) or rule not in _RULES:
        raise UserError(f"pair_rule: there is no rule {rule!r}; choose one of {', '.join(RULES)}")
    if rule == "by_source":
        for source, inner in options.items():
            _within(source, inner, None)
        return rule, options
    parameters = _parameters(rule)
    for key in options:
        if key not in [parameter.name for parameter in parameters]:
            known = ", ".join(parameter.name for parameter in parameters) or "none"
            raise UserError(f"pair_rule {rule}: unknown option {key!r}; its options: {known}")
    for parameter in parameters:
        if parameter.name not in options and parameter.default is parameter.empty:
            raise UserError(f"pair_rule {rule}: give its option {parameter.name!r}")
    for key, value in options.items():
        _check_option(f"pair_rule {rule}", key, value)
    return rule, options


def _check_option(where: str, key: str, value: Any) -> None:
    """Refuses a value that an option of a rule cannot have."""
    match key:
        case "weights":
            check_weights(where, value)
        case "margin":
            if not is_number(value) or value < 0:
                raise UserError(f"{where}: margin must be a number of at least 0, not {value!r}")
        case "seed":
            if not isinstance(value, int) or isinstance(value, bool):
                raise UserError(f"{where}: seed must be a whole number, not {value!r}")
        case _:
            if not isinstance(value, str):
                raise UserError(f"{where}: {key} must be a name, not {value!r}")


def _within(source: str, rule: Any, aspects: Sequence[str] | None) -> None:
    """Checks the rule that `by_source` has for a source."""
    if not isinstance(rule, str | Mapping):
        raise UserError(f"pair_rule by_source: {source} must be a rule, not {rule!r}")
    try:
        check_rule(rule, aspects)
    except UserError as error:
        raise UserError(f"pair_rule by_source: {source}: {error}") from None


@functools.cache
def _parameters(rule: str) -> list[inspect.Parameter]:
    """A rule's options."""
    return list(inspect.signature(_RULES[rule]).parameters.values())[1:]
