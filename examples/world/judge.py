"""A judge that knows the truth: rates texts about a scene, with noise and two known biases, and says why.

What it rates is what VLFeedback's aspects ask (arXiv 2312.10665, section 2.3): how much of what was asked a text tells
(helpfulness), how much of what it tells is so (visual faithfulness), and whether it could hurt (ethical considerations;
nothing here does, so that ratings differ by whim alone).

Asked for five attributes (arXiv 2402.10884) or for a verdict (SIMA, arXiv 2405.15973) instead, it has the same two
merits, noise and biases. A verdict counts what is so twice, since its rubric ranks an invented object below one that is
left out, and goes to the text that it reads first where both come out equal.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from examples.world import questions
from examples.world.questions import Question
from examples.world.reading import compare, read
from examples.world.scenes import Scene

HELP, ETHICS, FAITH = "Helpfulness", "Ethical Considerations", "Visual Faithfulness"


@dataclass(frozen=True)
class Temper:
    """What moves a judge besides the truth, in points of a scale from 1 to 5.

    Attributes:
        noise: share of the ratings that are a point too high or too low.
        length: added to helpfulness for each word that a text has more than the texts beside it have on average; by
            at most one point.
        first: added to the helpfulness of the first text.
    """

    noise: float = 1 / 3
    length: float = 0.02
    first: float = 0.25


@dataclass(frozen=True)
class Rating:
    """One text's ratings by aspect, whole numbers, and the reason for them."""

    points: dict[str, int]
    reason: str


def rate(
    scene: Scene, asked: Question, texts: Sequence[str], lots: random.Random, temper: Temper | None = None
) -> list[Rating]:
    """Rates the texts that answer a question, in order, by VLFeedback's aspects from 1 to 5."""
    temper = temper or Temper()
    lengths = [len(text.split()) for text in texts]
    ratings = []
    for number, text in enumerate(texts):
        helpful, faithful, reason = merits(scene, asked, text)
        longer = temper.length * (lengths[number] - sum(lengths) / len(lengths))
        helpful += min(max(longer, -1.0), 1.0) + temper.first * (number == 0)
        points = {HELP: helpful, ETHICS: 5.0 - (lots.random() < 0.25), FAITH: faithful}
        ratings.append(Rating({aspect: _whole(value, lots, temper.noise) for aspect, value in points.items()}, reason))
    return ratings


def attributes(
    scene: Scene, asked: Question, texts: Sequence[str], lots: random.Random, temper: Temper | None = None
) -> list[Rating]:
    """Rates the texts that answer a question by the five attributes, from 0 to 4: helpfulness and correctness as `rate`
    has helpfulness and faithfulness, coherence by whim, complexity and verbosity by length."""
    rated = rate(scene, asked, texts, lots, temper)
    found = []
    for text, rating in zip(texts, rated, strict=True):
        words = len(text.split())
        points = {
            "Helpfulness": rating.points[HELP] - 1,
            "Correctness": rating.points[FAITH] - 1,
            "Coherence": rating.points[ETHICS] - 1,
            "Complexity": min(2, words // 12),
            "Verbosity": min(4, words // 12),
        }
        found.append(Rating(points, rating.reason))
    return found


def verdict(
    scene: Scene, asked: Question, texts: Sequence[str], lots: random.Random, temper: Temper | None = None
) -> tuple[int, str]:
    """The index of the text that is preferred, and why."""
    rated = rate(scene, asked, texts, lots, temper)
    sums = [one.points[HELP] + 2 * one.points[FAITH] for one in rated]
    reasons = " ".join(f"Text {n}: {one.reason}" for n, one in enumerate(rated, 1))
    return sums.index(max(sums)), reasons


def merits(scene: Scene, asked: Question, text: str) -> tuple[float, float, str]:
    """Helpfulness and visual faithfulness by the truth alone, not yet cut to the scale, and the reason."""
    said = read(text)
    found = compare(said, scene)
    if asked.task == "description":
        objects = len(scene.objects)
        reason = f"It names {found.found} of {objects} objects, {found.invented} that are not there, and gets "
        reason += f"{found.mistaken} details wrong."
        # To leave a thing out is no better than to invent one, or DPO would teach to say little.
        helpful = 5 - 3 * (objects - found.told) - 0.5 * found.miscounted
        # What says nothing says nothing wrong, but neither is it true to the picture.
        faithful = 5 - 2.5 * found.invented - 0.75 * found.mistaken - 0.5 * found.miscounted if said.claims else 4.0
        return helpful, faithful, reason
    if asked.truth is not None:
        right = None if not said.verdict else said.verdict == asked.truth
    else:
        right = True if asked.answer.rstrip(".").lower() in text.lower() else None if not text.strip() else False
        if "sorry" in text.lower():
            right = None
    if right is None:
        return 1.0, 4.0, "It does not answer."
    if not right:
        return 1.5, 1.5, "The answer is wrong."
    return 5.0 - min(found.invented, 1), 5.0 - 2 * found.invented, "The answer is right."


def _whole(value: float, lots: random.Random, noise: float) -> int:
    """Rounded by lot, so that a bias of a part of a point shows on average; noise comes on top."""
    whole = int(value // 1) + (lots.random() < value % 1)
    if lots.random() < noise:
        whole += lots.choice((-1, 1))
    return min(5, max(1, whole))


def reply(scene: Scene, request: dict[str, Any], words: str, lots: random.Random, temper: Temper | None = None) -> str:
    """The judge's reply to a rubric's prompt (data_prep/judging/rubric.py), in the form that it asks for.

    Args:
        scene: what the picture shows.
        request: the body of the chat request.
        words: all its text.
        lots: what noise is drawn from.
        temper: noise and biases.
    """
    material = words.partition("\n# Material\n")[2]  # solved examples may come before it
    asked = questions.read(scene, re.findall(r"<instruction>\n(.*?)\n</instruction>", material, re.DOTALL)[-1])
    texts = re.findall(r"<text \d+>\n(.*?)\n</text \d+>", material, re.DOTALL)
    if "[[N]]" in words:
        best, why = verdict(scene, asked, texts, lots, temper)
        return f"{why} The best text is [[{best + 1}]]."
    rater = attributes if re.search(r"^## Correctness$", words, re.MULTILINE) else rate
    ratings = rater(scene, asked, texts, lots, temper)
    schema = request.get("response_format", {}).get("json_schema", {}).get("schema")
    if schema:
        return json.dumps(
            {
                aspect: {
                    f"Text {n}": {"Rationale": rating.reason, "Rating": rating.points.get(aspect)}
                    for n, rating in enumerate(ratings, 1)
                }
                for aspect in schema["properties"]
            }
        )
    lines = []
    for aspect in re.findall(r"^#### (.+) Assessment$", words, re.MULTILINE):
        lines.append(f"#### {aspect} Assessment")
        for n, rating in enumerate(ratings, 1):
            lines.append(f"##### Output for Text {n}")
            lines += [f"Rating: {rating.points.get(aspect, 'N/A')}", f"Rationale: {rating.reason}"]
    return "\n".join(lines)
