"""Pair rules: the original's outcome for Silkie's own, and what each of the others promises."""

import math
from types import SimpleNamespace

import pytest

from silkie_jax.corpus.pairs import RULES, best_response, check_rule, pairs
from silkie_jax.corpus.schema import Record, Response
from silkie_jax.errors import UserError


def record(*responses, given=()):
    """A record of responses given as (text, model, ratings by aspect A, B)."""
    built = tuple(Response(text, model, dict(zip("AB", ratings, strict=False))) for text, model, *ratings in responses)
    return Record("id", (), "prompt", built, pairs=tuple(given))


FOUR = record(("a", "GPT-4V", 5, 3), ("bbbb", "x", 4, 4), ("cc", "y", 1, 5), ("dddd", "z", 2, math.nan), given=[(1, 0)])


def test_mean_rating_takes_all_pairs_but_ties_and_unrated():
    assert pairs(FOUR) == pairs(FOUR, "mean_rating") == [(0, 2), (1, 2)]


def test_mean_rating_drops_a_response_that_lacks_an_aspect_of_the_others():
    assert pairs(record(("a", "m", 5), ("b", "m", 1, 1), ("c", "m", 2, 2))) == [(2, 1)]


def test_pairs_keep_the_order_of_combinations():
    assert pairs(record(*((str(n), "m", n, n) for n in (1, 3, 2)))) == [(1, 0), (2, 0), (1, 2)]


def test_mean_rating_matches_the_original_on_every_golden_row(golden):
    import json

    from data_prep.tables.vlfeedback import parse_row

    cases = json.loads((golden / "pairing.json").read_text())
    found = []
    for row in cases["rows"]:
        if row["completions"]:
            draft = parse_row(row)
            prompt = f"Picture 1: <img>{row['img_path']}</img>\n{row['prompt'].strip()}"
            texts = [response.text for response in draft.responses]
            for chosen, rejected in pairs(SimpleNamespace(responses=draft.responses)):
                found.append({"prompt": prompt, "chosen": texts[chosen], "rejected": texts[rejected]})
    assert found == cases["pairs"]


def test_weighted():
    assert pairs(FOUR, "weighted", weights={"A": 1, "B": 0}) == pairs(FOUR, "aspect", aspect="A")
    assert pairs(FOUR, {"name": "weighted", "weights": {"A": 1, "B": 3}}) == [(1, 0), (2, 0)]  # 3.5, 4, 4
    assert pairs(FOUR, "weighted", weights={"A": 1, "absent": 2}) == []


def test_aspect():
    assert pairs(FOUR, {"name": "aspect", "aspect": "A"}) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (3, 2)]
    assert pairs(FOUR, "aspect", aspect="B") == [(1, 0), (2, 0), (2, 1)]


def test_longest_as_best():
    assert pairs(FOUR, "longest_as_best") == [(1, 0), (1, 2)]  # the other one of four letters is no shorter
    assert pairs(record(), "longest_as_best") == []


def test_model_as_best():
    assert pairs(FOUR, "model_as_best") == [(0, 1), (0, 2), (0, 3)]
    assert pairs(FOUR, "model_as_best", model="Y") == [(2, 0), (2, 1), (2, 3)]
    assert pairs(FOUR, "model_as_best", model="absent") == []
    assert pairs(record(("a", "gpt4v"), ("b", "x"), ("c", "gpt-4v")), "model_as_best") == [(0, 1), (2, 1)]


def test_best_vs_worst():
    assert pairs(FOUR, "best_vs_worst") == [(0, 2)]
    assert pairs(record(("a", "m", 3, 3), ("b", "m", 2, 4)), "best_vs_worst") == []
    assert pairs(record(("a", "m", math.nan, 3)), "best_vs_worst") == []


def test_best_response_is_the_first_of_those_with_the_highest_mean_of_all_aspects():
    assert best_response(FOUR) == 0
    assert best_response(record(("a", "m", 2, 3), ("b", "m", 4, 2), ("c", "m", 2, 4))) == 1
    assert best_response(record(("a", "m", 5, math.nan), ("b", "m", 1, 1))) == 1
    assert best_response(record(("a", "m", math.nan, 3))) is None
    assert best_response(Record("i", (), "q", ())) is None


def test_given():
    assert pairs(FOUR, "given") == [(1, 0)]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("best", f"no rule 'best'; choose one of {', '.join(RULES)}"),
        ({"weights": {}}, "no rule ''"),
        (None, "no rule None"),
        (["mean_rating"], "no rule"),
        ({"name": "mean_rating", "weights": {}}, "unknown option 'weights'; its options: none"),
        ({"name": "model_as_best", "mode": "x"}, "unknown option 'mode'; its options: model"),
        ("weighted", "give its option 'weights'"),
        ({"name": "aspect", "aspect": 3}, "aspect must be a name, not 3"),
        ({"name": "weighted", "weights": {"A": "1"}}, "A has '1'"),
        ({"name": "weighted", "weights": {"A": -1}}, "A has -1"),
        ({"name": "weighted", "weights": {"A": 0}}, "all are 0"),
        ({"name": "weighted", "weights": ["A"]}, "weights must map"),
    ],
)
def test_a_bad_rule_is_refused_by_name(rule, message):
    for attempt in (lambda: pairs(FOUR, rule), lambda: check_rule(rule)):
        with pytest.raises(UserError) as error:
            attempt()
        assert message in str(error.value)
        assert str(error.value).startswith("pair_rule")


def test_a_rule_that_the_corpus_cannot_serve_is_refused():
    check_rule({"name": "aspect", "aspect": "A"}, ["A", "B"])
    check_rule("given", [])
    with pytest.raises(UserError, match="no aspect 'C'; it has A, B"):
        check_rule({"name": "aspect", "aspect": "C"}, ["A", "B"])
    with pytest.raises(UserError, match="no aspect 'C'"):
        check_rule({"name": "weighted", "weights": {"A": 1, "C": 1}}, ["A", "B"])
    with pytest.raises(UserError, match="use pair_rule: given"):
        check_rule("mean_rating", [])
