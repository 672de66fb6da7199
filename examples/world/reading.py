"""What a text says about a picture of the world: read into claims, which can be held against the truth."""

import re
from dataclasses import dataclass

from examples.world.questions import NUMBERS
from examples.world.scenes import COLOURS, SHAPES, SIZES, WORDS, Scene, Sign, Thing

DREAMS = ("cat", "dog", "tree", "house", "boat")
"""What no picture shows, though some models speak of it."""


def _any(names: tuple[str, ...]) -> str:
    return "|".join(names)


_THING = re.compile(
    rf"\b(?:(?P<size>{_any(SIZES)}) )?(?:(?P<colour>{_any(tuple(COLOURS))}) )?"
    rf"(?:(?P<shape>{_any(SHAPES)})|(?P<dream>{_any(DREAMS)})|(?P<object>object|thing)|"
    rf"(?P<sign>sign)(?: that says (?P<word>{_any(WORDS)}))?)\b",
    re.IGNORECASE,
)
_PLACE = re.compile(r"\b(top|bottom) (left|right)\b", re.IGNORECASE)
_COUNT = re.compile(rf"\bthere (?:is|are) ({_any(NUMBERS)}) objects?\b", re.IGNORECASE)
_VERDICT = re.compile(r"^\s*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Claim:
    """One thing that a text says is there; "" for what it leaves open. A dream has its name as its shape."""

    colour: str = ""
    shape: str = ""
    size: str = ""
    place: str = ""
    word: str = ""


@dataclass(frozen=True)
class Reading:
    """What a text says.

    Attributes:
        verdict: "yes" or "no" where it begins with that, else "".
        claims: things that it says are there, in order; those in sentences that deny something are left out.
        count: how many objects it says there are; None where it does not say.
        words: its length.
    """

    verdict: str
    claims: tuple[Claim, ...]
    count: int | None
    words: int


def read(text: str) -> Reading:
    """Reads a text sentence by sentence; a thing's place is the one that its sentence names nearest to it."""
    verdict = _VERDICT.match(text)
    counted = _COUNT.search(text)
    claims = [claim for part in re.split(r"[.!?]", text) for claim in _claims(part)]
    return Reading(
        verdict[1].lower() if verdict else "",
        tuple(claims),
        NUMBERS.index(counted[1].lower()) if counted else None,
        len(text.split()),
    )


def _claims(sentence: str) -> list[Claim]:
    if re.search(r"\b(?:no|not)\b", _VERDICT.sub("", sentence), re.IGNORECASE):
        return []
    places = list(_PLACE.finditer(sentence))
    found = []
    for match in _THING.finditer(sentence):
        said = {name: (value or "").lower() for name, value in match.groupdict().items()}
        if not (said["colour"] or said["shape"] or said["dream"] or said["sign"]):
            continue
        near = min(places, key=lambda place: abs(place.start() - match.start()), default=None)
        found.append(
            Claim(
                said["colour"],
                said["shape"] or said["dream"] or said["sign"],
                said["size"],
                near[0].lower() if near else "",
                said["word"].upper(),
            )
        )
    return found


@dataclass(frozen=True)
class Comparison:
    """A text against the truth.

    Attributes:
        found: objects of the scene that it names, by colour or shape; a sign by being one.
        told: what it tells of them, an object with shape, size and place being 1, one of which only the colour is
            said 0.4.
        invented: claims of what is not there, dreams and things said to be in a second place included.
        mistaken: details of found objects that are wrong: shape, size, place or word.
        miscounted: whether it says another number of objects than there are.
    """

    found: int
    told: float
    invented: int
    mistaken: int
    miscounted: bool


def compare(reading: Reading, scene: Scene) -> Comparison:
    """Holds a reading against the scene. Colours do not repeat in a scene, so a claim's colour says what is meant."""
    told: dict[str, float] = {}
    places: dict[str, str] = {}  # of what was said before, where it was said to be
    invented = mistaken = 0
    for claim in dict.fromkeys(reading.claims):
        meant = _meant(claim, scene)
        before = places.get(meant.place, "") if meant else ""
        if meant is None or (before and claim.place and claim.place != before):
            invented += 1
            continue
        places[meant.place] = claim.place or before
        true = (
            {"word": meant.word, "place": meant.place}
            if isinstance(meant, Sign)
            else {"shape": meant.shape, "size": meant.size, "place": meant.place}
        )
        said = {name: getattr(claim, name) for name in true}
        mistaken += sum(value not in ("", true[name]) for name, value in said.items())
        share = 0.4 + 0.6 * sum(map(bool, said.values())) / len(true)
        told[meant.place] = max(share, told.get(meant.place, 0.0))
    miscounted = reading.count not in (None, len(scene.objects))
    return Comparison(len(told), sum(told.values()), invented, mistaken, miscounted)


def _meant(claim: Claim, scene: Scene) -> Thing | Sign | None:
    if claim.shape == "sign":
        return scene.sign
    if claim.shape in DREAMS:
        return None
    alike = [
        thing
        for thing in scene.things
        if claim.colour in ("", thing.colour) and (claim.colour or claim.shape == thing.shape)
    ]
    # Without a colour several may be meant: the one that stands where it is said to.
    return next((thing for thing in alike if thing.place == claim.place), alike[0] if alike else None)
