"""The text form: headings that name the aspect and the text, and below them lines of `Rating:` and `Rationale:`."""

import math
import re
from functools import lru_cache
from typing import NamedTuple

from data_prep.judging.ratings.found import Found
from data_prep.judging.ratings.words import MARKS
from data_prep.judging.rubric import plain
from data_prep.replies import straight

_BULLET = re.compile(r"^(?:\s|>|[-*+•](?=\s))*(?:\(?\d{1,2}[.)](?=\s)\s*)?(?:[A-Za-z][.)](?=\s)\s*)?")
TEXT = re.compile(
    r"(?P<lead>(?:(?:the\s+)?(?:output|assessment|evaluation|ratings?|scores?)\s+(?:for|of)\s+)?)(?:the\s+)?"
    r"(?:text|response|output|answer|completion)\s*(?:no\.?\s*|number\s*)?[#<\[(]?\s*(?P<number>\d{1,6})\s*[>\])]?"
    r"(?!\s*(?:\d|[,&/]|and\b|or\b|to\b|vs\b|\.\d|-\d))(?P<rest>.*)",
    re.IGNORECASE | re.ASCII,
)
_LABEL = re.compile(
    r"(?:(?:final|overall|numerical|numeric)\s+)?(?:rating|score)s?(?:\s*\([^()]{0,40}\)|\s*\[[^\[\]]{0,40}\])?\s*"
    r"(?:[:=]|[-–—]\s|\bis\b(?=\s*\d)|(?=\s\d(?:\.\d+)?(?:\s?/\s?\d+)?$))\s*(?P<rest>.*)",
    re.IGNORECASE,
)
_REASON = re.compile(r"(?:rationale|reason|reasoning|justification|explanation)s?\s*[:=]\s*(?P<rest>.*)", re.IGNORECASE)
_REASON_INSIDE = re.compile(r"\b(?:rationale|reason|justification|explanation)\b[*_]*\s?:", re.IGNORECASE)
_ASPECT_NUMBER = re.compile(r"(?:aspect|criterion|dimension)\s*\d{0,2}\s*[:.–—-]\s*", re.IGNORECASE)
_HASHES = re.compile(r"^(?:\s|>)*#{1,6}\s*")
_EMPHASIS = re.compile(r"[*_`]{1,3}(?=\s*[:=])|(?<=[:=])\s?[*_`]{2,3}|^[*_`]{1,3}|(?:\*\*|__)$")
_MARKED = re.compile(r"[*_`]")
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_PARENTHESES = re.compile(r"\([^()]*\)")
_LONGEST_NAME = 120  # characters of an aspect's heading
_LEVEL = re.compile(r"[\s>]*(#{1,6})\s")
_SEPARATOR = re.compile(r"^[\s:.–—]*(?:-\s)?")
_NOTE = re.compile(r"\s*[:.–—-]*\s*\([^()]*\)\s*:?\s*")
_BOLD = re.compile(r"\s*(?:>\s*)*(?:\*\*|__).+(?:\*\*|__):?\s*")


def read_text(reply: str, found: Found, cut: bool) -> None:
    """Walks over the lines, keeping which aspect and which text the headings above name."""
    aspect: str | None = None
    text = alone = 1 if found.texts == 1 else None  # a single text needs no heading
    outer = ""  # which kind of heading came first: it encloses the other, so a new one of it ends the other
    reason: list[str] | None = None
    pending = False  # a label without its value, which may stand on the next line
    levels: dict[str, int] = {}  # of the two kinds of headings, where they are Markdown's; they say it better
    lines = re.split(r"\r\n|\r|\n", reply)
    if not all(line.startswith(">") for line in lines if line.strip()):
        lines = ["" if line.lstrip().startswith(">") else line for line in lines]  # quoted: not the judge's own words
    for number, line in enumerate(lines):
        if len(line) > 20_000:
            continue
        seen = _look_cached(line) if len(line) <= _SHORT else _look(line)
        if not (words := seen.words):
            continue
        last = cut and number == len(lines) - 1  # "Rating: 1" may have been going to be 10
        if pending:
            pending = False
            if aspect and text is not None and _states_rating(words, found):
                found.rate(aspect, text, math.nan if last else found.value(words))
                continue
        named, rest = _aspect_heading(seen, found)
        if named and not rest:
            outer = _outer("aspect", outer, levels, seen)
            aspect, reason = named, None
            text = alone if outer == "aspect" else text
            continue
        if named and text is not None:  # "Helpfulness: 4" under a text
            found.rate(named, text, math.nan if last else found.value(rest))
            reason = None
            continue
        placed = _text_heading(seen, found)
        if placed is not None:
            outer = _outer("text", outer, levels, seen)
            text, reason = placed[0], None
            if text == 0:
                found.broken = "texts are numbered from 0, so that none can be placed"
            aspect = None if outer == "text" else aspect
            words = placed[1]
            if not words:
                continue
            if aspect and _states_rating(words, found):  # "Text 1: 4" under an aspect
                found.rate(aspect, text, math.nan if last else found.value(words))
                continue
        if (label := _LABEL.match(words)) and not _REASON.match(words):
            value, more = _split_reason(label["rest"])
            if aspect and text is not None:
                if value.strip(MARKS):
                    found.rate(aspect, text, math.nan if last and more is None else found.value(value))
                else:
                    pending = more is None
                reason = None
            words = more if more is not None else ""
            if not words:
                continue
        if said := _REASON.match(words):
            words = said["rest"]
            reason = []
        elif seen.hashes and placed is None:
            aspect, text, reason = None, alone, None  # of something else: what follows belongs to neither
            continue
        if reason is not None and aspect and text is not None:
            reason.append(words)
            found.reasons.pop((aspect, text), None)
            found.reason(aspect, text, "\n".join(reason))


