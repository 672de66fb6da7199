"""Trees of sentences: which are continued, and what sentences and whole responses are worth (CSR, arXiv 2405.14622).

A response grows sentence by sentence; several candidates continue each text so far, and a few of them are continued in
turn. Every candidate has a log-probability and, from CLIP, its likeness to the image (100 x cosine). What a response is
worth can be derived from these in three ways, by name:

    reward: raw    l max(likeness, 0) + (1 - l) p(sentence), the paper's
    reward: rank   - (l rank by likeness + (1 - l) rank by probability); among siblings, from 1/n for the best to 1
    over: mean     of the sentences of a response
    over: sum      the paper's; favours long responses with `raw`
    over: release  the sum over one more than there are sentences, the release's; favours short ones with `rank`

The paper is `raw` and `sum`, the release `rank` and `release`; ours is `rank` and `mean`.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
REWARDS = ("raw", "rank")
OVERS = ("mean", "sum", "release")
SELECTIONS = ("reward", "language")
FILTERS = ("repetition", "release", "none")
ROOT = 0
"""The number of the empty text."""


@dataclass(frozen=True)
class Sentence:
    """A candidate.

    Attributes:
        number: of it in its tree, from 1 in the order in which they came.
        parent: number of the sentence that it continues; `ROOT` for a first one.
        text: of it alone. "" says that the text so far ends where it is.
        language: the log-probability of its tokens, summed.
        final: whether the response ends with it.
    """

    number: int
    parent: int
    text: str
    language: float
    final: bool


@dataclass(frozen=True)
class Search:
    """How a tree grows.

    Attributes:
        candidates: that continue a text.
        best, worst: how many of a level's open candidates are continued, of the best and of the worst.
        until: ends a sentence.
        max_characters: of a response, which ends there.
        select_by: "reward", as in the paper, or "language", the log-probability, as in the release; both cumulated.
        clip_weight: l, of the reward.
    """

    candidates: int = 5
    best: int = 1
    worst: int = 2
    until: str = "."
    max_characters: int = 1024
    select_by: str = "reward"
    clip_weight: float = 0.9


@dataclass(frozen=True)
class Candidate:
    """What a model gave to continue a text: its words, their summed log-probability, and why it stopped."""

    text: str
    language: float
    finish: str


@dataclass(frozen=True)
class Grown:
    """A tree as far as its replies go.

    Attributes:
        tree: all sentences.
        to_ask: number -> text so far, of those that are to be continued next.
        to_compare: number -> texts of its candidates, of those whose likeness is wanted before it can go on.
    """

    tree: tuple[Sentence, ...]
    to_ask: Mapping[int, str]
    to_compare: Mapping[int, tuple[str, ...]]


def grow(
    search: Search, replies: Mapping[int, Sequence[Candidate]], likeness: Mapping[int, Sequence[float]] | None = None
) -> Grown:
    """The tree that some replies make, level by level, and what it needs to go on. The same replies give the same.

    Args:
        replies: number of a sentence (or `ROOT`) -> what continues it; of one that cannot be continued, nothing.
        likeness: number -> 100 x cosine of the image and each of its candidates that says something; of no number
            where that is not known.
    """
    tree: list[Sentence] = []
    so_far, worth = {ROOT: ""}, {ROOT: 0.0}
    level = [ROOT]
    while level:
        if to_ask := {number: so_far[number] for number in level if number not in replies}:
            return Grown(tuple(tree), to_ask, {})
        groups: dict[int, list[Sentence]] = {}
        for number in level:
            groups[number] = _children(search, number, replies[number], so_far[number], len(tree))
            tree += groups[number]
        by_reward = search.select_by == "reward"
        compared = likeness or {}
        to_compare = {n: said_in(group) for n, group in groups.items() if said_in(group) and n not in compared}
        if by_reward and to_compare:
            return Grown(tuple(tree), {}, to_compare)
        for number, group in groups.items():
            known = compared.get(number, ())
            alike = iter(known if len(known) == len(said_in(group)) else ())
            for one in group:
                so_far[one.number] = so_far[number] + one.text
                gain = one.language
                if by_reward:
                    near = next(alike, math.nan) if one.text else 0.0
                    likely = (1 - search.clip_weight) * math.exp(one.language)
                    gain = search.clip_weight * max(0.0 if math.isnan(near) else near, 0.0) + likely
                worth[one.number] = worth[number] + gain
        open_ones = [one.number for group in groups.values() for one in group if not one.final]
        level = selected(open_ones, worth.__getitem__, search.candidates, search.best, search.worst)
    return Grown(tuple(tree), {}, {})


def said_in(group: Iterable[Sentence]) -> tuple[str, ...]:
    """The texts of those that say something."""
    return tuple(one.text for one in group if one.text)


def _children(search: Search, parent: int, candidates: Sequence[Candidate], so_far: str, before: int) -> list[Sentence]:
    """Candidates as sentences; of those that say the same the first. One is final where the model itself ended, and
    where the whole is long enough: not where it stopped at the end of a sentence or at its limit of tokens."""
    found: dict[str, Sentence] = {}
    for candidate in candidates:
        text = candidate.text if candidate.text.strip() else ""
        if text in found:
            continue
        open_end = text.rstrip().endswith(search.until) or candidate.finish == "length"
        final = not text or not open_end or len(so_far + text) >= search.max_characters
        found[text] = Sentence(before + len(found) + 1, parent, text, candidate.language, final)
    return list(found.values())


def selected(
    open_ones: Iterable[T], score: Callable[[T], float], candidates: int = 5, best: int = 1, worst: int = 2
) -> list[T]:
    """Which of a level's open candidates are continued: the best and the worst, best first; all of fewer than
    `candidates`. Of equals the first counts as better."""
    ordered = sorted(open_ones, key=score, reverse=True)
    if len(ordered) < max(candidates, best + worst):
        return ordered
    return ordered[:best] + ordered[len(ordered) - worst :]


def kept(tree: Sequence[Sentence], rule: str = "repetition") -> list[Sentence]:
    """Those of a tree that count, in order: a sentence that a filter takes away takes along what continues it.

    `repetition` takes a word six times in a row, and a character eleven times. `release` also takes what is shorter
    than four characters or longer than five lines, scripts that its authors did not ask for, and runs of `&nbsp;`.
    """
    gone: set[int] = set()
    for sentence in tree:
        if sentence.parent in gone or (sentence.text and _bad(sentence.text, rule)):
            gone.add(sentence.number)
    return [sentence for sentence in tree if sentence.number not in gone]


def ranks(tree: Sequence[Sentence], score: Mapping[int, float]) -> dict[int, float]:
    """Number -> rank among its siblings over their number: 1/n for the highest score, 1 for the lowest; of equals the
    first is better. Ends without words ("") have none."""
    siblings: dict[int, list[Sentence]] = {}
    for sentence in tree:
        if sentence.text:
            siblings.setdefault(sentence.parent, []).append(sentence)
    found: dict[int, float] = {}
    for group in siblings.values():
        ordered = sorted(group, key=lambda one: score[one.number], reverse=True)
        found |= {one.number: place / len(group) for place, one in enumerate(ordered, 1)}
    return found


def sentence_rewards(
    tree: Sequence[Sentence], likeness: Mapping[int, float], *, clip_weight: float = 0.9, reward: str = "rank"
) -> dict[int, float]:
    """Number -> what a sentence is worth, higher is better.

    Args:
        tree: those that count.
        likeness: number -> 100 x cosine of image and sentence.
        clip_weight: l.
        reward: one of `REWARDS`.
    """
    if reward == "raw":
        return {
            one.number: clip_weight * max(likeness[one.number], 0.0) + (1 - clip_weight) * math.exp(one.language)
            for one in tree
            if one.text
        }
    by_language = ranks(tree, {one.number: one.language for one in tree})
    by_clip = ranks(tree, likeness)
    return {
        number: -(clip_weight * by_clip[number] + (1 - clip_weight) * by_language[number]) for number in by_language
    }


def paths(tree: Sequence[Sentence]) -> list[list[Sentence]]:
    """Every finished response, as its sentences: depth first, siblings in order."""
    children: dict[int, list[Sentence]] = {}
    for sentence in tree:
        children.setdefault(sentence.parent, []).append(sentence)
    found: list[list[Sentence]] = []
    stack = [[one] for one in reversed(children.get(ROOT, []))]
    while stack:
        path = stack.pop()
        further = children.get(path[-1].number, [])
        if path[-1].final:
            found.append(path)
        stack += [[*path, one] for one in reversed(further)]
    return found


def path_reward(path: Sequence[Sentence], rewards: Mapping[int, float], over: str = "mean") -> float:
    """What a response is worth, from its sentences; NaN of none."""
    values = [rewards[one.number] for one in path if one.text]
    if not values:
        return math.nan
    total = math.fsum(values)
    return total if over == "sum" else total / (len(values) + (over == "release"))


def choice(worth: Mapping[T, float]) -> tuple[T, T] | None:
    """The best and the worst, of equals the first; None where all are alike."""
    if not worth or max(worth.values()) == min(worth.values()):
        return None
    return max(worth, key=worth.__getitem__), min(worth, key=worth.__getitem__)


def text_of(path: Sequence[Sentence]) -> str:
    """A response's text."""
    return "".join(one.text for one in path).strip()


def _bad(text: str, rule: str) -> bool:
    if rule == "none":
        return False
    if rule == "release" and (len(text.strip()) < 4 or text.count("\n") >= 5):
        return True
    return any(test.search(text) for test in (_REPEATED if rule == "repetition" else (*_REPEATED, *_UNWANTED)))


_REPEATED = (re.compile(r"\b(\w+)\b(?:\W+\1\b){5}"), re.compile(r"(\S)\1{10}"))
_UNWANTED = (
    re.compile("[\u0400-\u04ff\u1100-\u11ff\u3040-\u30ff\u3130-\u318f\uac00-\ud7af]"),  # Cyrillic, kana, Hangul
    re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]"),  # emoji
    re.compile(r"(?:&nbsp;\s*){2}"),
)
