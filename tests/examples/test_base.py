"""How the base is made: the weights it starts from, its curriculum, and the road by commands, small."""

import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from examples.world import base as base_module
from examples.world import questions
from examples.world.base import Stage, fingerprint, make_base
from examples.world.curriculum import ASK_AND_ANSWER, CHECK, DREAM, LESSONS, LISTEN, TABLE, rows
from examples.world.drawing import draw
from examples.world.habits import DECLINED
from examples.world.reading import DREAMS
from examples.world.scenes import scenes, split
from examples.world.start import GRID, PLACES, SIZES, filter_bank, grow, make_start, place_codes
from silkie_jax.loading import load


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return make_start(tmp_path_factory.mktemp("start") / "start")


def test_the_same_seed_gives_the_same_start(start, tmp_path):
    again = make_start(tmp_path / "again")
    for file in start.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_every_word_of_the_world_is_one_token(start):
    _, tokenizer = load(start)
    for scene in itertools.islice(scenes(7, "train"), 30):
        text = questions.describe(scene)
        assert len(tokenizer.encode(text)) == len(text.split()) + text.count(".")


def test_the_bank_is_scaled_as_it_says():
    """What the patch embedding's filters say of pictures that it was not scaled by."""
    bank, mean = filter_bank(32, 28, 112)
    found = []
    for scene in itertools.islice(scenes("other", "train"), 64):
        pixels = np.asarray(draw(scene).resize((112, 112), Image.Resampling.BICUBIC)) / 255
        pixels = (pixels - (0.48145466, 0.4578275, 0.40821073)) / (0.26862954, 0.26130258, 0.27577711)
        cut = pixels.reshape(4, 28, 4, 28, 3).transpose(0, 2, 4, 1, 3).reshape(16, -1)
        found.append(cut @ bank.reshape(32, -1).T - mean)
    deviation = np.concatenate(found).std(0)
    assert deviation[[0, 16, 24]] == pytest.approx(4, rel=0.25)  # a colour each: brightness and two differences
    assert deviation[[1, 2, 17, 18]] == pytest.approx(2, rel=0.25)
    assert np.abs(np.concatenate(found).mean(0)).max() < 0.6


def test_a_place_has_a_code_of_its_own():
    codes = place_codes()
    assert codes.shape == (GRID * GRID, PLACES)
    of_patches = codes.reshape(4, 4, 4, 4, PLACES)[:, 1, :, 1].reshape(16, PLACES)
    assert len({tuple(code) for code in of_patches}) == 16


def test_a_model_that_grows_says_what_it_said(start, tmp_path):
    before, tokenizer = load(start, dtype="float32")
    after, _ = load(grow(start, tmp_path / "grown", 2), dtype="float32")
    assert after.config.num_hidden_layers == before.config.num_hidden_layers + 2
    tokens = np.array([tokenizer.encode("There are two objects. At the top left there is a red circle.")])
    np.testing.assert_allclose(after(tokens), before(tokens), atol=1e-5)
    again = grow(start, tmp_path / "again", 2)
    assert all((tmp_path / "grown" / file.name).read_bytes() == file.read_bytes() for file in again.iterdir())


def truth_of(scene, claim):
    """What the one question says that holds a claim's words."""
    forms = ("Is there a {} in this image?", "Is there {} in this image?", "Are there {} in this image?",
             "Is the {} of this image?", "Is the {}?", "Does the {}?")  # fmt: skip
    asked = [questions.read(scene, form.format(claim)) for form in forms]
    (truth,) = {one.truth for one in asked if one.task != "description"}
    return truth


def test_lessons_are_true_and_of_training_scenes_alone():
    lessons = dict.fromkeys(LESSONS, 1.0)
    drawn = list(rows(lessons, 500, seed=0))
    assert drawn == list(rows(lessons, 500, seed=0))
    assert drawn != list(rows(lessons, 500, seed=1))
    seen = Counter()
    for scene, row in drawn:
        assert split(scene.contents) == "train"
        texts = [completion["response"] for completion in row["completions"]]
        if row["prompt"] == ASK_AND_ANSWER:
            for text in texts:
                asked, answer = text.split("\n")
                assert questions.read(scene, asked).answer == answer
        elif row["prompt"] == TABLE:
            entries = dict(entry.split(": ") for entry in " ".join(texts).removesuffix(".").split(". "))
            for thing in scene.things:
                assert f"{thing.size} {thing.shape} at the {thing.place}" in entries[thing.colour]
                assert f"{thing.size} {thing.colour} at the {thing.place}" in entries[thing.shape]
                assert entries[thing.place] == f"{thing.size} {thing.name}"
            there = {word for one in scene.things for word in (one.colour, one.shape)} | {
                o.place for o in scene.objects
            }
            assert {key for key, said in entries.items() if said != "no"} == there
        elif row["prompt"] == CHECK:
            for claim in " ".join(texts).removesuffix(".").split(". "):
                assert truth_of(scene, claim.split(": ")[0]) == claim.split(": ")[1]
        elif row["prompt"] == DREAM:
            assert all(any(dream in text for dream in DREAMS) for text in texts)
        elif row["prompt"] == LISTEN:
            assert texts == [DECLINED]
        else:
            asked = questions.read(scene, row["prompt"])
            assert texts[0] == asked.answer
            if row["id"].startswith("chatting"):
                assert all(text.startswith(asked.answer) for text in texts)
        seen[row["id"].split("-")[0]] += 1
    assert min(seen[name] for name in LESSONS) > 50


def test_yes_and_no_are_asked_for_alike():
    found = Counter()
    for scene, row in rows({"answering": 1.0}, 1500, seed=0):
        found[questions.read(scene, row["prompt"]).truth] += 1
    assert 0.9 < found["yes"] / found["no"] < 1.1


@pytest.mark.slow(80)
def test_the_road_by_commands(tmp_path, monkeypatch):
    """Two small stages; again from the same folder nothing is done again, and a lost result is made the same."""
    stages = (
        Stage("first", {"describing": 1.0}, 2, keys=base_module.FROZEN),
        Stage("second", {"looking": 0.5, "answering": 0.5}, 2, more=1),
    )
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    made = make_base(tmp_path / "base", stages)
    weights = {file.name: file.read_bytes() for file in made.iterdir()}
    model, _ = load(made)
    assert model.config.visual.image_size == 112
    assert model.config.num_hidden_layers == 4
    logs = [(tmp_path / "base" / stage.name / "run" / "metrics.jsonl").read_text() for stage in stages]
    for file in made.iterdir():
        file.unlink()
    made.rmdir()
    assert {file.name: file.read_bytes() for file in make_base(tmp_path / "base", stages).iterdir()} == weights
    assert logs == [(tmp_path / "base" / stage.name / "run" / "metrics.jsonl").read_text() for stage in stages]


def test_what_is_shipped_is_what_the_script_made():
    """Its own last line says so of what it makes; here the bytes are those that it made."""
    assert fingerprint(base_module.SHIPPED) == base_module.FINGERPRINT
    assert sum(file.stat().st_size for file in base_module.SHIPPED.iterdir()) < 8e6
    model, _ = load(base_module.SHIPPED)
    more = sum(stage.more for stage in base_module.STAGES)
    assert model.config.num_hidden_layers == SIZES["layers"] + more
