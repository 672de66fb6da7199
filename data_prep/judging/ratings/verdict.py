"""The verdict form: a reason, then the number of the best text in double brackets, `[[2]]`.

Only a whole mark counts, and of several the last, as in the release of SIMA (arXiv 2405.15973). Unlike there, spaces
within it do not matter, and a mark that is cut off (`[[1`) is none: such a reply is asked for again.
"""

import re

from data_prep.replies import straight

_MARK = re.compile(r"\[\[\s*(\d{1,6})\s*\]\]")


def read_verdict(reply: str, texts: int) -> tuple[int, str] | None:
    """The index of the text that a reply names, from 0, and the words before that; None where it names none."""
    words = straight(reply)
    mark = None
    for found in _MARK.finditer(words):
        mark = found
    if mark is None or not 1 <= int(mark[1]) <= texts:
        return None
    return int(mark[1]) - 1, words[: mark.start()].strip().encode("utf-8", "replace").decode()
