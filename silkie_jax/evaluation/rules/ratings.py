"""How judges' replies are read: the rules of the official tools, and those of harnesses, each under its own name.

A rule gives None for a reply that it cannot read; what that counts as is up to the benchmark.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from silkie_jax.evaluation.rules.letters import letters_of, mathvista_choice

# MMHal-Bench (LLaVA-RLHF, `Eval/eval_gpt_mmhal.py`)


def mmhal_rating(reply: str) -> int | None:
    """The one number of 0..6 that stands after "rating: " in the lowercased reply; None where it is not just one.

    Only this spelling is looked for, anywhere: "Rating: 10" is 1, "berating: 5" is 5, "**Rating:** 5" is nothing, and
    so are two different ratings; the same one twice is that one.
    """
    reply = reply.lower()
    found = [rating for rating in range(7) if f"rating: {rating}" in reply]
    return found[0] if len(found) == 1 else None


# MM-Vet (`mm-vet_evaluator.py`)


def mmvet_grade(reply: str) -> float | None:
    """What stands before the first space as a number between 0 and 1: " 0.7" is nothing, "0.8 because" is 0.8.

    "nan" passes, as it does officially: it is neither less than 0 nor more than 1.
    """
    return _between_0_and_1(reply.split(" ")[0])


def mmvet_grade_vlmevalkit(reply: str) -> float | None:
    """The whole reply as a number between 0 and 1 (VLMEvalKit): " 0.7" is 0.7, "0.8 because" nothing."""
    return _between_0_and_1(reply)


def _between_0_and_1(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if number < 0 or number > 1 else number


def first_grade(replies: Sequence[str], read: Callable[[str], float | None], most: int) -> float | None:
    """The grade of the first of at most `most` replies that can be read."""
    return next((grade for reply in replies[:most] if (grade := read(reply)) is not None), None)


# LLaVA-Bench (LLaVA, `llava/eval/eval_gpt_review_bench.py`)

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def llava_pair(reply: str) -> tuple[float, float] | None:
    """The first line as two numbers with one comma or space between them; "8, 9" is three pieces, and nothing."""
    pieces = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, pieces)
    except ValueError:  # also where there are not two
        return None
    return first, second


def llava_pair_lmms_eval(reply: str) -> tuple[float, float] | None:
    """The first two numbers anywhere in the first line (lmms-eval): "8, 9" passes; "8-9" reads -9."""
    found = _NUMBER.findall(reply.split("\n")[0])
    return (float(found[0]), float(found[1])) if len(found) >= 2 else None


# MRAG-Bench (`score.py`)


def mrag_verdict(reply: str) -> str | None:
    """A reply that is just one of A to D once it is stripped; "B." is nothing."""
    letter = reply.strip()
    return letter if letter in ("A", "B", "C", "D") else None


def choice_content(text: str, options: Sequence[str]) -> str | None:
    """The letter of the only option whose content occurs in the text, in any case; longer contents hide those that
    they contain ("polar bear" is not also "bear"). A rule of this project."""
    text = text.casefold()
    found = []
    for letter, option in sorted(zip(letters_of(options), options, strict=False), key=lambda pair: -len(pair[1])):
        content = option.strip().casefold()
        if content and re.search(rf"(?<!\w){re.escape(content)}(?!\w)", text):
            found.append(letter)
            text = text.replace(content, "\0")
    return found[0] if len(found) == 1 else None


# MathVista (`extract_answer.py`, `calculate_score.py`)

_QUICK = re.compile(r'The answer is "(.*)"\.')


def mathvista_extraction(response: str, row: Mapping[str, object], quick: bool) -> str | None:
    """What needs no judge to be extracted; None: a judge is asked.

    Args:
        row: with `question_type`, `answer_type` and `choices`.
        quick: whether `The answer is "..."` is read, officially an option.
    """
    if response == "":
        return ""
    choices = row.get("choices")
    if row["question_type"] == "multi_choice" and isinstance(choices, list) and response in choices:
        return response
    for answer_type, number in (("integer", int), ("float", float)):
        if row["answer_type"] == answer_type:
            try:
                return str(number(response))
            except ValueError:
                pass
    match = _QUICK.search(response) if quick else None
    return match[1] if match else None


def mathvista_normal(extraction: object, row: Mapping[str, object], ignore_empty: bool) -> str | None:
    """The extracted answer in the form that the truth has; None for what cannot be brought into it.

    Args:
        extraction: a text, or whatever a file of results holds.
        row: with `question_type`, `answer_type`, `choices` and `precision`.
        ignore_empty: an empty extraction of a multiple choice is None rather than the shortest choice.
    """
    if row["question_type"] == "multi_choice":
        text = str(extraction).strip()
        if ignore_empty and not text:
            return None
        return mathvista_choice(text, row["choices"])  # type: ignore[arg-type]
    try:
        match row["answer_type"]:
            case "integer":
                return str(int(float(extraction)))  # type: ignore[arg-type]
            case "float":
                return str(round(float(extraction), int(row["precision"])))  # type: ignore[arg-type, call-overload]
            case "list":
                return str(extraction)
    except (ValueError, TypeError, OverflowError):
        return None
    return str(extraction)
