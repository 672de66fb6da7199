"""Yes or no: what a text is taken for by the rules of several tools, each under its own name.

None of them is right or wrong: they are what published numbers were made with. `tests/evaluation/test_yesno.py` shows
where they part.
"""

import re
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

from silkie_jax.evaluation.rules.sums import Totals, ratio

YES, NO = "yes", "no"
OTHER = "other"
UNKNOWN = "unknown"
"""VLMEvalKit's word for `OTHER`."""


def mme_official(text: str) -> str:
    """ "yes", else "no", anywhere in the first four characters, in any case (MME, `calculation.py`).

    Nothing is stripped: " yes" is yes and "  yes" is not; "Snow" and "none" are no.
    """
    return _within(text.lower()[:4])


def mme_lmms_eval(text: str) -> str:
    """As `mme_official` after stripping and without full stops; "y" and "n" alone count (lmms-eval, `mme`)."""
    text = text.lower().strip().replace(".", "")
    return {"y": YES, "n": NO}.get(text) or _within(text[:4])


def pope_official(text: str) -> str:
    """No where "No", "not" or "no" is a word before the first full stop, else yes (POPE, `evaluate.py`).

    Words lie between single spaces, commas are dropped: "NO", "No!" and "" are yes.
    """
    words = text.partition(".")[0].replace(",", "").split(" ")
    return NO if {"No", "not", "no"} & set(words) else YES


def pope_lmms_eval(text: str) -> str:
    """The whole text, stripped, in any case (lmms-eval, `pope`): "Yes." is neither."""
    text = text.lower().strip()
    return text if text in (YES, NO) else OTHER


_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS_TAKEN = 32  # the original passes a flag of this value where a count belongs


def vlmevalkit(text: str) -> str:
    """Yes or no as a whole word, and not both (VLMEvalKit, `YOrN_Extraction`, after VQA's rule for punctuation).

    A mark that has a space beside it anywhere is dropped, others become spaces: "yes/no" is two words, "a /yes/no" one.
    """
    words = _without_marks(text.lower()).split()
    if (YES in words) == (NO in words):
        return UNKNOWN
    return YES if YES in words else NO


def _without_marks(text: str) -> str:
    drop_all = _COMMA_IN_NUMBER.search(text) is not None
    table = {ord(m): "" if drop_all or f"{m} " in text or f" {m}" in text else " " for m in _MARKS}
    return _FULL_STOP.sub("", text.translate(table), count=_FULL_STOPS_TAKEN)


def amber_official(text: str) -> str:
    """Exactly "Yes" or "No" (AMBER, `inference.py`)."""
    return {"Yes": YES, "No": NO}.get(text, OTHER)


def amber_lmms_eval(text: str) -> str:
    """ "yes", else "no", anywhere, in any case (lmms-eval, `amber`): "Unknown" and "cannot" are no."""
    return _within(text.lower())


def _within(text: str) -> str:
    return YES if YES in text else NO if NO in text else OTHER


RULES: dict[str, Callable[[str], str]] = {
    "mme_official": mme_official,
    "mme_lmms_eval": mme_lmms_eval,
    "pope_official": pope_official,
    "pope_lmms_eval_exact_after_lower_and_strip": pope_lmms_eval,
    "vlmevalkit": vlmevalkit,
    "amber_official_exact": amber_official,
    "amber_lmms_eval": amber_lmms_eval,
}
"""Name -> rule: text -> "yes", "no", or "other" (VLMEvalKit: "unknown")."""

CONFUSION = ("TP", "FP", "TN", "FN")


def confusion(reading: str, truth: str) -> str | None:
    """Which of `CONFUSION` an answer is, yes being positive; None where the reading is neither."""
    if reading not in (YES, NO):
        return None
    return ("T" if reading == truth else "F") + ("P" if reading == YES else "N")


def confusion_figures(sums: Totals) -> Mapping[str, Float[np.ndarray, "..."]]:
    """Precision, recall and F1 of the sums TP, FP and FN."""
    return {
        "precision": ratio(sums["TP"], sums["TP"] + sums["FP"]),
        "recall": ratio(sums["TP"], sums["TP"] + sums["FN"]),
        "f1": ratio(2 * sums["TP"], 2 * sums["TP"] + sums["FP"] + sums["FN"]),
    }
