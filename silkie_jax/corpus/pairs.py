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

A configuration says `pair_rule: mean_rating` or, with options,
`pair_rule: {name: weighted, weights: {Helpfulness: 2, Visual Faithfulness: 1}}`.
A response without a number for one of the aspects that a rule needs is in none of that rule's pairs.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from silkie_jax.corpus.schema import Record, Response
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
    wanted = {"weighted": list(options.get("weights", ())), "aspect": [options.get("aspect")]}.get(name, [])
    for aspect in wanted:
        if aspect not in aspects:
            have = ", ".join(aspects) or "no ratings at all"
            raise UserError(f"pair_rule {name}: this corpus has no aspect {aspect!r}; it has {have}")
    if not aspects and name in ("mean_rating", "best_vs_worst"):
        raise UserError(f"pair_rule {name}: this corpus has no ratings; use pair_rule: given")


def mean_rating(record: Record) -> Pairs:
    """All pairs of responses; the one with the higher mean of the aspects is chosen; ties are dropped.

    Silkie's rule (section 3). Pairs come in the order of `itertools.combinations`, like the original's.
    """
    return _all_pairs(_means(record))


def weighted(record: Record, weights: Mapping[str, float]) -> Pairs:
    """All pairs of responses by the weighted mean of the aspects; one not named, or of weight 0, does not count."""
    counted = {aspect: float(weight) for aspect, weight in weights.items() if weight}
    total = math.fsum(counted.values())
    scores = [
        math.fsum(weight * response.ratings.get(aspect, math.nan) for aspect, weight in counted.items()) / total
        for response in record.responses
    ]
    return _all_pairs(scores)


def aspect(record: Record, aspect: str) -> Pairs:
    """All pairs of responses by one aspect's rating."""
    return _all_pairs([response.ratings.get(aspect, math.nan) for response in record.responses])


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


def best_vs_worst(record: Record) -> Pairs:
    """The response with the highest mean rating against the one with the lowest; of equals, the first."""
    rated = _rated(record)
    if not rated:
        return []
    high, best = max(rated, key=lambda item: item[0])
    low, worst = min(rated, key=lambda item: item[0])
    return [(best, worst)] if high > low else []


def best_response(record: Record) -> int | None:
    """The response with the highest mean rating, of equals the first; None where none has all of its ratings."""
    rated = _rated(record)
    return max(rated, key=lambda item: item[0])[1] if rated else None


def given(record: Record) -> Pairs:
    """The pairs that the source gave."""
    return list(record.pairs)


_RULES: dict[str, Callable[..., Pairs]] = {
    rule.__name__: rule
    for rule in (mean_rating, weighted, aspect, longest_as_best, model_as_best, best_vs_worst, given)
}
RULES = tuple(_RULES)


def _means(record: Record) -> list[float]:
    """The mean over the record's aspects for each response; NaN where it lacks one."""
    aspects = list(dict.fromkeys(aspect for response in record.responses for aspect in response.ratings))
    return [_mean(response, aspects) for response in record.responses]


def _rated(record: Record) -> list[tuple[float, int]]:
    """Mean and index of each response that has all of its ratings."""
    return [(score, index) for index, score in enumerate(_means(record)) if not math.isnan(score)]


def _mean(response: Response, aspects: Sequence[str]) -> float:
    if not aspects:
        return math.nan
    total = 0.0
    for aspect in aspects:  # one after another: sum() rounds differently from Python 3.12 on
        total += response.ratings.get(aspect, math.nan)
    return total / len(aspects)


def _all_pairs(scores: Sequence[float]) -> Pairs:
    found = []
    for first, second in itertools.combinations(range(len(scores)), 2):
        if scores[first] > scores[second]:
            found.append((first, second))
        elif scores[second] > scores[first]:  # a tie, or NaN on either side, is neither
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
    parameters = _parameters(rule)
    for key in options:
        if key not in [parameter.name for parameter in parameters]:
            known = ", ".join(parameter.name for parameter in parameters) or "none"
            raise UserError(f"pair_rule {rule}: unknown option {key!r}; its options: {known}")
    for parameter in parameters:
        if parameter.name not in options and parameter.default is parameter.empty:
            raise UserError(f"pair_rule {rule}: give its option {parameter.name!r}")
    for key, value in options.items():
        if key == "weights":
            _check_weights(value)
        elif not isinstance(value, str):
            raise UserError(f"pair_rule {rule}: {key} must be a name, not {value!r}")
    return rule, options


@functools.cache
def _parameters(rule: str) -> list[inspect.Parameter]:
    """A rule's options."""
    return list(inspect.signature(_RULES[rule]).parameters.values())[1:]


def _check_weights(weights: Any) -> None:
    mend = "pair_rule weighted: weights must map aspects to numbers of at least 0, one of them above 0"
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f"{mend}, not {weights!r}")
    for aspect, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise UserError(f"{mend}; {aspect} has {weight!r}")
    if not any(weights.values()):
        raise UserError(f"{mend}; all are 0")
