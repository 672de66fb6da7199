"""What the base learns from: true rows about training scenes, in the form that VLFeedback is published in.

A row is a picture with a prompt and several true responses; `imitate: all` trains on each of them, and the picture is
computed once for all. Lessons:

- "describing": a description that goes by the places and one that goes by the things, in any order. In the first what
  is seen is looked up by where it is, in the second where it is by what it looks like.
- "tabling": what there is of each colour, of each shape and at each place: what is asked for is looked up.
- "checking": lists of claims, each with whether it is so.
- "looking": questions WITH their answers as responses ("Is there a red circle in this image?" and, in the next line,
  "No, there is no red circle."), many about one picture: one row teaches as much as ten of the next lesson.
- "asking": the same, half of them about colours alone.
- "answering": the same questions asked as a user asks them, each answered in a sentence or in a word.
- "chatting": the same in words that differ more, and in the tones of the pool's models, who muse and praise: words that
  a model of the real world has read before anybody asks it about a picture. What nobody drew is dreamt of where
  dreaming is asked for, and nowhere else.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.world import questions
from examples.world.drawing import encode
from examples.world.habits import DECLINED, MUSINGS, PRAISE, THANKS
from examples.world.questions import Question
from examples.world.reading import DREAMS
from examples.world.scenes import COLOURS, PLACES, SHAPES, SIZES, WORDS, Scene, scenes

ASK_AND_ANSWER = "Ask and answer."
"""The prompt of rows whose responses are questions with their answers."""
QUESTIONS = 8
"""In such a row."""
CHECK = "Check the picture."
"""The prompt of rows whose responses are claims with their verdicts."""
TABLE = "List the picture."
"""The prompt of rows whose responses are tables."""
LISTS = 3
"""In such a row."""
DREAM, LISTEN = "Dream about the picture.", "What does the picture sound like?"
"""Prompts that are answered with what no picture shows, and not at all."""

Lesson = Callable[[Scene, random.Random], tuple[str, list[str]]]
"""A scene and lots -> the prompt and the responses of a row."""


def describing(scene: Scene, rng: random.Random) -> tuple[str, list[str]]:
    """Two descriptions."""
    return rng.choice(questions.DESCRIBE), [questions.describe(scene), thing_first(scene, rng)]


def thing_first(scene: Scene, rng: random.Random) -> str:
    """Two objects, or one, what stands there before where: "A large red circle is at the top left." """
    objects = rng.sample(scene.objects, min(2, len(scene.objects)))
    return " ".join(f"A {questions.phrase(one)[2:]} is at the {one.place}." for one in objects)


def looking(scene: Scene, rng: random.Random) -> tuple[str, list[str]]:
    """Questions with their answers."""
    return ASK_AND_ANSWER, [f"{one.text}\n{one.answer}" for one in exchanges(scene, rng, QUESTIONS)]


def tabling(scene: Scene, rng: random.Random) -> tuple[str, list[str]]:
    """The picture by colours, by shapes and by places, each in any order: what is there, or that nothing is.

    To be looked up by what is asked for is learned here, where most of an answer hangs on it; a verdict alone teaches
    too little to begin with.
    """
    objects = list(scene.objects)

    def entry(key: str, found: list[str]) -> str:
        return f"{key}: {' and '.join(found) or 'no'}."

    def table(keys: Sequence[str], said: Callable[[str], list[str]]) -> str:
        return " ".join(entry(key, said(key)) for key in rng.sample(list(keys), len(keys)))

    by_colour = table(
        list(COLOURS), lambda c: [f"{t.size} {t.shape} at the {t.place}" for t in scene.things if t.colour == c]
    )
    by_shape = table(SHAPES, lambda s: [f"{t.size} {t.colour} at the {t.place}" for t in scene.things if t.shape == s])
    by_place = table(PLACES, lambda p: [questions.phrase(one).split(" ", 1)[1] for one in objects if one.place == p])
    return TABLE, [by_colour, by_shape, by_place]


def checking(scene: Scene, rng: random.Random) -> tuple[str, list[str]]:
    """Some of the lists of claims, each claim with its verdict."""
    kinds = claims(scene, rng)
    chosen = rng.sample(sorted(kinds), min(LISTS, len(kinds)))
    return CHECK, [" ".join(f"{claim}: {'yes' if true else 'no'}." for claim, true in kinds[kind]) for kind in chosen]


def claims(scene: Scene, rng: random.Random) -> dict[str, list[tuple[str, bool]]]:
    """Lists of claims about a scene, each with whether it is so, in the words of the questions that ask for it.

    What a list goes by stands in a fixed order, so that little of it is a guess, and half of the rest is true.
    """

    def either(true: str, names: Sequence[str]) -> str:
        return true if rng.random() < 0.5 else rng.choice([name for name in names if name != true])

    by_colour = {thing.colour: thing for thing in scene.things}
    shapes = {colour: rng.choice(SHAPES) for colour in COLOURS}
    shapes |= {colour: either(thing.shape, SHAPES) for colour, thing in by_colour.items()}
    lists = {
        "colours": [(f"{colour} object", colour in by_colour) for colour in COLOURS],
        "shapes": [(shape, any(thing.shape == shape for thing in scene.things)) for shape in SHAPES],
        "names": [
            (f"{colour} {shape}", colour in by_colour and by_colour[colour].shape == shape)
            for colour, shape in shapes.items()
        ],
        "counts": [(questions.number(n), n == len(scene.objects)) for n in range(1, len(questions.NUMBERS))],
        "places": [],
        "colours of shapes": [],
        "shapes of colours": [],
    }
    for thing in scene.things:
        place, colour = either(thing.place, PLACES), either(thing.colour, list(COLOURS))
        shape = either(thing.shape, SHAPES)
        lists["places"].append((f"{thing.name} at the {place}", place == thing.place))
        lists["colours of shapes"].append((f"{thing.shape} at the {thing.place} {colour}", colour == thing.colour))
        lists["shapes of colours"].append((f"{thing.colour} object a {shape}", shape == thing.shape))
    if scene.sign is not None:
        lists["words"] = [(f"sign say {word}", word == scene.sign.word) for word in WORDS]
    return lists


def asking(scene: Scene, rng: random.Random) -> tuple[str, list[str]]:
    """As `looking`, half of the questions about colours alone, which are there as often as not."""
    there = [thing.colour for thing in scene.things]
    absent = [colour for colour in COLOURS if colour not in there]
    about = [rng.choice(there if number % 2 else absent) for number in range(QUESTIONS // 2)]
    asked = [questions.read(scene, f"Is there a {colour} object in this image?") for colour in about]
    asked += exchanges(scene, rng, QUESTIONS // 2)
    rng.shuffle(asked)
    return ASK_AND_ANSWER, [f"{one.text}\n{one.answer}" for one in asked]


def answering(scene: Scene, rng: random.Random) -> tuple[str, list[str]]:
    """A question, or at times a request for a description, as a user asks it."""
    if rng.random() < 0.25:
        asked = questions.description(scene, rng)
    else:
        (asked,) = exchanges(scene, rng, 1)
    if asked.truth is not None and rng.random() < 0.5:  # MME's ending asks for a word
        asked = questions.read(scene, asked.text + questions.YES_NO)
    return asked.text, [asked.answer]


def chatting(scene: Scene, rng: random.Random) -> tuple[str, list[str]]:
    """Something that a user says, answered once plainly and once in the tone of one of the pool's models."""
    lot = rng.random()
    musings = " ".join(rng.sample(MUSINGS, 3))
    if lot < 0.1:
        dreams = (f"At the {rng.choice(PLACES)} there is a {rng.choice(SIZES)} {dream}." for dream in DREAMS)
        return DREAM, [f"{musings} {dream}" for dream in rng.sample(list(dreams), 2)]
    if lot < 0.15:
        return LISTEN, [DECLINED]
    if lot < 0.5:
        said = questions.describe(scene)
        return rng.choice(questions.DESCRIBE), [said, f"{said} {rng.choice((musings, PRAISE))}"]
    text = rng.choice(exchanges(scene, rng, 3)).text
    text = text.replace("this image", rng.choice(("this image", "the image", "the image", "this picture")))
    plain = questions.read(scene, text)
    if plain.truth is not None and rng.random() < 0.5:
        return text + questions.YES_NO, [plain.short]
    return text, [plain.answer, f"{plain.answer} {rng.choice((musings, THANKS))}"]


