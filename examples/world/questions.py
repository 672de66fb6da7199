"""What can be said and asked about a scene, with the true answer: the tasks of MME and POPE on coloured shapes."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from examples.world.scenes import COLOURS, PLACES, SHAPES, WORDS, Scene, Sign, Thing

NUMBERS = ("no", "one", "two", "three", "four")
DESCRIBE = (
    "Describe the picture.",
    "Describe the image in detail.",
    "What is in this picture?",
    "What do you see in the image?",
    "Please describe this image in detail.",
)
YES_NO = " Please answer yes or no."
"""What MME's questions end in."""
TASKS = ("existence", "count", "position", "color", "OCR")
"""Those of MME's tasks that can be asked about shapes, under its names."""


@dataclass(frozen=True)
class Question:
    """A question with its true answers.

    Attributes:
        task: one of TASKS, "shape", "comparison" or "description".
        text: what is asked.
        answer: the true answer in one sentence, or a description.
        truth: "yes" or "no" where that is what is asked for, else None.
    """

    task: str
    text: str
    answer: str
    truth: str | None = None

    @property
    def short(self) -> str:
        """The answer in a word where there is one: "Yes."."""
        return self.answer if self.truth is None else f"{self.truth.capitalize()}."


# Sentences.


def phrase(one: Thing | Sign) -> str:
    """ "a large red circle" """
    return f"a sign that says {one.word}" if isinstance(one, Sign) else f"a {one.size} {one.name}"


def sentence(one: Thing | Sign) -> str:
    """ "At the top left there is a large red circle." """
    return f"At the {one.place} there is {phrase(one)}."


def number(count: int, noun: str = "object") -> str:
    """ "two objects", "one object", "no objects" """
    return f"{NUMBERS[count]} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def there_are(count: int, noun: str = "object") -> str:
    """ "There are two objects." """
    return f"There {'is' if count == 1 else 'are'} {number(count, noun)}."


def describe(scene: Scene) -> str:
    """All there is, in reading order."""
    return " ".join([there_are(len(scene.objects)), *map(sentence, scene.objects)])


# Questions. Each function draws one by `rng`; `wanted` says which answer a yes/no question is to have.


def existence(scene: Scene, rng: random.Random, wanted: bool) -> Question:
    """Is there such a thing? Where there is not, colour or shape may occur, but not together."""
    name = rng.choice([one.name for one in scene.things]) if wanted else rng.choice(absent(scene))
    return _asked(
        "existence", f"Is there a {name} in this image?", wanted, f"there is {'a' if wanted else 'no'} {name}"
    )


def absent(scene: Scene) -> list[str]:
    """Names of things that the scene does not show."""
    there = {thing.name for thing in scene.things}
    return [name for name in (f"{c} {s}" for c in COLOURS for s in SHAPES) if name not in there]


def count(scene: Scene, rng: random.Random, wanted: bool) -> Question:
    """Are there so many objects?"""
    true = len(scene.objects)
    said = true if wanted else rng.choice([n for n in (1, 2, 3, 4) if n != true])
    asked = f"{'Is' if said == 1 else 'Are'} there {number(said)} in this image?"
    verb = "is" if true == 1 else "are"
    return _asked("count", asked, wanted, f"there {verb} {number(true)}")


def position(scene: Scene, rng: random.Random, wanted: bool) -> Question:
    """Is the thing there?"""
    thing = rng.choice(scene.things)
    said = thing.place if wanted else rng.choice([place for place in PLACES if place != thing.place])
    asked = f"Is the {thing.name} at the {said} of this image?"
    return _asked("position", asked, wanted, f"the {thing.name} is at the {thing.place}")


def color(scene: Scene, rng: random.Random, wanted: bool) -> Question:
    """Has what stands there this colour?"""
    thing = rng.choice(scene.things)
    said = thing.colour if wanted else rng.choice([colour for colour in COLOURS if colour != thing.colour])
    return _asked("color", f"Is the {thing.shape} at the {thing.place} {said}?", wanted, f"it is {thing.colour}")


