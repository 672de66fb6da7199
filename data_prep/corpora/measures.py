"""What can be counted of a corpus in one pass, one record in memory: ratings, lengths, biases, agreement."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from data_prep.tables.fields import WIDEST
from data_prep.tables.summary import pairs_by_rule
from silkie_jax.corpus.schema import Record, Response

_NAMES = 100  # models, sources, aspects, ... that are told apart
_OTHERS = "(others)"
_LENGTHS = (0, 25, 50, 100, 200, 400, 800, 1600, 3200)  # lower ends of the classes of lengths, in characters


class Mean:
    """A running mean with its standard error (Welford)."""

    def __init__(self) -> None:
        self.n, self.mean, self._squares = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        if not math.isnan(value):
            self.n += 1
            step = value - self.mean
            self.mean += step / self.n
            self._squares += step * (value - self.mean)

    def to_json(self) -> dict[str, Any]:
        error = math.sqrt(self._squares / (self.n - 1) / self.n) if self.n > 1 else None
        return {"n": self.n, "mean": _round(self.mean) if self.n else None, "standard_error": _round(error)}


class Correlation:
    """Pearson's correlation of deviations: pairs of values are given with their group's means taken off."""

    def __init__(self) -> None:
        self.n, self._xy, self._xx, self._yy = 0, 0.0, 0.0, 0.0

    def add_group(self, xs: list[float], ys: list[float]) -> None:
        """The values of one instruction; those with NaN do not count."""
        both = [(x, y) for x, y in zip(xs, ys, strict=True) if not math.isnan(x + y)]
        if len(both) < 2:
            return
        mean_x, mean_y = (math.fsum(values) / len(both) for values in zip(*both, strict=True))
        for x, y in both:
            self.n += 1
            self._xy += (x - mean_x) * (y - mean_y)
            self._xx += (x - mean_x) ** 2
            self._yy += (y - mean_y) ** 2

    def to_json(self) -> dict[str, Any]:
        size = math.sqrt(self._xx * self._yy)
        return {"n": self.n, "r": _round(self._xy / size) if size else None}


class Share:
    """How often something holds."""

    def __init__(self) -> None:
        self.n, self.yes = 0, 0

    def add(self, holds: bool) -> None:
        self.n += 1
        self.yes += holds

    def to_json(self) -> dict[str, Any]:
        return {"n": self.n, "share": _round(self.yes / self.n) if self.n else None}


class Measures:
    """Feed it every record, then take `to_json`.

    A rating off its scale counts in none of the numbers, and of names that are told apart there are at most so many
    that numbers and page stay small, whatever a corpus holds.

    Args:
        weights: aspect -> weight in the overall rating; aspects that are not named count 1.
        scales: aspect -> lowest and highest rating; the widest scale that there can be where it is not named.
    """

    def __init__(
        self, weights: Mapping[str, float] | None = None, scales: Mapping[str, Sequence[float] | None] | None = None
    ):
        self._weights = weights or {}
        self._scales = scales or {}
        self.off_scale: Counter[str] = Counter()
        self.records = self.images = self.text_only = self.responses = 0
        self.sources: Counter[str] = Counter()
        self.by_source: dict[str, _Source] = defaultdict(_Source)
        self.licences: Counter[str] = Counter()
        self.histograms: dict[str, Counter[int]] = defaultdict(Counter)
        self.missing: Counter[str] = Counter()
        self.means: dict[str, Mean] = defaultdict(Mean)
        self.models: dict[str, _Model] = defaultdict(_Model)
        self.pairs: Counter[str] = Counter()
        self.ties, self.longer_wins = Share(), Share()
        self.lengths: Counter[int] = Counter()
        self.length_mean = Mean()
        self.rating_by_length: dict[int, Mean] = defaultdict(Mean)
        self.length_and_rating = Correlation()
        self.kinds: dict[str, Counter[str]] = defaultdict(Counter)
        self.position = _Positions()
        self.agreement: dict[tuple[str, str], _Agreement] = defaultdict(_Agreement)
        self.spread_over_orders: dict[str, Mean] = defaultdict(Mean)

    def add(self, record: Record) -> None:
        """Counts a record."""
        self.records += 1
        self.images += len(record.images)
        self.text_only += not record.images
        source = _name(record.source, self.sources)
        self.sources[source] += 1
        self.licences[_name(str(record.extra.get("licence") or "not stated"), self.licences)] += 1
        pairs = pairs_by_rule(record)
        for rule, count in pairs.items():
            self.pairs[_name(rule, self.pairs)] += count
        given = [self._on_scale(response.ratings) for response in record.responses]
        overall = [self.overall(ratings) for ratings in given]
        lengths = [float(len(response.text)) for response in record.responses]
        for response, ratings, rating, length in zip(record.responses, given, overall, lengths, strict=True):
            self._add_response(response, ratings, rating, length)
        self.by_source[source].add(given, overall, pairs["mean_rating"] or pairs["given"])
        if any(response.ratings for response in record.responses):
            self._add_comparisons(overall, lengths)
        self._add_judgements(record.extra.get("judgements") or (), overall)

    def overall(self, ratings: Mapping[str, float]) -> float:
        """The weighted mean of a response's aspects; NaN where one that has weight is missing."""
        weights = {aspect: self._weights.get(aspect, 1.0) for aspect in ratings}
        total = math.fsum(weights.values())
        counted = (weight * ratings[aspect] for aspect, weight in weights.items() if weight)
        return math.fsum(counted) / total if total else math.nan

    def _on_scale(self, ratings: Mapping[str, float]) -> dict[str, float]:
        """The ratings, NaN for those off their scale."""
        found = {}
        for aspect, rating in ratings.items():
            low, high = self._scales.get(aspect) or WIDEST
            on = max(low, WIDEST[0]) <= rating <= min(high, WIDEST[1])
            found[aspect] = rating if on else math.nan
        return found

    def _add_response(self, response: Response, ratings: Mapping[str, float], overall: float, length: float) -> None:
        self.responses += 1
        self.length_mean.add(length)
        bin = max(low for low in _LENGTHS if low <= length)
        self.lengths[bin] += 1
        self.rating_by_length[bin].add(overall)
        of_model = self.models[_name(response.model or "unknown", self.models)]
        of_model.overall.add(overall)
        of_model.length.add(length)
        for name, rating in ratings.items():
            aspect = _name(name, self.means)
            self.means[aspect].add(rating)
            of_model.aspects[aspect].add(rating)
            if not math.isnan(rating):
                level = math.floor(rating + 0.5)  # averaged ratings lie between whole ones
                self.histograms[aspect][level] += 1
                of_model.histograms[aspect][level] += 1
            elif math.isnan(response.ratings[name]):
                self.missing[aspect] += 1
            else:
                self.off_scale[aspect] += 1

    def _add_comparisons(self, overall: list[float], lengths: list[float]) -> None:
        self.length_and_rating.add_group(lengths, overall)
        for a, b in itertools.combinations(range(len(overall)), 2):
            if not math.isnan(overall[a] + overall[b]):
                self.ties.add(overall[a] == overall[b])
                if overall[a] != overall[b] and lengths[a] != lengths[b]:
                    self.longer_wins.add((overall[a] > overall[b]) == (lengths[a] > lengths[b]))

    def _add_judgements(self, judgements: Iterable[Mapping[str, Any]], overall: list[float]) -> None:
        by_judge: dict[str, list[list[float]]] = defaultdict(list)
        aspects: dict[str, set[str]] = {}
        for judgement in judgements:
            judge = _name(judgement["judge"], self.kinds)
            self.kinds[judge][judgement["kind"]] += 1
            rows = {
                aspect: [math.nan if rating is None else rating for rating in row]
                for aspect, row in judgement["ratings"].items()
            }
            given = [
                self.overall(self._on_scale({aspect: row[n] for aspect, row in rows.items()}))
                for n in range(len(overall))
            ]
            by_judge[judge].append(given)
            aspects[judge] = set(rows)
            self.position.add(judge, judgement, given, overall)
        for judge, orders in by_judge.items():
            for ratings in zip(*orders, strict=True) if len(orders) > 1 else ():
                known = [rating for rating in ratings if not math.isnan(rating)]
                if len(known) > 1:
                    self.spread_over_orders[judge].add(max(known) - min(known))
        means = {judge: [_mean(values) for values in zip(*orders, strict=True)] for judge, orders in by_judge.items()}
        for a, b in itertools.combinations(sorted(means), 2):
            self.agreement[a, b].add(means[a], means[b], alike=aspects[a] == aspects[b])

    def to_json(self) -> dict[str, Any]:
        """All numbers, as JSON holds them."""
        levels = [level for histogram in self.histograms.values() for level in histogram]
        scale = list(range(min(levels), max(levels) + 1)) if levels else []
        return {
            "records": self.records,
            "images": self.images,
            "text_only": self.text_only,
            "responses": self.responses,
            "sources": dict(self.sources.most_common()),
            "by_source": {name: self.by_source[name].to_json() for name, _ in self.sources.most_common()},
            "licences": dict(self.licences.most_common()),
            "ratings": {
                aspect: {
                    "histogram": {str(level): self.histograms[aspect][level] for level in scale},
                    "missing": self.missing[aspect],
                    **mean.to_json(),
                }
                for aspect, mean in self.means.items()
            },
            "models": {
                name: model.to_json(scale)
                for name, model in sorted(self.models.items(), key=lambda m: (-m[1].overall.mean, m[0]))
            },
            "off_scale": dict(self.off_scale),
            "pairs": dict(self.pairs),
            "ties": self.ties.to_json(),
            "length": {
                **self.length_mean.to_json(),
                "histogram": {str(low): self.lengths[low] for low in _LENGTHS},
                "rating": {str(low): self.rating_by_length[low].to_json() for low in _LENGTHS},
                "correlation_within_instructions": self.length_and_rating.to_json(),
                "longer_response_preferred": self.longer_wins.to_json(),
            },
            "position": self.position.to_json(),
            "judges": {
                judge: {
                    "replies": dict(kinds.most_common()),
                    "difference_between_orders": self.spread_over_orders[judge].to_json(),
                }
                for judge, kinds in sorted(self.kinds.items())
            },
            "agreement": [{"judges": list(pair), **value.to_json()} for pair, value in sorted(self.agreement.items())],
        }


