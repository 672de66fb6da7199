"""Scenes: the same from the same seed, true to their pixels, and never on both sides of the split."""

import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from examples.world import scenes as world
from examples.world.drawing import draw, encode
from examples.world.scenes import COLOURS, GROUNDS, PLACES, SIDE, SPLITS, Scene, scenes, split


def some(wanted="train", count=150, seed=0, most=4):
    return list(itertools.islice(scenes(seed, wanted, most), count))


def test_the_same_seed_gives_the_same_scenes():
    assert some(count=30) == some(count=30)
    assert some(count=30) != some(count=30, seed=1)


def test_what_is_promised():
    found = some()
    assert {len(scene.objects) for scene in found} == {1, 2, 3, 4}
    assert {scene.format for scene in found} == {"jpg", "png"}
    assert {scene.ground for scene in found} == set(GROUNDS)
    assert any(scene.sign for scene in found)
    for scene in found:
        colours = [thing.colour for thing in scene.things]
        places = [one.place for one in scene.objects]
        assert len(set(colours)) == len(colours)
        assert places == sorted(set(places), key=PLACES.index)
        assert scene.things


def test_contents_are_on_one_side_of_the_split_whatever_the_seed():
    contents = {name: {s.contents for seed in (0, 1) for s in some(name, 400, seed)} for name in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not contents[one] & contents[other]
    assert {split(text) for text in contents["test"]} == {"test"}


def test_no_such_split():
    with pytest.raises(ValueError, match="'all' is none of train, tune, test"):
        next(scenes(0, "all"))


def test_plain_json_and_back():
    for scene in some(count=20):
        record = {"image": "x.png", **json.loads(json.dumps(scene.to_json()))}
        assert Scene.from_json(record) == scene


def test_the_truth_agrees_with_the_pixels():
    """A thing's colour fills its box as its shape says, its box is where its place says, and all else is ground."""
    filled = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 5 / 9}
    for scene in some(count=60):
        pixels = np.asarray(draw(scene)).astype(int)
        ground = np.array(GROUNDS[scene.ground])
        free = np.ones((SIDE, SIDE), bool)
        for one in scene.objects:
            left, top, right, bottom = one.box
            assert (
                one.place == f"{'top' if bottom <= SIDE // 2 else 'bottom'} {'left' if right <= SIDE // 2 else 'right'}"
            )
            free[top : bottom + 1, left : right + 1] = False
        assert (pixels[free] == ground).all()
        for thing in scene.things:
            left, top, right, bottom = thing.box
            inside = pixels[top:bottom, left:right]
            share = (np.abs(inside - COLOURS[thing.colour]).sum(-1) < 20).mean()
            assert share == pytest.approx(filled[thing.shape], abs=0.06), thing
            low, high = world.RADII[thing.size]
            assert low <= (right - left) / 2 <= high


def test_files_are_what_their_names_say_and_show_what_was_drawn():
    for scene in some(count=20):
        with Image.open(io.BytesIO(encode(scene))) as image:
            assert image.format == {"jpg": "JPEG", "png": "PNG"}[scene.format]
            found = np.asarray(image.convert("RGB")).astype(int)
        difference = np.abs(found - np.asarray(draw(scene)).astype(int))
        assert difference.mean() < (3 if scene.format == "jpg" else 1e-9)
        assert encode(scene) == encode(scene)


def test_words_can_be_read():
    """Signs of different words are different pictures."""
    sign = next(scene for scene in some() if scene.sign)
    boxes = []
    for word in world.WORDS:
        changed = Scene.from_json({**sign.to_json(), "sign": {**sign.to_json()["sign"], "word": word}})
        boxes.append(np.asarray(draw(changed)).astype(int))
    for one, other in itertools.combinations(boxes, 2):
        assert np.abs(one - other).max() > 100
