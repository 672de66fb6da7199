"""Ratings and reasons as they turn up in a reply, and what remains of them when all has been read."""

import math
import re
from functools import lru_cache

from data_prep.judging.ratings.words import rating_in
from data_prep.judging.rubric import Rubric, plain


class Found:
    """Ratings and reasons as they turn up, each for (aspect, text from 1)."""

    def __init__(self, rubric: Rubric, texts: int, broken: str = ""):
        self.rubric = rubric
        self.texts = texts
        self.aspects = _spellings(tuple((a.name, *a.aliases) for a in rubric.aspects))
        self.said: dict[tuple[str, int], set[float]] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        self.broken = broken

    @property
    def any(self) -> bool:
        return bool(self.said)

    def rate(self, aspect: str, text: int, rating: float) -> None:
        """Keeps what was said, NaN for something unclear; `result` judges whether it agrees."""
        if text == 0:
            self.broken = "texts are numbered from 0, so that none can be placed"
        if 1 <= text <= self.texts:
            self.said.setdefault((aspect, text), set()).add(rating if rating == rating else math.nan)

    def reason(self, aspect: str, text: int, words: str) -> None:
        if 1 <= text <= self.texts and words.strip() and (aspect, text) not in self.reasons:
            self.reasons[aspect, text] = words.strip().encode("utf-8", "replace").decode()

    def result(self) -> tuple[dict[str, list[float]], list[tuple[str, int]]]:
        """Ratings by aspect, and what is missing. What was said twice must have been said alike."""
        ratings: dict[str, list[float]] = {}
        missing = []
        for name in self.rubric.names:
            ratings[name] = []
            for text in range(1, self.texts + 1):
                said = self.said.get((name, text), set())
                value = next(iter(said)) if len(said) == 1 and not self.broken else math.nan
                if value != value:
                    missing.append((name, text - 1))
                ratings[name].append(value if math.isfinite(value) else math.nan)
        return ratings, missing

    def value(self, words: str) -> float:
        return rating_in(words, self.rubric.scale.low, self.rubric.scale.high)


@lru_cache(64)
def _spellings(aspects: tuple[tuple[str, ...], ...]) -> dict[str, str]:
    """Name as it is compared -> aspect, for every aspect's name and aliases, and for what is left of each where a judge
    leaves out a number before it or a remark in parentheses. What could be two aspects is none."""
    full = {plain(name): names[0] for names in aspects for name in names}
    short: dict[str, set[str]] = {}
    for names in aspects:
        for name in names:
            short.setdefault(plain(_PARENTHESES.sub("", _NUMBER.sub("", name))), set()).add(names[0])
    return {key: min(owners) for key, owners in short.items() if key and len(owners) == 1} | full


_NUMBER = re.compile(
    r"^\s*(?:(?:aspect|criterion|dimension)\s*\d*\s*[:.–—-]|\(?\d{1,2}[.)]|[A-Za-z][.)])\s+", re.IGNORECASE
)
_PARENTHESES = re.compile(r"\([^()]*\)")