class _Model:
    """What is known of one model's responses."""

    def __init__(self) -> None:
        self.overall, self.length = Mean(), Mean()
        self.aspects: dict[str, Mean] = defaultdict(Mean)
        self.histograms: dict[str, Counter[int]] = defaultdict(Counter)

    def to_json(self, scale: list[int]) -> dict[str, Any]:
        return {
            "responses": self.length.n,
            "overall": self.overall.to_json(),
            "aspects": {
                aspect: {**mean.to_json(), "histogram": {str(n): self.histograms[aspect][n] for n in scale}}
                for aspect, mean in self.aspects.items()
            },
            "length": self.length.to_json(),
        }


class _Source:
    """What is known of the instructions of one source."""

    def __init__(self) -> None:
        self.records = self.responses = self.pairs = 0
        self.ties = Share()
        self.overall = Mean()
        self.aspects: dict[str, Mean] = defaultdict(Mean)

    def add(self, given: list[dict[str, float]], overall: list[float], pairs: int) -> None:
        """A record: the ratings of its responses, aspect by aspect and overall, and the pairs that it makes."""
        self.records += 1
        self.responses += len(overall)
        self.pairs += pairs
        for ratings, rating in zip(given, overall, strict=True):
            self.overall.add(rating)
            for aspect, value in ratings.items():
                self.aspects[_name(aspect, self.aspects)].add(value)
        for a, b in itertools.combinations(overall, 2):
            if not math.isnan(a + b):
                self.ties.add(a == b)

    def to_json(self) -> dict[str, Any]:
        return {
            "records": self.records,
            "responses": self.responses,
            "pairs": self.pairs,
            "ties": self.ties.to_json(),
            "overall": self.overall.to_json(),
            "aspects": {aspect: mean.to_json() for aspect, mean in self.aspects.items()},
        }


