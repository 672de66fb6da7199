"""Finding what was seen before: prompts by their normalised text, images by their look."""

import math
import re
import unicodedata
from array import array

import numpy as np
from PIL import Image

from data_prep.tables.images import opened

BITS = 3
"""Of 64, in which the hashes of near duplicates may differ: four parts of 16 bits then have one in common."""
LEVELS = 6.0
"""Of 255, by which their thumbnails may differ in the mean. Hashes alone take all plain images for one."""
_PARTS = 4
_SIDE = 8  # of the thumbnail


def normal_prompt(prompt: str) -> str:
    """A prompt by its letters and digits alone: case, accents' encoding, spaces and punctuation do not count."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt).casefold())
    return " ".join(words) or prompt.strip()  # "?!" is a prompt, too


def look(data: bytes) -> tuple[int, np.ndarray]:
    """How a checked image file looks: a 64-bit difference hash, and a thumbnail of float32 [8, 8, 3].

    The hash says of each of 8 x 8 places whether it is brighter than its right neighbour, which survives other sizes
    and encodings (Neal Krawetz's dHash).
    """
    with opened(data, max_pixels=math.inf) as image:
        image.draft("RGB", (64, 64))
        small = image.convert("RGB").resize((9 * 4, 8 * 4), Image.Resampling.BOX, reducing_gap=2.0)
    grey = np.asarray(small.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = (grey[:, 1:] > grey[:, :-1]).reshape(-1)
    thumbnail = np.asarray(small.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32)
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), thumbnail


class Looks:
    """Images seen so far, by their look. A lookup touches only those that share 16 bits of the hash."""

    def __init__(self) -> None:
        self._count = 0
        self._hashes = np.zeros(1024, np.uint64)
        self._thumbnails = np.zeros((1024, _SIDE * _SIDE * 3), np.uint8)
        self._buckets: list[dict[int, array]] = [{} for _ in range(_PARTS)]

    def number(self, hash: int, thumbnail: np.ndarray) -> tuple[int, bool]:
        """The number of the image seen before that looks like this one, and True; or a new number, and False."""
        flat = thumbnail.reshape(-1)
        for part, bucket in enumerate(self._buckets):
            members = bucket.get(_part(hash, part))
            if members is None:
                continue
            numbers = np.array(members, np.uint32)
            differing = np.bitwise_count(self._hashes[numbers] ^ np.uint64(hash))
            near = numbers[differing <= BITS]
            if len(near):
                distance = np.abs(self._thumbnails[near] - flat).mean(axis=1)
                best = int(distance.argmin())
                if distance[best] <= LEVELS:
                    return int(near[best]), True
        return self._add(hash, flat), False

    def _add(self, hash: int, flat: np.ndarray) -> int:
        number = self._count
        if number == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
            self._thumbnails = np.concatenate([self._thumbnails, np.zeros_like(self._thumbnails)])
        self._hashes[number] = hash
        self._thumbnails[number] = np.clip(np.rint(flat), 0, 255)
        for part, bucket in enumerate(self._buckets):
            bucket.setdefault(_part(hash, part), array("I")).append(number)
        self._count += 1
        return number


def _part(hash: int, part: int) -> int:
    return hash >> (16 * part) & 0xFFFF
