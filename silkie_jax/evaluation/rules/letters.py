"""Multiple choice: which option a text names, by the rules of several tools, each under its own name.

None of them is right or wrong: they are what published numbers were made with. `tests/evaluation/test_mcq.py` shows
where they part.
"""

import re
import string
from collections.abc import Callable, Sequence

REFUSED = "Z"
"""What VLMEvalKit writes for a refusal: an answer that is wrong, and that no judge is asked about."""

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_BRACKETED = re.compile(r"\(([a-zA-Z])\)")


def letters_of(options: Sequence[str]) -> str:
    """The capital letters of as many options: "ABCD" for four."""
    return string.ascii_uppercase[: len(options)]


def exact_letter(text: str, options: Sequence[str]) -> str | None:
    """The text is the letter, and nothing else: "B." is no answer (LLaVA, `scripts/convert_seed_for_submission.py`)."""
    return text if text and text in letters_of(options) and len(text) == 1 else None


def first_character(text: str, options: Sequence[str]) -> str | None:
    """The first character of the stripped text, in either case (lmms-eval, `seedbench`); "Answer: B" is A."""
    first = text.strip()[:1].upper()
    return first if first and first in letters_of(options) else None


def mrag_letter(text: str, letters: str = "ABCD") -> str | None:
    """The last letter in brackets, else the last one between spaces (MRAG-Bench, `score.py`, before it asks a judge).

    Each mark is taken off the ends once and in this order, so "A'." is A and "A!'" is nothing.
    """
    text = text.strip()
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", " {} "):
        found = {letter: text.rfind(form.format(letter)) for letter in letters}
        best = max(found, key=found.__getitem__, default=None)
        if best is not None and found[best] >= 0:
            return best
    return None


def vlmevalkit_letter(text: str, options: Sequence[str]) -> str | None:
    """One letter as a word of its own near the end, else one option whose content occurs (VLMEvalKit, `can_infer`).

    A letter counts among the last five words only; punctuation parts words. Contents are looked for, in any case, in
    answers that are at most twice as long as all contents together. `REFUSED` stands for refusals that it knows.
    """
    if "Failed to obtain answer via API" not in text:
        if any(refusal in text for refusal in _REFUSALS):
            return REFUSED
        words = text.translate(_SPACES).split()
        named = [letter for letter in letters_of(options) if letter in words]
        if len(named) == 1 and words.index(named[0]) > len(words) - 5:
            return named[0]
        if not named and REFUSED in words:
            return REFUSED
    text = text.lower()
    if len(text) > 2 * sum(map(len, options)):
        return None
    named = [letter for letter, content in zip(letters_of(options), options, strict=False) if content.lower() in text]
    return named[0] if len(named) == 1 else None


def mathvista_choice(extraction: str, choices: Sequence[str]) -> str:
    """The content that an extracted answer stands for (MathVista, `calculate_score.py`): there always is one.

    The first letter in brackets, in either case, or the whole text where it is a capital letter within range; else the
    choice with the least Levenshtein distance, the first of equals: "" is the shortest, and "b" is no letter.
    """
    from rapidfuzz.distance import Levenshtein

    extraction = extraction.strip()
    bracketed = _BRACKETED.search(extraction)
    if bracketed:
        extraction = bracketed[1].upper()
    letters = [chr(ord("A") + k) for k in range(len(choices))]
    if extraction in letters:
        return choices[letters.index(extraction)]
    return min(choices, key=lambda choice: Levenshtein.distance(extraction, choice))


def mathvista_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter of `mathvista_choice`; None where there are no options."""
    return letters_of(options)[options.index(mathvista_choice(text, options))] if options else None


RULES: dict[str, Callable[[str, Sequence[str]], str | None]] = {
    "letter_exact_llava_seed": exact_letter,
    "first_character_lmms_eval_seed": first_character,
    "mrag_official_before_the_judge": lambda text, options: mrag_letter(text, letters_of(options)),
    "vlmevalkit_can_infer": vlmevalkit_letter,
    "mathvista_official_on_the_raw_text": mathvista_letter,
}
"""Name -> rule: text, contents of the options -> letter, or None where it names none."""
