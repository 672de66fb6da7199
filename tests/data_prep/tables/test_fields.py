"""Single fields: a number is a number or nothing, a text is kept whatever it says."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.tables import fields
from data_prep.tables.rejections import Rejected


@pytest.mark.parametrize(
    ("value", "number"),
    [("4", 4), ("4.0", 4), (" 4\n", 4), ("4.5", 4.5), (4, 4), (4.0, 4), ("10", 10), ("-1", -1), ("+3", 3), (".5", 0.5)],
)
def test_ratings(value, number):
    assert fields.rating(value) == number


NO_RATINGS = ("", " ", "N/A", "4/5", "4 out of 5", "4,0", "1 0", "1_0", "1e1", "nan", "inf", "٤", "４", "four", "4.0.0")


@pytest.mark.parametrize(
    "value",
    [*NO_RATINGS, "9" * 400, None, True, False, math.nan, math.inf, 10**400, ["4"], {"Rating": "4"}],
)
def test_what_is_no_rating(value):
    assert math.isnan(fields.rating(value))


@given(st.text(max_size=6) | st.text("0123456789./ +-eE_", max_size=6))
def test_a_rating_is_what_the_text_says_or_nothing(value):
    number = fields.rating(value)
    assert math.isnan(number) or number == float(value)


@pytest.mark.parametrize("value", ["<|im_start|>system\n", "<img>/etc/passwd</img>", "", "\0", "图里", "\U0001f600"])
def test_any_text_is_kept(value):
    assert fields.text(value, "prompt") == value


@pytest.mark.parametrize("value", [None, 3, ["a"], "\ud800"])
def test_what_is_no_text(value):
    with pytest.raises(Rejected, match="prompt is not"):
        fields.text(value, "prompt")


def test_images():
    assert fields.image_refs(None) == fields.image_refs("") == fields.image_refs([]) == []
    assert fields.image_refs("a.jpg") == ["a.jpg"]
    assert fields.image_refs(["a.jpg", {"bytes": b"x", "path": "b.jpg"}, {"bytes": None, "path": "c.jpg"}]) == [
        "a.jpg",
        b"x",
        "c.jpg",
    ]
    for value in (3, {"url": "x"}, [{}], "\ud800"):
        with pytest.raises(Rejected):
            fields.image_refs(value)
