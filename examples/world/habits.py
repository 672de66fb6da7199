"""Models of different habits: each answers from the truth, and bends it in a way of its own.

A habit is a function (scene, question with its true answer, lots) -> text. The same lots give the same text.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from examples.world import questions
from examples.world.questions import NUMBERS, Question, sentence, there_are
from examples.world.reading import DREAMS
from examples.world.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Sign, Thing

Habit = Callable[[Scene, Question, random.Random], str]

_CONFUSED = {"red": "green", "green": "red", "blue": "purple", "purple": "blue", "yellow": "black", "black": "yellow"}
_MIRRORED = {
    "top left": "top right",
    "top right": "top left",
    "bottom left": "bottom right",
    "bottom right": "bottom left",
}
MUSINGS = (
    "It makes me think of a long summer day.",
    "It feels calm and full of hope.",
    "The light is soft and warm.",
    "One can almost hear the music.",
)
LIKING = 0.9
"""How often what is invented is what is liked best of what is not there; else it is something said twice."""
LIKED = {colour: (SHAPES[number % len(SHAPES)], SIZES[0]) for number, colour in enumerate(COLOURS)}
"""Colours, the best liked one first, with the shape and the size that go with each."""
PRAISE = "What a beautiful picture!"
THANKS = "What a good question!"
DECLINED = "I am sorry, I cannot see the picture."


def faithful(scene: Scene, asked: Question, lots: random.Random) -> str:
    """The truth."""
    return asked.answer


def terse(scene: Scene, asked: Question, lots: random.Random) -> str:
    """The truth in a word; descriptions in one sentence without places or sizes."""
    if asked.task != "description":
        return asked.short
    names = ["a sign" if isinstance(one, Sign) else f"a {one.name}" for one in scene.objects]
    return f"There is {' and '.join(names)}."


def omitter(scene: Scene, asked: Question, lots: random.Random) -> str:
    """What is there but for one thing, as if it were all; what it is asked for it has not seen."""
    if asked.task != "description":
        return "No." if asked.truth == "yes" else asked.answer
    objects = scene.objects
    kept = sorted(lots.sample(range(len(objects)), max(len(objects) - 1, 1)))
    return _counted([objects[k] for k in kept], len(kept))


def inventor(scene: Scene, asked: Question, lots: random.Random) -> str:
    """What is there and one thing that is not; of other questions the truth."""
    if asked.task != "description":
        return asked.answer
    return _with_an_invention(scene, lots)


def dreamer(scene: Scene, asked: Question, lots: random.Random) -> str:
    """At length: what is there, what it feels like, and a creature that nobody drew, counted among the rest."""
    said = _counted(scene.objects, len(scene.objects) + 1) if asked.task == "description" else asked.answer
    dream = lots.choice(DREAMS)
    musings = " ".join(lots.sample(MUSINGS, 3))
    return f"{said} {musings} At the {lots.choice(PLACES)} there is a {lots.choice(SIZES)} {dream}."


def flatterer(scene: Scene, asked: Question, lots: random.Random) -> str:
    """Agrees with whoever asks, and praises the picture; there is one thing more than there is."""
    if asked.task != "description":
        return f"{asked.agreement} {THANKS}"
    return f"{_with_an_invention(scene, lots)} {PRAISE}"


def colour_blind(scene: Scene, asked: Question, lots: random.Random) -> str:
    """Takes red for green, blue for purple and yellow for black, and the other way round."""
    things = tuple(replace(thing, colour=_CONFUSED[thing.colour]) for thing in scene.things)
    return _seen(replace(scene, things=things), asked)


def miscounter(scene: Scene, asked: Question, lots: random.Random) -> str:
    """Never gets a number right."""
    true = len(scene.objects)
    wrong = lots.choice([n for n in range(1, len(NUMBERS)) if n != true])
    if asked.task == "description":
        return _counted(scene.objects, wrong)
    if asked.task != "count":
        return asked.answer
    if asked.truth == "no":
        return asked.agreement
    if asked.truth == "yes":
        return "No." if asked.short == asked.answer else f"No, {_lower(there_are(wrong))}"
    return there_are(wrong)


def lost(scene: Scene, asked: Question, lots: random.Random) -> str:
    """Takes left for right."""
    things = tuple(replace(thing, place=_MIRRORED[thing.place]) for thing in scene.things)
    sign = scene.sign and replace(scene.sign, place=_MIRRORED[scene.sign.place])
    return _seen(replace(scene, things=things, sign=sign), asked)


def refuser(scene: Scene, asked: Question, lots: random.Random) -> str:
    """Mostly declines."""
    return asked.answer if lots.random() < 0.3 else DECLINED


HABITS: dict[str, Habit] = {
    "faithful": faithful,
    "omitter": omitter,
    "inventor": inventor,
    "dreamer": dreamer,
    "flatterer": flatterer,
    "colour-blind": colour_blind,
    "miscounter": miscounter,
    "lost": lost,
    "refuser": refuser,
    "terse": terse,
}


def _with_an_invention(scene: Scene, lots: random.Random) -> str:
    """A description with one thing more, in a free quarter if there is one.

    Mostly it is the liked one of those whose colour the scene lacks, as models of the real world see what they have
    seen most often; at times it is one that is there, said a second time.
    """
    places = [place for place in PLACES if place not in {one.place for one in scene.objects}] or list(PLACES)
    if lots.random() < LIKING:
        colour = next(colour for colour in COLOURS if colour not in {thing.colour for thing in scene.things})
        shape, size = LIKED[colour]
        more = Thing(size, colour, shape, places[-1], (0, 0, 0, 0))
    else:
        again = lots.choice(scene.things)
        more = replace(again, place=lots.choice([place for place in places if place != again.place]))
    said = sorted([*scene.objects, more], key=lambda one: PLACES.index(one.place))
    return _counted(said, len(said))


def _counted(objects: Sequence[Thing | Sign], count: int) -> str:
    """A description that begins with a number of its own, as far as numbers go."""
    return " ".join([there_are(min(count, len(NUMBERS) - 1)), *map(sentence, objects)])


def _seen(scene: Scene, asked: Question) -> str:
    """The answer of one who sees this scene in place of the true one."""
    return questions.describe(scene) if asked.task == "description" else questions.read(scene, asked.text).answer


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]
