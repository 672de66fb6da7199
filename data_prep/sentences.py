"""Trees of sentences: which are continued, and what sentences and whole responses are worth (CSR, arXiv 2405.14622).

A response grows sentence by sentence; several candidates continue each text so far, and a few of them are continued in
turn. Every candidate has a log-probability and, from CLIP, its likeness to the image (100 x cosine). What a response is
worth can be derived from these in three ways, by name:

    reward: raw    l max(likeness, 0) + (1 - l) p(sentence): the paper's
    reward: rank   - (l rank by likeness + (1 - l) rank by probability), ranks among siblings, from 1/n for the best on
    over: mean     of the sentences of a response
    over: sum      the paper's; favours long responses with `raw`
    over: release  the sum over one more than there are sentences, as in the release; favours short ones with `rank`

The paper is `raw` and `sum`, the release `rank` and `release`; ours is `rank` and `mean`.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
REWARDS = ("raw", "rank")
OVERS = ("mean", "sum", "release")
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
    tests: Collection[re.Pattern[str]] = {"none": (), "repetition": _REPEATED, "release": (*_REPEATED, *_UNWANTED)}[
        rule
    ]
    if rule == "release" and (len(text.strip()) < 4 or text.count("\n") >= 5):
        return True
    return any(test.search(text) for test in tests)


_REPEATED = (re.compile(r"\b(\w+)\b(?:\W+\1\b){5}"), re.compile(r"(\S)\1{10}"))
_UNWANTED = (
    re.compile("[\u0400-\u04ff\u1100-\u11ff\u3040-\u30ff\u3130-\u318f\uac00-\ud7af]"),  # Cyrillic, kana, Hangul
    re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]"),  # emoji
    re.compile(r"(?:&nbsp;\s*){2}"),
)
