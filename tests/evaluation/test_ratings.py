"""Replies of judges under every rule: the traps of real replies, by hand."""

import math

import pytest

from silkie_jax.evaluation.rules.ratings import (
    choice_content,
    first_grade,
    llava_pair,
    llava_pair_lmms_eval,
    mathvista_extraction,
    mathvista_normal,
    mmhal_rating,
    mmvet_grade,
    mmvet_grade_vlmevalkit,
    mrag_verdict,
)


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Short analysis.\n\nRating: 6", 6),
        ("RATING: 0", 0),
        ("Rating: 10", 1),
        ("Rating: 12", 1),
        ("Rating: 4.5", 4),
        ("Rating: 06", 0),
        ("berating: 5", 5),
        ("Rating: 3 ... Rating: 3", 3),
        ("Rating: 3 ... rating: 5", None),
        ("Rating:4", None),
        ("Rating:  5", None),
        ("**Rating:** 5", None),
        ("Rating： 5", None),
        ("Rating: [6]", None),
        ("Rating: 7", None),
        ("", None),
    ],
)
def test_mmhal(reply, rating):
    assert mmhal_rating(reply) == rating


@pytest.mark.parametrize(
    ("reply", "official", "vlmevalkit"),
    [
        ("0.7\n", 0.7, 0.7),
        (" 0.7", None, 0.7),
        ("0.8 because", 0.8, None),
        ("0.8\nfoo", None, None),
        ("0.5.", None, None),
        ("0,5", None, None),
        ("0.9/1.0", None, None),
        (".5", 0.5, 0.5),
        ("1e-1", 0.1, 0.1),
        ("+0.3", 0.3, 0.3),
        ("-0", 0.0, 0.0),
        ("٠.٥", 0.5, 0.5),
        ("1.1", None, None),
        ("-0.1", None, None),
        ("inf", None, None),
        ("", None, None),
    ],
)
def test_mmvet(reply, official, vlmevalkit):
    assert mmvet_grade(reply) == official
    assert mmvet_grade_vlmevalkit(reply) == vlmevalkit


def test_nan_passes_as_a_grade():
    assert math.isnan(mmvet_grade("nan"))


def test_only_so_many_replies_are_read():
    assert first_grade(["five", "0.5", "1"], mmvet_grade, 5) == 0.5
    assert first_grade(["five"] * 5 + ["0.5"], mmvet_grade, 5) is None


@pytest.mark.parametrize(
    ("reply", "official", "lmms_eval"),
    [
        ("8 9\nBoth are good", (8, 9), (8, 9)),
        ("8,9", (8, 9), (8, 9)),
        ("8, 9", None, (8, 9)),
        (" 9 8", None, (9, 8)),
        ("8 9 ", None, (8, 9)),
        ("8/10 9/10", None, (8, 10)),
        ("8\t9", None, (8, 9)),
        ("8\n9", None, None),
        ("10 1\r\nx", (10, 1), (10, 1)),
        ("1e1 5", (10, 5), (1, 1)),
        ("8 9.", (8, 9), (8, 9)),
        ("8-9", None, (8, -9)),
        ("Assistant 1: 8\nAssistant 2: 9", None, (1, 8)),
        ("eight nine", None, None),
        ("", None, None),
    ],
)
def test_llava(reply, official, lmms_eval):
    assert llava_pair(reply) == official
    assert llava_pair_lmms_eval(reply) == lmms_eval


@pytest.mark.parametrize(("reply", "letter"), [(" D ", "D"), ("B.", None), ("a", None), ("E", None), ("(A)", None)])
def test_mrag(reply, letter):
    assert mrag_verdict(reply) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [("It is a polar bear.", "B"), ("A BEAR", "A"), ("bear or fox", None), ("a foxglove", None), ("none", None)],
)
def test_contents_of_choices(text, letter):
    assert choice_content(text, ("bear", "polar bear", "fox", "")) == letter


CHOICES = {"question_type": "multi_choice", "answer_type": "text", "choices": ["3/11", "8/11", "yes"]}
INTEGER = {"question_type": "free_form", "answer_type": "integer", "choices": None}
FLOAT = {"question_type": "free_form", "answer_type": "float", "choices": None, "precision": 2.0}
LIST = {"question_type": "free_form", "answer_type": "list", "choices": None}


@pytest.mark.parametrize(
    ("response", "row", "quick", "extraction"),
    [
        ("", LIST, False, ""),
        ("8/11", CHOICES, False, "8/11"),
        (" 8/11", CHOICES, False, None),
        ("１４５", INTEGER, False, "145"),
        ("14_5", INTEGER, False, "145"),
        ("-07", INTEGER, False, "-7"),
        ("1,000", INTEGER, False, None),
        ("145.0", INTEGER, False, None),
        (".5", FLOAT, False, "0.5"),
        ("1.20", FLOAT, False, "1.2"),
        ('The answer is "145".', INTEGER, False, None),
        ('The answer is "145".', INTEGER, True, "145"),
        ('The answer is "a". The answer is "b".', INTEGER, True, 'a". The answer is "b'),
        ('The answer is "145"', INTEGER, True, None),
    ],
)
def test_mathvista_extraction(response, row, quick, extraction):
    assert mathvista_extraction(response, row, quick) == extraction


@pytest.mark.parametrize(
    ("extraction", "row", "normal"),
    [
        ("(b)", CHOICES, "8/11"),
        ("B", CHOICES, "8/11"),
        ("", CHOICES, "yes"),  # the shortest
        ("(E)", CHOICES, "yes"),  # compared as "E", out of range
        (145, CHOICES, "yes"),
        ("3.7", INTEGER, "3"),
        ("1e2", INTEGER, "100"),
        ("1,000", INTEGER, None),
        ("inf", INTEGER, None),
        (True, INTEGER, "1"),
        (["x"], INTEGER, None),
        ("2.675", FLOAT, "2.67"),
        ("1.005", FLOAT, "1.0"),
        ("nan", FLOAT, "nan"),
        (None, FLOAT, None),
        ("1", {**FLOAT, "precision": None}, None),
        ("[1,2]", LIST, "[1,2]"),
        (8.5, LIST, "8.5"),
    ],
)
def test_mathvista_normal_form(extraction, row, normal):
    assert mathvista_normal(extraction, row, ignore_empty=False) == normal


def test_an_empty_extraction_can_be_no_choice():
    assert mathvista_normal(" ", CHOICES, ignore_empty=True) is None
    assert mathvista_normal("", LIST, ignore_empty=True) == ""
