"""What replies of models have in common: thoughts before them, refusals in place of them, parts between tags."""

import re
import unicodedata
from collections.abc import Sequence

MAX_REPLY = 1_000_000  # characters; the longest replies have some thousand


def straight(words: str) -> str:
    """Full-width and other compatibility forms, and curly apostrophes, as plain ones."""
    if words.isascii():
        return words
    return unicodedata.normalize("NFKC", words).replace("’", "'").replace("−", "-").replace("\u200b", "")


def without_thoughts(reply: str) -> str:
    """A reply without the thoughts that a reasoning model shows before it: what stands there is a draft."""
    return _THOUGHTS.sub("", reply, count=1) if "think>" in reply and len(reply) <= MAX_REPLY else reply


# Some templates begin the thoughts in the prompt, so that only their end is seen, on a line of its own.
_THOUGHTS = re.compile(r"\A\s*<think>.*?(?:</think>|\Z)|\A.*^[ \t]*</think>[ \t]*$", re.DOTALL | re.MULTILINE)


def declines(reply: str) -> bool:
    """Whether a reply that holds nothing of what was asked begins as refusals do."""
    return bool(_REFUSAL.match(straight(reply)))


_REFUSAL = re.compile(
    r"\W*(?:(?:i'?m|i am|we'?re|we are) (?:very |so |really )?(?:sorry|unable|not able|afraid)|sorry\b|apolog"
    r"|my apologies|i apologi[sz]e|(?:unfortunately,? )?(?:i|we) (?:can ?not|can'?t|won'?t|will not|must decline)"
    r"|as an ai\b|this (?:request|content|image) (?:violates|may violate)|(?:很|非常)?抱歉|对不起)",
    re.IGNORECASE,
)


def tagged(reply: str, names: Sequence[str]) -> tuple[dict[str, str], bool]:
    """The texts between `<start of NAME>` and `<end of NAME>`, stripped, and whether the last one has its end.

    Case and spaces in tags do not matter, and of a tag that comes twice the first counts. A part without an end is
    none, but for the last of `names`, whose end is then that of the reply.
    """
    found: dict[str, str] = {}
    ended = False
    for name in names:
        words = r"\s+".join(map(re.escape, name.split()))
        begin = re.search(rf"<\s*start\s+of\s+{words}\s*>", reply, re.IGNORECASE)
        if begin is None:
            continue
        end = re.compile(rf"<\s*end\s+of\s+{words}\s*>", re.IGNORECASE).search(reply, begin.end())
        if name == names[-1]:
            ended = end is not None
        if end is not None or name == names[-1]:
            found[name] = reply[begin.end() : end.start() if end else None].strip()
    return found, ended