def _outer(kind: str, outer: str, levels: dict[str, int], seen: "_Line") -> str:
    """Which kind of heading encloses the other, seeing one more of `kind`."""
    if seen.hashes:
        levels.setdefault(kind, seen.hashes)
    if len(levels) == 2 and levels["aspect"] != levels["text"]:
        return "aspect" if levels["aspect"] < levels["text"] else "text"
    return outer or kind


class _Line(NamedTuple):
    """What a line looks like by itself, whatever was said before.

    Attributes:
        words: without Markdown's marks; "" where it says nothing.
        heading: whether it is marked as one, by hashes or in bold.
        hashes: how many, 0 for none.
        name, after: what stands before a colon, as names are compared, and after it; "" where it is too long for one.
        whole: all of it, as names are compared.
        text: number of the text that it begins with and what follows; None where it begins otherwise.
    """

    words: str
    heading: bool = False
    hashes: int = 0
    name: str = ""
    after: str = ""
    whole: str = ""
    text: tuple[int, str] | None = None


def _look(line: str) -> _Line:
    words = _unmarked(line)
    if not words:
        return _Line("")
    hashes = _LEVEL.match(line)
    bold = "**" in line or "__" in line
    before, _, after = _PARENTHESES.sub("", _ASPECT_NUMBER.sub("", words[:1000], count=1)).partition(":")
    text = None
    if match := TEXT.match(words):
        rest = _SEPARATOR.sub("", match["rest"]).strip(MARKS)  # not the minus of a number
        note = rest in ("-", ":", ".") or _NOTE.fullmatch(match["rest"])  # "Text 1 (a model)"
        text = int(match["number"]), "" if note else rest
    return _Line(
        words,
        bool(hashes or (bold and _BOLD.fullmatch(line))),
        len(hashes.group(1)) if hashes else 0,
        plain(before) if len(before) <= _LONGEST_NAME else "",
        after,
        plain(words) if len(words) <= _LONGEST_NAME else "",
        text,
    )


_look_cached = lru_cache(8192)(_look)  # headings and ratings come again and again, reasons do not
_SHORT = 60


def _unmarked(line: str) -> str:
    """A line without Markdown's marks at its ends: heading, quote, bullet, number, bold; "" for a fence or a rule."""
    line = straight(line).strip()
    if line.startswith("```") or not line.strip("-=*_#> \t"):
        return ""
    if line[0] not in _LETTERS or line[1:2] in (".", ")"):  # a heading, a bullet, a number: "A. Helpfulness" too
        line = _HASHES.sub("", _BULLET.sub("", _HASHES.sub("", line, count=1), count=1), count=1)
    return _EMPHASIS.sub("", line).strip() if _MARKED.search(line) else line.strip()


def _aspect_heading(seen: _Line, found: Found) -> tuple[str | None, str]:
    """The aspect that a line names and what it says of it: ("Helpfulness", "") for a heading, ("...", "4") for both."""
    named = found.aspects.get(seen.name)
    if not named:
        whole = found.aspects.get(seen.whole)  # a name that holds a colon
        return (whole, "") if whole and seen.heading else (None, "")
    if _states_rating(seen.after, found):
        return named, seen.after
    return (named, "") if seen.heading or not seen.after.strip(MARKS) else (None, "")


def _text_heading(seen: _Line, found: Found) -> tuple[int, str] | None:
    """The number of the text that a heading names and what follows on its line; None where the line is no heading."""
    if seen.text is None:
        return None
    rest = seen.text[1]
    if not rest or seen.heading or _LABEL.match(rest) or _REASON.match(rest) or _states_rating(rest, found):
        return seen.text
    return None  # "Text 2: is worse" in a rationale is prose


def _states_rating(words: str, found: Found) -> bool:
    """Whether words are nothing but a rating, or N/A: no explanation after it, as prose would have."""
    words = words.rstrip(MARKS + ".")
    return len(words) < 40 and not math.isnan(found.value(words))


def _split_reason(words: str) -> tuple[str, str | None]:
    """A rating's words and, where its line goes on with `Rationale:`, that rest."""
    inside = _REASON_INSIDE.search(words)
    if not inside:
        return words, None
    return words[: inside.start()].rstrip(MARKS + ";,."), words[inside.start() :]
