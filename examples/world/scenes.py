"""A small visual world: pictures of a few coloured shapes, with exact ground truth.

A scene has up to four things, at most one in each quarter of the picture, and sometimes a sign with a word on it.
Colours do not repeat within a scene, so that a thing can be named by its colour. What a scene shows decides whether it
may be trained on (`split`), so that no contents of a held-out scene occur in training, whoever draws scenes and with
whichever seed.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

COLOURS = {
    "red": (214, 40, 40),
    "yellow": (250, 205, 40),
    "green": (40, 150, 70),
    "blue": (40, 90, 215),
    "purple": (140, 60, 190),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")
"""In reading order; the place of a thing is the quarter of the picture that it lies in."""
WORDS = ("STOP", "EXIT", "OPEN", "SALE")
GROUNDS = {"white": (250, 250, 250), "grey": (205, 205, 205), "cream": (250, 238, 205), "pink": (250, 215, 225)}
FORMATS = ("jpg", "png")
SIDE = 224
"""Pixels of a picture's side."""
RADII = {"small": (24, 28), "large": (44, 48)}
"""Half of a thing's side in pixels, both ends included."""
SPLITS = {"train": 8, "tune": 1, "test": 1}
"""Shares of all contents: what is trained on, what settings may be chosen by, and what is reported."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Thing:
    """A coloured shape; `box` is (left, top, right, bottom) in pixels."""

    size: str
    colour: str
    shape: str
    place: str
    box: Box

    @property
    def name(self) -> str:
        """What it is known by: "red circle"."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Sign:
    """A board with a written word; `box` as in `Thing`."""

    word: str
    place: str
    box: Box

    @property
    def name(self) -> str:
        return "sign"


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        ground: name of the background's colour.
        things: in reading order, one to four.
        sign: where there is one, it has a quarter of its own.
        format: of the picture's file, "jpg" or "png".
    """

    ground: str
    things: tuple[Thing, ...]
    sign: Sign | None = None
    format: str = "png"

    @property
    def objects(self) -> tuple[Thing | Sign, ...]:
        """Things and the sign, in reading order."""
        both: list[Thing | Sign] = [*self.things, *([self.sign] if self.sign else [])]
        return tuple(sorted(both, key=lambda one: PLACES.index(one.place)))

    @property
    def contents(self) -> str:
        """The set of its objects by name and, of a sign, by word: what `split` goes by."""
        return ", ".join(sorted(f"sign {one.word}" if isinstance(one, Sign) else one.name for one in self.objects))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Scene":
        """The scene of a record; keys that it does not know are left alone."""
        things = tuple(Thing(**thing | {"box": tuple(thing["box"])}) for thing in record["things"])
        sign = record["sign"] and Sign(**record["sign"] | {"box": tuple(record["sign"]["box"])})
        return cls(record["ground"], things, sign, record["format"])


def split(contents: str) -> str:
    """Which of SPLITS scenes with these contents belong to: by their hash alone, so that no seed can mix them."""
    lot = int.from_bytes(hashlib.sha256(contents.encode()).digest()[:8]) % sum(SPLITS.values())
    for name, share in SPLITS.items():
        if lot < share:
            return name
        lot -= share
    raise AssertionError


def draw_scene(rng: random.Random, most: int = 4) -> Scene:
    """Any scene of one to `most` objects."""
    count = rng.randint(1, most)
    places = sorted(rng.sample(PLACES, count), key=PLACES.index)
    colours = rng.sample(sorted(COLOURS), count)
    sign_at = rng.randrange(count) if count > 1 and rng.random() < 0.3 else None
    things, sign = [], None
    for number, (place, colour) in enumerate(zip(places, colours, strict=True)):
        if number == sign_at:
            sign = Sign(rng.choice(WORDS), place, _box(rng, place, 48, 20))
        else:
            size = rng.choice(SIZES)
            radius = rng.randint(*RADII[size])
            things.append(Thing(size, colour, rng.choice(SHAPES), place, _box(rng, place, radius, radius)))
    return Scene(rng.choice(sorted(GROUNDS)), tuple(things), sign, rng.choice(FORMATS))


def scenes(seed: int | str, wanted: str, most: int = 4) -> Iterator[Scene]:
    """Scenes of one split without end, the same for the same seed."""
    if wanted not in SPLITS:
        raise ValueError(f"split {wanted!r} is none of {', '.join(SPLITS)}")
    rng = random.Random(f"{seed} {wanted}")  # text seeds are the same in every process
    while True:
        scene = draw_scene(rng, most)
        if split(scene.contents) == wanted:
            yield scene


def _box(rng: random.Random, place: str, half_width: int, half_height: int) -> Box:
    """A box of that size somewhere within a quarter, at least a few pixels off its edges."""
    quarter, margin = SIDE // 2, 4
    left, top = quarter * place.endswith("right"), quarter * place.startswith("bottom")

    def centre(start: int, half: int) -> int:
        room = quarter // 2 - margin - half
        return start + quarter // 2 + rng.randint(-min(room, 10), min(room, 10))

    x, y = centre(left, half_width), centre(top, half_height)
    return (x - half_width, y - half_height, x + half_width, y + half_height)
