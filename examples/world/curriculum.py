"""What the base learns from: true rows about training scenes, in the form that VLFeedback is published in.

A row is a picture with a prompt and several true responses; `imitate: all` trains on each of them, and the picture is
computed once for all. Two lessons:

- "looking": descriptions that name the place first and such that name the thing first, and questions WITH their
  answers as responses ("Is there a red circle in this image? No, there is no red circle."), many about one picture.
- "answering": the same questions asked as a user asks them, each answered in a sentence and in a word.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.world import questions
from examples.world.drawing import encode
from examples.world.questions import Question
from examples.world.scenes import Scene, scenes

ASK_AND_ANSWER = "Ask and answer."
"""The prompt of rows whose responses are questions with their answers."""


def thing_first(scene: Scene, rng: random.Random) -> str:
    """A description in any order, in which what stands there comes before where: "A large red circle is at the ..." """
    objects = list(scene.objects)
    rng.shuffle(objects)
    said = [f"A {questions.phrase(one)[2:]} is at the {one.place}." for one in objects]
    return " ".join(said)


def exchanges(scene: Scene, rng: random.Random, count: int) -> list[Question]:
    """Questions about a scene: of each two about a task one is to be denied, every fourth is open."""
    asked: list[Question] = []
    while len(asked) < count:
        task = rng.choice(questions.tasks_of(scene))
        asked += [questions.yes_no(scene, rng, task, wanted) for wanted in (True, False)]
        asked.append(questions.open_question(scene, rng))
    rng.shuffle(asked)
    return asked[:count]


def looking(scene: Scene, rng: random.Random, number: int) -> tuple[str, list[str]]:
    """Prompt and responses of a row of the first lesson."""
    if number % 2:
        return ASK_AND_ANSWER, [f"{one.text}\n{one.answer}" for one in exchanges(scene, rng, 7)]
    return rng.choice(questions.DESCRIBE), [questions.describe(scene), thing_first(scene, rng)]


def describing(scene: Scene, rng: random.Random, number: int) -> tuple[str, list[str]]:
    """Prompt and responses of a row of descriptions alone."""
    return rng.choice(questions.DESCRIBE), [questions.describe(scene), thing_first(scene, rng)]


def answering(scene: Scene, rng: random.Random, number: int) -> tuple[str, list[str]]:
    """Prompt and responses of a row of the second lesson: every third is a description."""
    if number % 3 == 0:
        return rng.choice(questions.DESCRIBE), [questions.describe(scene)]
    (one,) = exchanges(scene, rng, 1)
    if one.truth is None:
        return one.text, [one.answer]
    # MME's ending asks for a word, the bare question is answered in a sentence.
    return (one.text + questions.YES_NO, [one.short]) if rng.random() < 0.5 else (one.text, [one.answer])


LESSONS = {"describing": describing, "looking": looking, "answering": answering}


def rows(lesson: str, count: int, seed: int, most: int = 4) -> Iterator[tuple[Scene, dict[str, Any]]]:
    """Scenes with their rows, the same for the same seed."""
    rng = random.Random(f"{seed} {lesson} {most}")
    for number, scene in zip(range(count), scenes(f"{seed} {lesson} {most}", "train", most), strict=False):
        prompt, responses = LESSONS[lesson](scene, rng, number)
        row = {
            "id": f"{lesson}-{number:06d}",
            "prompt": prompt,
            "img_path": f"images/{lesson}-{number:06d}.{scene.format}",
            "completions": [{"model": "truth", "response": text} for text in responses],
        }
        yield scene, row


def write_lesson(folder: Path, lesson: str, count: int, seed: int, most: int = 4) -> Path:
    """Write rows and pictures under `folder`; return the path of the JSON lines."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / f"{lesson}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for scene, row in rows(lesson, count, seed, most):
            (folder / row["img_path"]).write_bytes(encode(scene))
            file.write(json.dumps(row) + "\n")
    return path