class _Positions:
    """Rating against the place at which a judge saw a text.

    Ratings are taken as deviations from the mean of their instruction. Places are drawn at random, so without bias the
    mean deviation at each place is 0. `as_judged` is of every reply by itself; `in_corpus` of the ratings that the
    corpus holds, by the place in the first order: what the averaging of orders has left of the bias.
    """

    def __init__(self) -> None:
        self._judged: dict[str, dict[int, Mean]] = defaultdict(lambda: defaultdict(Mean))
        self._kept: dict[int, Mean] = defaultdict(Mean)
        self._first_wins: dict[str, Share] = defaultdict(Share)

    def add(self, judge: str, judgement: Mapping[str, Any], given: list[float], overall: list[float]) -> None:
        shown = [response for response in judgement["shown"] if response >= 0]
        for place, deviation in _deviations([given[response] for response in shown]):
            self._judged[judge][place].add(deviation)
        for earlier, later in itertools.combinations(shown, 2):
            if given[earlier] != given[later] and not math.isnan(given[earlier] + given[later]):
                self._first_wins[judge].add(given[earlier] > given[later])
        if judgement["order"] == 0:
            for place, deviation in _deviations([overall[response] for response in shown]):
                self._kept[place].add(deviation)

    def to_json(self) -> dict[str, Any]:
        return {
            "as_judged": {
                judge: {
                    "places": {str(place + 1): places[place].to_json() for place in sorted(places)},
                    "earlier_text_preferred": self._first_wins[judge].to_json(),
                }
                for judge, places in sorted(self._judged.items())
            },
            "in_corpus": {str(place + 1): self._kept[place].to_json() for place in sorted(self._kept)},
        }


