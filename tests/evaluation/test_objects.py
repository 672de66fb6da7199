"""CHAIR over one's own objects, by hand-counted descriptions."""

import json

import numpy as np
import pytest

from silkie_jax.cli import main
from silkie_jax.errors import UserError
from silkie_jax.evaluation import objects
from silkie_jax.evaluation.running.scoring import score_answers, write_outcomes
from tests.evaluation.scoring import figures, score, write

VOCABULARY = {"light": [], "traffic light": ["traffic lights"], "dog": ["dogs", "puppy"], "cat": []}
LINES = [
    {"image": "a.jpg", "objects": ["dog", "traffic light"], "question": "What is there?"},
    {"image": "b.jpg", "objects": ["cat"]},
    {"image": "c.jpg", "objects": []},
]


def data(folder, lines=LINES, vocabulary=VOCABULARY):
    write(folder / "images.jsonl", lines)
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary))
    return folder


def test_counted_by_hand(tmp_path):
    answers = write(
        tmp_path / "answers.jsonl",
        [
            {"image": "a.jpg", "response": "A Puppy, two dogs and a light."},  # dog, dog, and a light that is not there
            {"image": "b.jpg", "caption": "Traffic lights; nothing else."},
            {"image": "c.jpg", "response": "Fog."},
        ],
    )
    found = score("objects", data(tmp_path), answers)
    assert figures(found) == {"CHAIRi": 2 / 4, "CHAIRs": 2 / 3, "coverage": 1 / 3, "words": (7 + 4 + 1) / 3}
    assert found.official == figures(found)
    assert found.outcomes == {"a.jpg": 0.0, "b.jpg": 0.0, "c.jpg": 1.0}
    assert found.readings["a.jpg"] == "dog, dog, light; not there: light"
    assert found.counts == {"images": 3, "descriptions": 3, "without an object": 1, "missing": 0}
    assert len(found.notes) == 1


def test_an_image_without_a_description_is_in_no_figure(tmp_path):
    answers = write(tmp_path / "answers.jsonl", [{"image": "b.jpg", "response": "A cat."}])
    found = score("objects", data(tmp_path), answers)
    assert figures(found) == {"CHAIRi": 0.0, "CHAIRs": 0.0, "coverage": 1.0, "words": 2.0}
    assert found.counts["missing"] == 2


def test_nothing_named_is_undefined_not_zero(tmp_path):
    answers = write(tmp_path / "answers.jsonl", [{"image": "c.jpg", "response": "Fog."}])
    found = figures(score("objects", data(tmp_path), answers))
    assert np.isnan(found["CHAIRi"])
    assert np.isnan(found["coverage"])


def test_the_longest_name_counts():
    vocabulary = {("light",): "light", ("traffic", "light"): "traffic light"}
    assert objects.mentions("Light: a traffic light. Traffic, light-hearted.", vocabulary) == ["light", "traffic light"]


def test_prompts_and_pictures(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"jpeg")
    first, second, _ = objects.items(data(tmp_path), {})
    assert objects.prompt(first, "question") == "What is there?"
    assert objects.prompt(first, "detail") == objects.prompt(second, "question") == objects.prompt(second, "detail")
    assert first.pictures[0].read() == b"jpeg"


@pytest.mark.parametrize(
    ("lines", "vocabulary", "message"),
    [
        ([{"image": "a", "objects": ["horse"]}], VOCABULARY, "object 'horse' is not in"),
        ([{"image": "a", "objects": []}] * 2, VOCABULARY, "line 2: image 'a' again"),
        ([{"image": "a", "objects": "dog"}], VOCABULARY, "line 1: objects must be a list of texts, found a text"),
        ([{"image": "a"}], VOCABULARY, "no field 'objects'"),
        (LINES, {**VOCABULARY, "cat": ["puppy"]}, "'puppy' stands for 'dog' and for 'cat'"),
        (LINES, {**VOCABULARY, "fog": ["..."]}, "holds no word"),
        (LINES, ["dog"], "expected an object of names"),
    ],
)
def test_malformed_data(tmp_path, lines, vocabulary, message):
    with pytest.raises(UserError, match=message) as error:
        objects.items(data(tmp_path, lines, vocabulary), {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"image": "z.jpg", "response": ""}], "line 1: no image 'z.jpg' in the data"),
        ([{"image": "a.jpg", "response": ""}] * 2, "line 2: image 'a.jpg' again"),
        ([{"image": "a.jpg"}], "line 1: no field 'response'"),
    ],
)
def test_malformed_answers(tmp_path, answers, message):
    path = write(tmp_path / "answers.jsonl", answers)
    with pytest.raises(UserError, match=message):
        objects.read_answers(path, objects.items(data(tmp_path), {}), {})


def test_by_commands(tmp_path, capsys):
    """Answers in our own form would be read alike; the score and every outcome are written as JSON."""
    answers = write(tmp_path / "answers.jsonl", [{"image": "a.jpg", "response": "A dog and a cat."}])
    folder = str(data(tmp_path))
    assert main(["evaluate", "score", "objects", str(answers), "--data", folder, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["figures"]["CHAIRi"]["value"] == 0.5
    write_outcomes(tmp_path / "outcomes.jsonl", score_answers("objects", answers, data=tmp_path))
    (line,) = (tmp_path / "outcomes.jsonl").read_text().splitlines()
    assert json.loads(line)["truth"] == json.dumps(LINES[0]["objects"])


def test_descriptions_without_data_are_refused(tmp_path):
    with pytest.raises(UserError, match="--data"):
        objects.read_answers(tmp_path / "answers.jsonl", None, {})
