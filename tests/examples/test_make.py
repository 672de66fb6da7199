"""The folder of the world: the same from the same arguments, and its evaluation data read by `silkie evaluate`."""

import json
from collections import Counter

import pytest

from examples.world.make import MME_TASKS, make_world
from examples.world.pool import read_truth
from examples.world.questions import YES_NO_TASKS, read
from examples.world.scenes import Scene, split
from silkie_jax.evaluation import mme, objects, pope

TASKS = {"tasks": ",".join(MME_TASKS)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("worlds") / "world", 80, seed=3, held_out=40, each=2)


def lines(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def held_out(world):
    return {line["image"]: Scene.from_json(line) for line in lines(world / "evaluation" / "scenes.jsonl")}


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    first = contents(make_world(tmp_path / "a", 12, seed=1, held_out=6))
    assert first == contents(make_world(tmp_path / "b", 12, seed=1, held_out=6))
    assert first != contents(make_world(tmp_path / "b", 12, seed=2, held_out=6))  # made anew where it was made before


def test_what_somebody_else_put_there_stays(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="was not made by this program"):
        make_world(tmp_path, 1)
    with pytest.raises(ValueError, match="'train'"):
        make_world(tmp_path / "other", 1, split="train")


def test_instructions(world):
    asked = lines(world / "instructions.jsonl")
    shown = {line["image"]: Scene.from_json(line) for line in lines(world / "scenes.jsonl")}
    assert len(asked) == 160
    assert len({(line["image"], line["prompt"]) for line in asked}) == 160
    read_ones = [read(shown[line["image"].removeprefix("images/")], line["prompt"]) for line in asked]
    tasks = Counter(one.task for one in read_ones)
    assert 0.45 < tasks["description"] / 160 < 0.75
    assert len(tasks) >= 6
    truths = Counter((one.task, one.truth) for one in read_ones)
    # Of each task as many to be affirmed as denied, but for one, and for repetitions that were drawn again.
    assert all(abs(truths[task, "yes"] - truths[task, "no"]) <= 2 for task in YES_NO_TASKS)
    assert all((world / line["image"]).is_file() for line in asked)


def test_held_out_contents_are_in_no_instruction(world):
    trained = {Scene.from_json(line).contents for line in lines(world / "scenes.jsonl")}
    assert {split(text) for text in trained} == {"train"}
    assert {split(scene.contents) for scene in held_out(world).values()} == {"test"}
    assert len(read_truth(world)) == len(set(read_truth(world))) >= 80


def test_pope_is_read_and_true(world):
    scenes = held_out(world)
    items = pope.items(world / "evaluation" / "pope", {})
    answers = Counter((item.part, item.truth) for item in items)
    assert {part for part, _ in answers} == set(pope.SPLITS)
    for part in pope.SPLITS:
        assert answers[part, "yes"] == answers[part, "no"] > 40
    for item in items:
        assert item.pictures[0].read()
        assert read(scenes[item.pictures[0].name], item.question).truth == item.truth
    there = {(item.part, item.pictures[0].name): set() for item in items}
    for item in items:
        if item.truth == "no":
            there[item.part, item.pictures[0].name].add(item.question)
    assert any(there["random", name] != there["adversarial", name] for name in scenes)


def test_the_adversarial_split_asks_for_what_is_almost_there(world):
    scenes = held_out(world)
    for item in pope.items(world / "evaluation" / "pope", {}):
        if item.part == "adversarial" and item.truth == "no":
            words = {word for thing in scenes[item.pictures[0].name].things for word in (thing.colour, thing.shape)}
            assert words & set(item.question.split())


def test_mme_is_read_and_true(world):
    scenes = held_out(world)
    items = mme.items(world / "evaluation" / "mme", TASKS)
    assert {item.part for item in items} == set(MME_TASKS)
    for first, second in zip(items[::2], items[1::2], strict=True):
        assert first.cluster == second.cluster
        assert {first.truth, second.truth} == {"yes", "no"}
    for item in items:
        asked = read(scenes[item.cluster.split("/")[1]], item.question)
        assert (asked.truth, asked.task) == (item.truth, item.part)
        assert item.pictures[0].read()


def test_descriptions_are_read_and_true(world):
    scenes = held_out(world)
    items = objects.items(world / "evaluation" / "objects", {})
    assert len(items) == 40
    for item in items:
        assert set(item.truth) == {one.name for one in scenes[item.id].objects}
        found = objects.verdict(item, read(scenes[item.id], objects.prompt(item, "question")).answer)
        assert not found.wrong
        assert found.told == set(item.truth)
        assert item.pictures[0].read()
