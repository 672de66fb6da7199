"""The ratings of a response below its question."""

import json
import math

import numpy as np
import pytest

from silkie_jax.corpus import Record, Response
from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.preference.batches import RowOptions
from silkie_jax.preference.condition import Attributes, read_condition
from silkie_jax.preference.rows import make_row

BYTES = Tokenizer({bytes([i]): i for i in range(256)})
CONDITION = {"name": "attributes", "best": 4}


def test_the_line_of_ratings_is_the_releases(golden):
    facts = json.loads((golden / "related/mllm_dpo.json").read_text())
    asked = read_condition(CONDITION, facts["attributes"]).asked
    sentence, line = asked.split("\n")
    assert line == facts["steerlm"]["suffix_of_best"]
    assert "4" in sentence


def test_ratings_are_written_in_the_order_of_the_aspects():
    condition = Attributes(5, ("B", "A"))
    assert condition.of({"A": 1.0, "B": 10 / 3, "C": 2}).split("\n")[1] == "B:3.3,A:1"
    assert condition.asked.split("\n")[1] == "B:5,A:5"
    assert condition.of({"A": 1.0}) is None
    assert condition.of({"A": 1.0, "B": math.nan}) is None


def test_a_corpus_must_have_the_aspects():
    assert read_condition(CONDITION, ["A", "B"]).aspects == ("A", "B")
    assert read_condition(CONDITION | {"aspects": ["B"]}, ["A", "B"]).aspects == ("B",)
    with pytest.raises(UserError, match="no aspect 'C'; it has A, B"):
        read_condition(CONDITION | {"aspects": ["C"]}, ["A", "B"])
    with pytest.raises(UserError, match="this corpus has no ratings"):
        read_condition(CONDITION, [])


def test_every_rated_response_is_imitated_below_its_own_ratings():
    """As a row of its own with the ratings in the prompt; the image is there once."""
    condition = Attributes(4, ("A",))
    ratings = (4, 1, math.nan, 4)
    responses = tuple(
        Response(text, ratings={"A": float(rating)}) for text, rating in zip("abcd", ratings, strict=True)
    )
    record = Record("r", (b"image",), "Q? ", responses)
    options = RowOptions(None, "sft", imitate="all", condition=condition)
    row = options.row(BYTES, record)
    assert row.responses == (0, 1, 3)
    assert row.segments == 2
    assert (row.images, row.spans) == ((b"image",), (0, 0))
    prompts = []
    for rating in (4, 1):
        asked = Record("r", record.images, f"Q?\n{condition.of({'A': rating})}", responses)
        single = make_row(BYTES, asked, responses=[0])
        prompts.append(single.tokens[single.branches == 0])
    for segment, prompt in enumerate(prompts):
        np.testing.assert_array_equal(row.tokens[row.branches == 64 * segment], prompt)
    best = RowOptions(None, "sft", imitate="best", condition=condition).row(BYTES, record)
    assert best.responses == (0,)
    assert options.row(BYTES, Record("r", (), "Q?", (Response("a"),))) is None


class Corpus:
    fingerprint = "c"


def test_rows_are_known_by_their_condition_and_those_without_as_before():
    keys = [
        RowOptions(None, "sft", imitate="all", condition=condition).key(Corpus, BYTES)
        for condition in (None, Attributes(4, ("A",)), Attributes(5, ("A",)))
    ]
    assert "condition" not in keys[0]
    assert keys[1]["condition"] != keys[2]["condition"]
    json.dumps(keys)
