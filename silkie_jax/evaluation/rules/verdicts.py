"""HallusionBench's judge: what its replies are taken for, and what an error is blamed on (`utils.py` there)."""

WRONG, RIGHT, UNCLEAR = "0", "1", "2"
"""Verdicts, as the official tool saves them."""


def read_verdict(reply: str) -> str:
    """ "incorrect" anywhere is wrong, else "correct" is right, else unclear: "not correct" is right."""
    reply = reply.lower()
    return WRONG if "incorrect" in reply else RIGHT if "correct" in reply else UNCLEAR


def read_same(reply: str) -> bool:
    """Whether two answers say the same: "not the same" does, too."""
    return "same" in reply.lower()


def blame(category: str, edited: bool, counterfactual: bool, verdict: str, original: str, same: bool) -> str | None:
    """LH (language), VI (vision) or Mixed for one answer; None where there is nothing to blame.

    VD: vision, but both where the original was answered rightly and the edited figure wrongly in the same words.
    VS: language where there was no figure. With a figure: both, where the answer without it was wrong, but language
    alone if the figure changed nothing; else vision, but language where a figure against common sense changed nothing.

    Args:
        category: VD or VS.
        edited: not the original figure of its set (VS: there is a figure).
        counterfactual: `visual_input` 2.
        verdict: on this answer.
        original: on the answer to the same question for the original figure.
        same: whether the two say the same.
    """
    if not edited:
        if category == "VS":
            return "LH" if verdict == WRONG else None
        return None if verdict == RIGHT else "VI"
    if verdict == RIGHT:
        return None
    repeated = verdict == WRONG and same
    if category == "VD":
        return "Mixed" if original == RIGHT and repeated else "VI"
    if original == WRONG:
        return "LH" if repeated else "Mixed"
    return "LH" if original == RIGHT and repeated and counterfactual else "VI"
