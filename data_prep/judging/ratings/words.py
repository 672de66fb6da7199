"""Words of a reply: the one rating that they state, and names by their letters alone."""

import math
import re
from functools import lru_cache

from data_prep.replies import straight

DECLINED = math.inf
"""What `rating_in` says of an explicit N/A."""
MARKS = "*_`\"'“”‘’$[](){}| \t"
_NUMBER = re.compile(r"([+-]?\d{1,9}(?:\.\d{0,9})?)(?![\d.]*\d)", re.ASCII)
_OUT_OF = re.compile(
    r"[\s*_`)\]]*(?:/|out of|of)[\s*_`(\[]*(\d{1,9}(?:\.0{0,9})?)(?![\d.]*\d)", re.ASCII | re.IGNORECASE
)
_UNIT = re.compile(r"[\s*_`)\]]*(?:points?|pts?|stars?)\b", re.IGNORECASE)
# What may follow a rating: nothing, or words set off from it. They must not go on with a number ("4 - 5", "4, 5"),
# unless the scale was named, which makes clear that the rating was over ("4/5 (80%)").
_AFTER = r"[\s*_`\"')\]}$|]*(?:$|(?:[.!](?=\s|$)|[,;:(\[=–—-]|because\b|since\b|as\b)"
_REST = re.compile(_AFTER + r"(?!\s*[*_`(\[]*[+-]?\d))")
_REST_AFTER_SCALE = re.compile(_AFTER + r")")
_NOT_RATED = re.compile(
    r"(?:n\s*[/.]?\s*a\.?|none|null|nil|nan|not (?:applicable|available|rated|ratable|rateable)|unrated|unknown"
    r"|(?:can ?not|can't|unable to|impossible to) (?:be )?(?:rated?|determined?|assess(?:ed)?|judged?|evaluated?))"
    r"[\s.*_`)\]]*(?:$|[,;:(–—-].*|because\b.*|since\b.*|as\b.*)",
    re.IGNORECASE,
)
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@lru_cache(4096)  # few words are said again and again
def rating_in(words: str, low: float, high: float) -> float:
    """The one rating that some words state, `DECLINED` for N/A, NaN for anything else.

    "4", "4.0", "4/5", "4 out of 5", "**4**", "[4]", "4 stars", "4 (good)", "4 - clear", "four" are 4, and "4.5" is 4.5;
    "10", "4/10", "3-4", "3 or 4", "4 5", "-4", "1e1", "4%", "about 4" are NaN.
    """
    words = straight(words)[:2000].strip(MARKS)
    if words.startswith("<") and words.endswith(">"):  # a placeholder filled in; "< 4" is no rating
        words = words[1:-1].strip(MARKS)
    if _NOT_RATED.fullmatch(words) or (words and not words.strip("-–—")):
        return DECLINED
    if words.rstrip(".").casefold() in _WORDS:
        words = str(_WORDS.index(words.rstrip(".").casefold()))
    number = _NUMBER.match(words)
    if not number:
        return math.nan
    rest = words[number.end() :]
    if out_of := _OUT_OF.match(rest):
        if float(out_of.group(1)) != high:
            return math.nan
        rest = f" {rest[out_of.end() :]}"
    if unit := _UNIT.match(rest):
        rest = rest[unit.end() :]
    value = float(number.group(1))
    if not low <= value <= high or not (_REST_AFTER_SCALE if out_of else _REST).match(rest):
        return math.nan
    return value