def shape(scene: Scene, rng: random.Random, wanted: bool) -> Question:
    """Has the thing of this colour this shape?"""
    thing = rng.choice(scene.things)
    said = thing.shape if wanted else rng.choice([shape for shape in SHAPES if shape != thing.shape])
    return _asked("shape", f"Is the {thing.colour} object a {said}?", wanted, f"it is a {thing.shape}")


def written(scene: Scene, rng: random.Random, wanted: bool) -> Question:
    """Does the sign say this? Only of a scene that has one.

    Raises:
        ValueError: it has none.
    """
    if scene.sign is None:
        raise ValueError("the scene has no sign")
    said = scene.sign.word if wanted else rng.choice([word for word in WORDS if word != scene.sign.word])
    return _asked("OCR", f"Does the sign say {said}?", wanted, f"it says {scene.sign.word}")


_TRUE_OR_FALSE = {"existence": existence, "count": count, "position": position, "color": color, "shape": shape}


def yes_no(scene: Scene, rng: random.Random, task: str, wanted: bool) -> Question:
    """A question of a task with the wanted answer.

    Raises:
        ValueError: there is no such task, or it cannot be asked of this scene.
    """
    if task == "OCR":
        return written(scene, rng, wanted)
    if task not in _TRUE_OR_FALSE:
        raise ValueError(f"no task {task!r}")
    return _TRUE_OR_FALSE[task](scene, rng, wanted)


def tasks_of(scene: Scene) -> tuple[str, ...]:
    """The tasks that can be asked of a scene with yes or no."""
    return (*_TRUE_OR_FALSE, "OCR") if scene.sign else tuple(_TRUE_OR_FALSE)


def open_question(scene: Scene, rng: random.Random) -> Question:
    """A question to be answered in words: where, what colour, what shape, how many, which word, which is larger."""
    thing = rng.choice(scene.things)
    questions = [
        Question("position", f"Where is the {thing.name}?", f"It is at the {thing.place}."),
        Question("color", f"What colour is the {thing.shape} at the {thing.place}?", f"It is {thing.colour}."),
        Question("shape", f"What shape is the {thing.colour} object?", f"It is a {thing.shape}."),
        Question("count", "How many objects are there?", there_are(len(scene.objects))),
    ]
    kind = rng.choice(SHAPES)
    same = sum(one.shape == kind for one in scene.things)
    questions.append(Question("count", f"How many {kind}{'es' if kind == 'cross' else 's'} are there?",
                              there_are(same, kind)))  # fmt: skip
    if scene.sign is not None:
        questions.append(Question("OCR", "What does the sign say?", f"It says {scene.sign.word}."))
    if pair := _of_two_sizes(scene.things, rng):
        questions.append(comparison(*pair, rng))
    return rng.choice(questions)


def comparison(first: Thing, second: Thing, rng: random.Random) -> Question:
    """Which of two things is larger; they are of different sizes."""
    larger = first if first.size == "large" else second
    one, other = rng.sample([first, second], 2)
    asked = f"Which is larger, the {one.name} or the {other.name}?"
    return Question("comparison", asked, f"The {larger.name} is larger.")


def _of_two_sizes(things: Sequence[Thing], rng: random.Random) -> tuple[Thing, Thing] | None:
    pairs = [(a, b) for k, a in enumerate(things) for b in things[k + 1 :] if a.size != b.size]
    return rng.choice(pairs) if pairs else None


def description(scene: Scene, rng: random.Random) -> Question:
    """A request for a description."""
    return Question("description", rng.choice(DESCRIBE), describe(scene))


def _asked(task: str, text: str, wanted: bool, fact: str) -> Question:
    truth = "yes" if wanted else "no"
    return Question(task, text, f"{truth.capitalize()}, {fact}.", truth)
