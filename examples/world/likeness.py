"""How much a text looks like a picture, in the place of CLIP: a number that knows the truth, with noise.

Like CLIP it sees which things are there far better than where they are, how large, or how many: what a text invents
counts most, a wrong detail little. Numbers lie where CLIP's do, 100 times the cosine being 15 to 30 for most texts.
"""

import random

from examples.world.reading import compare, read
from examples.world.scenes import Scene

NEUTRAL, SPAN, DETAIL, NOISE = 21.0, 5.0, 0.7, 1.5


def likeness(scene: Scene, text: str, lots: random.Random) -> float:
    """100 times the cosine that the features of picture and text might have.

    Args:
        scene: what the picture shows.
        text: a sentence, or more.
        lots: what noise is drawn from.
    """
    found = compare(read(text), scene)
    named = found.found + found.invented
    true = (found.found - found.invented) / named if named else 0.0
    return NEUTRAL + SPAN * true - DETAIL * found.mistaken + lots.gauss(0.0, NOISE)
