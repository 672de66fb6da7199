"""Questions and what is read out of texts: truths that agree with the scenes."""

import itertools
import random

import pytest

from examples.world import questions, reading
from examples.world.questions import YES_NO, YES_NO_TASKS
from examples.world.scenes import Scene, Sign, Thing, scenes

SCENE = Scene(
    "white",
    (
        Thing("large", "red", "circle", "top left", (8, 8, 100, 100)),
        Thing("small", "blue", "cross", "bottom left", (30, 140, 80, 190)),
    ),
    Sign("STOP", "top right", (120, 40, 216, 80)),
)


@pytest.mark.parametrize(
    ("text", "answer", "truth"),
    [
        ("Is there a red circle in the image?", "Yes, there is a red circle.", "yes"),
        ("Is there a red cross in this picture?", "No, there is no red cross.", "no"),
        ("Is there a blue object in this image?", "Yes, there is a blue object.", "yes"),
        ("Is there a square in this image?", "No, there is no square.", "no"),
        ("Are there three objects in this image?", "Yes, there are three objects.", "yes"),
        ("Is there one object in this image?", "No, there are three objects.", "no"),
        ("Is the blue cross at the top left of this image?", "No, the blue cross is at the bottom left.", "no"),
        ("Is the green cross at the top left of this image?", "No, there is no green cross.", "no"),
        ("Is the circle at the top left red?", "Yes, it is red.", "yes"),
        ("Is the circle at the top right red?", "No, there is no circle.", "no"),
        ("Is the blue object a square?", "No, it is a cross.", "no"),
        ("Does the sign say STOP?", "Yes, it says STOP.", "yes"),
        ("Does the sign say OPEN? Please answer yes or no.", "No.", "no"),
        ("Where is the blue cross?", "It is at the bottom left.", None),
        ("Where is the blue circle?", "There is no blue circle.", None),
        ("What colour is the cross at the bottom left?", "It is blue.", None),
        ("What shape is the red object?", "It is a circle.", None),
        ("How many objects are there?", "There are three objects.", None),
        ("How many crosses are there?", "There is one cross.", None),
        ("How many squares are there?", "There are no squares.", None),
        ("What does the sign say?", "It says STOP.", None),
        ("Which is larger, the blue cross or the red circle?", "The red circle is larger.", None),
        (
            "Tell me all about it!",
            "There are three objects. At the top left there is a large red circle. At the top right there is a sign "
            "that says STOP. At the bottom left there is a small blue cross.",
            None,
        ),
    ],
)
def test_the_true_answer(text, answer, truth):
    asked = questions.read(SCENE, text)
    assert (asked.answer, asked.truth) == (answer, truth)


def test_drawn_questions_have_the_wanted_answer():
    rng, seen = random.Random(0), set()
    for scene in itertools.islice(scenes(0, "train"), 200):
        for task in questions.tasks_of(scene):
            for wanted, truth in ((True, "yes"), (False, "no")):
                asked = questions.yes_no(scene, rng, task, wanted)
                assert (asked.task, asked.truth) == (task, truth)
                assert reading.read(asked.answer).verdict == truth
                assert reading.read(asked.agreement).verdict == "yes"
                assert questions.read(scene, asked.text + YES_NO).answer == asked.short
                seen.add(task)
        asked = questions.open_question(scene, rng)
        assert asked.task != "description"
        assert asked.truth is None
        assert " no " not in asked.answer or asked.task in ("count", "position")
    assert seen == set(YES_NO_TASKS)


def test_a_task_that_cannot_be_asked():
    with pytest.raises(ValueError, match="'OCR'"):
        questions.yes_no(Scene("white", SCENE.things), random.Random(0), "OCR", True)


def test_a_true_description_holds_everything_and_nothing_else():
    for scene in itertools.islice(scenes(0, "train"), 200):
        found = reading.compare(reading.read(questions.describe(scene)), scene)
        assert found == reading.Comparison(len(scene.objects), len(scene.objects), 0, 0, False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("There are two objects. At the top left there is a large red square.", (1, 1.0, 0, 1, True)),  # the shape
        ("There is a red circle and a sign and a green cross.", (2, 1.0, 1, 0, False)),  # 0.6 and 0.4 of two
        ("At the top right there is a sign that says EXIT.", (1, 1.0, 0, 1, False)),  # the word
        ("At the bottom right there is a small dog.", (0, 0.0, 1, 0, False)),
        ("There is no green cross. The circle is at the bottom left.", (1, 0.8, 0, 1, False)),  # the place
        ("I am sorry, I cannot see the picture.", (0, 0.0, 0, 0, False)),
        (
            "At the top left there is a large red circle. At the top right there is a large red circle.",
            (1, 1.0, 1, 0, False),
        ),
        ("There is a red circle. At the top left there is a large red circle.", (1, 1.0, 0, 0, False)),
    ],
)
def test_what_a_text_says(text, expected):
    found = reading.compare(reading.read(text), SCENE)
    assert (found.found, pytest.approx(found.told), found.invented, found.mistaken, found.miscounted) == expected