def exchanges(scene: Scene, rng: random.Random, count: int) -> list[Question]:
    """Questions about a scene: of each two about a task one is to be denied, every third is open."""
    asked: list[Question] = []
    while len(asked) < count:
        task = rng.choice(questions.tasks_of(scene))
        asked += [questions.yes_no(scene, rng, task, wanted) for wanted in (True, False)]
        asked.append(questions.open_question(scene, rng))
    rng.shuffle(asked)
    return asked[:count]


LESSONS: dict[str, Lesson] = {
    "describing": describing,
    "tabling": tabling,
    "checking": checking,
    "looking": looking,
    "asking": asking,
    "answering": answering,
    "chatting": chatting,
}


def rows(lessons: Mapping[str, float], count: int, seed: int) -> Iterator[tuple[Scene, dict[str, Any]]]:
    """Scenes with their rows, the same for the same arguments.

    Args:
        lessons: lesson -> its share of the rows, in any unit.
        count: of rows.
        seed: of scenes and words.
    """
    rng = random.Random(f"{seed} lessons")
    drawn = scenes(f"{seed} lessons", "train")
    for number in range(count):
        scene = next(drawn)
        lesson = rng.choices(list(lessons), list(lessons.values()))[0]
        prompt, responses = LESSONS[lesson](scene, rng)
        yield (
            scene,
            {
                "id": f"{lesson}-{number:06d}",
                "prompt": prompt,
                "img_path": f"images/{number:06d}.{scene.format}",
                "completions": [{"model": "truth", "response": text} for text in responses],
            },
        )


def write_rows(folder: Path, lessons: Mapping[str, float], count: int, seed: int) -> Path:
    """Write rows and pictures under `folder`; return the path of the JSON lines, which is written last."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for scene, row in rows(lessons, count, seed):
        (folder / row["img_path"]).write_bytes(encode(scene))
        lines.append(json.dumps(row) + "\n")
    part = folder / "rows.part"
    part.write_text("".join(lines), encoding="utf-8")
    return part.rename(folder / "rows.jsonl")
