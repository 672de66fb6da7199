"""What can be said and asked about a scene, with the true answer: the tasks of MME and POPE on coloured shapes.

`yes_no` and `open_question` draw questions; `read` takes the text of one, whoever wrote it, and says what is true.
"""

import random
import re
from collections.abc import Callable
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
"""What MME's questions end in; they are answered in a word."""
YES_NO_TASKS = ("existence", "count", "position", "color", "shape", "OCR")
"""MME's names where MME has the task."""


@dataclass(frozen=True)
class Question:
    """A question with its true answer.

    Attributes:
        task: one of YES_NO_TASKS, "comparison" or "description".
        text: what is asked.
        answer: the true answer in one sentence, in a word, or a description: as the question asks for.
        truth: "yes" or "no" where that is what is asked for, else None.
        agreement: what one answers who agrees whatever is true; the true answer where that makes no sense.
    """

    task: str
    text: str
    answer: str
    truth: str | None
    agreement: str

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
    """ "two objects", "one object", "no crosses" """
    return f"{NUMBERS[count]} {noun if count == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """ "crosses" """
    return noun + ("es" if noun.endswith("s") else "s")


def there_are(count: int, noun: str = "object") -> str:
    """ "There are two objects." """
    return f"There {'is' if count == 1 else 'are'} {number(count, noun)}."


def describe(scene: Scene) -> str:
    """All there is, in reading order."""
    return " ".join([there_are(len(scene.objects)), *map(sentence, scene.objects)])


def absent(scene: Scene) -> list[str]:
    """Names of things that the scene does not show, though their colour or shape may occur."""
    there = {thing.name for thing in scene.things}
    return [name for name in (f"{c} {s}" for c in COLOURS for s in SHAPES) if name not in there]


# Drawing questions.


def tasks_of(scene: Scene) -> tuple[str, ...]:
    """The tasks that can be asked of a scene with yes or no."""
    return YES_NO_TASKS if scene.sign else YES_NO_TASKS[:-1]


def yes_no(scene: Scene, rng: random.Random, task: str, wanted: bool) -> Question:
    """A question of a task whose true answer is yes, or no, as wanted.

    Raises:
        ValueError: there is no such task, or it cannot be asked of this scene.
    """
    if task not in tasks_of(scene):
        raise ValueError(f"the scene has no question of the task {task!r}")
    thing = rng.choice(scene.things)

    def said(true: str, names: tuple[str, ...]) -> str:
        return true if wanted else rng.choice([name for name in names if name != true])

    match task:
        case "existence":
            forms = [thing.name, thing.name, f"{thing.colour} object", thing.shape]
            name = rng.choice(forms) if wanted else rng.choice(_absent_of_a_kind(scene, rng))
            text = f"Is there a {name} in this image?"
        case "count":
            true = NUMBERS[len(scene.objects)]
            count = NUMBERS.index(said(true, NUMBERS[1:]))
            text = f"{'Is' if count == 1 else 'Are'} there {number(count)} in this image?"
        case "position":
            text = f"Is the {thing.name} at the {said(thing.place, PLACES)} of this image?"
        case "color":
            text = f"Is the {thing.shape} at the {thing.place} {said(thing.colour, tuple(COLOURS))}?"
        case "shape":
            text = f"Is the {thing.colour} object a {said(thing.shape, SHAPES)}?"
        case _:
            assert scene.sign is not None
            text = f"Does the sign say {said(scene.sign.word, WORDS)}?"
    return read(scene, text)


def _absent_of_a_kind(scene: Scene, rng: random.Random) -> list[str]:
    """Names of absent things, or at times of absent colours or shapes as far as there are any."""
    colours = {thing.colour for thing in scene.things}
    shapes = {thing.shape for thing in scene.things}
    kinds = [
        absent(scene),
        absent(scene),
        [f"{colour} object" for colour in COLOURS if colour not in colours],
        [shape for shape in SHAPES if shape not in shapes],
    ]
    return rng.choice(kinds) or absent(scene)


def open_question(scene: Scene, rng: random.Random) -> Question:
    """A question to be answered in words: where, what colour, what shape, how many, which word, which is larger."""
    thing = rng.choice(scene.things)
    texts = [
        f"Where is the {thing.name if rng.random() < 0.6 else rng.choice(absent(scene))}?",
        f"What colour is the {thing.shape} at the {thing.place}?",
        f"What shape is the {thing.colour} object?",
        "How many objects are there?",
        f"How many {plural(rng.choice(SHAPES))} are there?",
    ]
    if scene.sign is not None:
        texts.append("What does the sign say?")
    if pairs := [(a, b) for a in scene.things for b in scene.things if a.size != b.size]:
        one, other = rng.choice(pairs)
        texts.append(f"Which is larger, the {one.name} or the {other.name}?")
    return read(scene, rng.choice(texts))


def description(scene: Scene, rng: random.Random) -> Question:
    """A request for a description."""
    return read(scene, rng.choice(DESCRIBE))


# Reading questions.


def read(scene: Scene, text: str) -> Question:
    """The question that a text asks; whatever is not understood is taken for a request for a description.

    Where a question takes for granted what is not so ("Where is the red circle?"), the true answer says so.
    """
    asked = text.strip().removesuffix(YES_NO)
    for pattern, answer in _FORMS:
        if found := pattern.fullmatch(asked):
            task, *said = answer(scene, *found.groups())
            if len(said) == 1:
                return Question(task, text, said[0], None, said[0])
            right, true, claimed = said
            if text.strip() != asked:
                return Question(task, text, "Yes." if right else "No.", "yes" if right else "no", "Yes.")
            return Question(task, text, f"Yes, {claimed}." if right else f"No, {true}.", "yes" if right else "no",
                            f"Yes, {claimed}.")  # fmt: skip
    return Question("description", text, describe(scene), None, describe(scene))


_COLOUR, _SHAPE, _PLACE = "|".join(COLOURS), "|".join(SHAPES), "|".join(PLACES)
_SHAPES = "|".join(map(plural, SHAPES))
_NAME = rf"(?:{_COLOUR}) (?:{_SHAPE})"


def _named(scene: Scene, name: str) -> Thing | None:
    return next((thing for thing in scene.things if thing.name == name), None)


def _existence(scene: Scene, name: str) -> tuple:
    there = any(name in (thing.name, f"{thing.colour} object", thing.shape) for thing in scene.things)
    return "existence", there, f"there is {'a' if there else 'no'} {name}", f"there is a {name}"


def _count(scene: Scene, word: str) -> tuple:
    count = len(scene.objects)
    said = NUMBERS.index(word)
    return "count", said == count, _lower(there_are(count)), _lower(there_are(said))


def _position(scene: Scene, name: str, place: str) -> tuple:
    thing = _named(scene, name)
    true = f"the {name} is at the {thing.place}" if thing else f"there is no {name}"
    return "position", thing is not None and thing.place == place, true, f"the {name} is at the {place}"


def _color(scene: Scene, shape: str, place: str, colour: str) -> tuple:
    thing = next((thing for thing in scene.things if (thing.shape, thing.place) == (shape, place)), None)
    true = f"it is {thing.colour}" if thing else f"there is no {shape}"
    return "color", thing is not None and thing.colour == colour, true, f"it is {colour}"


def _shape(scene: Scene, colour: str, shape: str) -> tuple:
    thing = next((thing for thing in scene.things if thing.colour == colour), None)
    true = f"it is a {thing.shape}" if thing else f"there is no {colour} object"
    return "shape", thing is not None and thing.shape == shape, true, f"it is a {shape}"


def _written(scene: Scene, word: str) -> tuple:
    true = f"it says {scene.sign.word}" if scene.sign else "there is no sign"
    return "OCR", scene.sign is not None and scene.sign.word == word, true, f"it says {word}"


def _where(scene: Scene, name: str) -> tuple:
    thing = _named(scene, name)
    return "position", f"It is at the {thing.place}." if thing else f"There is no {name}."


def _what_colour(scene: Scene, shape: str, place: str) -> tuple:
    thing = next((thing for thing in scene.things if (thing.shape, thing.place) == (shape, place)), None)
    return "color", f"It is {thing.colour}." if thing else f"There is no {shape}."


def _what_shape(scene: Scene, colour: str) -> tuple:
    thing = next((thing for thing in scene.things if thing.colour == colour), None)
    return "shape", f"It is a {thing.shape}." if thing else f"There is no {colour} object."


def _how_many(scene: Scene, plural_shape: str | None) -> tuple:
    if plural_shape is None:
        return "count", there_are(len(scene.objects))
    shape = next(shape for shape in SHAPES if plural(shape) == plural_shape)
    return "count", there_are(sum(thing.shape == shape for thing in scene.things), shape)


def _what_word(scene: Scene) -> tuple:
    return "OCR", f"It says {scene.sign.word}." if scene.sign else "There is no sign."


def _larger(scene: Scene, one: str, other: str) -> tuple:
    things = [_named(scene, name) for name in (one, other)]
    for thing, name in zip(things, (one, other), strict=True):
        if thing is None:
            return "comparison", f"There is no {name}."
    larger = [thing.name for thing in things if thing and thing.size == "large"]
    return "comparison", f"The {larger[0]} is larger." if len(larger) == 1 else "Neither is larger."


_FORMS: tuple[tuple[re.Pattern[str], Callable[..., tuple]], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), answer)
    for pattern, answer in (
        (rf"Is there a ({_NAME}|(?:{_COLOUR}) object|{_SHAPE}) in (?:this|the) (?:image|picture)\?", _existence),
        (rf"(?:Is|Are) there ({'|'.join(NUMBERS)}) objects? in (?:this|the) (?:image|picture)\?", _count),
        (rf"Is the ({_NAME}) at the ({_PLACE}) of (?:this|the) (?:image|picture)\?", _position),
        (rf"Is the ({_SHAPE}) at the ({_PLACE}) ({_COLOUR})\?", _color),
        (rf"Is the ({_COLOUR}) object a ({_SHAPE})\?", _shape),
        (rf"Does the sign say ({'|'.join(WORDS)})\?", _written),
        (rf"Where is the ({_NAME})\?", _where),
        (rf"What colour is the ({_SHAPE}) at the ({_PLACE})\?", _what_colour),
        (rf"What shape is the ({_COLOUR}) object\?", _what_shape),
        (rf"How many (?:objects|({_SHAPES})) are there\?", _how_many),
        (r"What does the sign say\?", _what_word),
        (rf"Which is larger, the ({_NAME}) or the ({_NAME})\?", _larger),
    )
)
"""Form of a question -> (scene, what it names) -> task and answer, or task, whether, what is true, what is claimed."""


def _lower(text: str) -> str:
    """A sentence as a part of one: "there are two objects"."""
    return text[0].lower() + text[1:].removesuffix(".")
