"""The text form: headings that name the aspect and the text, and below them lines of `Rating:` and `Rationale:`."""

import math
import re

from data_prep.ratings.found import Found
from data_prep.ratings.words import MARKS
from data_prep.rubric import plain, straight

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
_LEVEL = re.compile(r"[\s>]*(#{1,6})")
_SEPARATOR = re.compile(r"^[\s:.–—]*(?:-\s)?")
_NOTE = re.compile(r"\s*[:.–—-]*\s*\([^()]*\)\s*:?\s*")
_HEADING = re.compile(r"\s*(?:>\s*)*#{1,6}\s")
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
        if len(line) > 20_000 or not (words := _unmarked(line)):
            continue
        last = cut and number == len(lines) - 1  # "Rating: 1" may have been going to be 10
        if pending:
            pending = False
            if aspect and text is not None and _states_rating(words, found):
                found.rate(aspect, text, math.nan if last else found.value(words))
                continue
        heading = bool(_HEADING.match(line) or _BOLD.fullmatch(line))
        named, rest = _aspect_heading(words, heading, found)
        if named and not rest:
            outer = _outer("aspect", outer, levels, line)
            aspect, reason = named, None
            text = alone if outer == "aspect" else text
            continue
        if named and text is not None:  # "Helpfulness: 4" under a text
            found.rate(named, text, math.nan if last else found.value(rest))
            reason = None
            continue
        placed = _text_heading(words, heading, found)
        if placed is not None:
            outer = _outer("text", outer, levels, line)
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
        elif heading and placed is None and _HEADING.match(line):
            aspect, text, reason = None, alone, None  # of something else: what follows belongs to neither
            continue
        if reason is not None and aspect and text is not None:
            reason.append(words)
            found.reasons.pop((aspect, text), None)
            found.reason(aspect, text, "\n".join(reason))


def _outer(kind: str, outer: str, levels: dict[str, int], line: str) -> str:
    """Which kind of heading encloses the other, seeing one more of `kind`."""
    if hashes := _LEVEL.match(line):
        levels.setdefault(kind, len(hashes.group(1)))
    if len(set(levels.values())) == 2:
        return min(levels, key=lambda name: levels[name])
    return outer or kind


def _unmarked(line: str) -> str:
    """A line without Markdown's marks at its ends: heading, quote, bullet, number, bold; "" for a fence or a rule."""
    line = straight(line).strip()
    if line.startswith("```") or not line.strip("-=*_#> \t"):
        return ""
    if line[0] not in _LETTERS or line[1:2] in (".", ")"):  # a heading, a bullet, a number: "A. Helpfulness" too
        line = _HASHES.sub("", _BULLET.sub("", _HASHES.sub("", line, count=1), count=1), count=1)
    return _EMPHASIS.sub("", line).strip() if _MARKED.search(line) else line.strip()


def _aspect_heading(words: str, heading: bool, found: Found) -> tuple[str | None, str]:
    """The aspect that a line names and what it says of it: ("Helpfulness", "") for a heading, ("...", "4") for both."""
    words = _PARENTHESES.sub("", _ASPECT_NUMBER.sub("", words[:1000], count=1))
    before, _, after = words.partition(":")
    named = found.aspects.get(plain(before)) if len(before) <= _LONGEST_NAME else None
    if not named:
        return None, ""
    if _states_rating(after, found):
        return named, after
    return (named, "") if heading or not after.strip(MARKS) else (None, "")


def _text_heading(words: str, heading: bool, found: Found) -> tuple[int, str] | None:
    """The number of the text that a heading names and what follows on its line; None where the line is no heading."""
    match = TEXT.match(words)
    if not match:
        return None
    rest = _SEPARATOR.sub("", match["rest"]).strip(MARKS)  # not the minus of a number
    rest = "" if rest in ("-", ":", ".") else rest
    rest = "" if _NOTE.fullmatch(match["rest"]) else rest  # "Text 1 (a model)"
    if not rest or heading or _LABEL.match(rest) or _REASON.match(rest) or _states_rating(rest, found):
        return int(match["number"]), rest
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