class _Agreement:
    """Of two judges: how far apart their overall ratings lie, where they rate the same aspects, and how often they
    prefer the same response."""

    def __init__(self) -> None:
        self.difference, self.correlation, self.same = Mean(), Correlation(), Share()

    def add(self, a: list[float], b: list[float], alike: bool) -> None:
        for x, y in zip(a, b, strict=True) if alike else ():
            self.difference.add(abs(x - y))
        self.correlation.add_group(a, b)
        for m, n in itertools.combinations(range(len(a)), 2):
            if a[m] != a[n] and b[m] != b[n] and not math.isnan(a[m] + a[n] + b[m] + b[n]):
                self.same.add((a[m] > a[n]) == (b[m] > b[n]))

    def to_json(self) -> dict[str, Any]:
        return {
            "mean_difference": self.difference.to_json(),
            "correlation_within_instructions": self.correlation.to_json(),
            "same_preference": self.same.to_json(),
        }


def _name(name: str, known: Collection[str]) -> str:
    """A name under which to count; of more than can be told apart, those that come late share one."""
    return name if name in known or len(known) < _NAMES else _OTHERS


def _deviations(ratings: list[float]) -> list[tuple[int, float]]:
    """(place, deviation from the mean) where every text of an instruction has a rating."""
    if len(ratings) < 2 or any(map(math.isnan, ratings)):
        return []
    mean = math.fsum(ratings) / len(ratings)
    return [(place, rating - mean) for place, rating in enumerate(ratings)]


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
