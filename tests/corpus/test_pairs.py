"""Pair rules: the original's outcome for Silkie's own, and what each of the others promises."""

import dataclasses
import json
import math
from collections import Counter
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


def test_best_response_by_a_weighted_sum_that_may_have_to_be_so_high():
    assert best_response(FOUR, {"A": 1}) == 0
    assert best_response(FOUR, {"B": 1}) == 2
    assert best_response(FOUR, {"A": 1, "B": 2}) == 1  # 11, 12, 11
    assert best_response(FOUR, {"A": 1, "B": 2}, at_least=12) == 1
    assert best_response(FOUR, {"A": 1, "B": 2}, at_least=12.5) is None
    assert best_response(FOUR, at_least=4) == 0


def test_a_margin_keeps_the_pairs_that_are_clear():
    assert pairs(FOUR, "aspect", aspect="A", margin=3) == [(0, 2), (0, 3), (1, 2)]  # 5 4 1 2
    assert pairs(FOUR, "mean_rating", margin=1) == pairs(FOUR)
    assert pairs(FOUR, "mean_rating", margin=1.5) == pairs(FOUR, "best_vs_worst", margin=1.5) == []
    assert pairs(FOUR, {"name": "weighted", "weights": {"A": 2}, "margin": 4}) == [(0, 2)]  # of the mean, not the sum


SUM = {"name": "best_vs_lower", "margin": 2, "weights": {"A": 1, "B": 1}}


def test_best_vs_lower_takes_a_lot_among_those_that_are_lower_by_the_margin():
    assert pairs(FOUR, SUM) == [(0, 2)]  # 8, 8, 6, unrated
    assert pairs(FOUR, SUM | {"margin": 2.5}) == []
    assert pairs(FOUR, "best_vs_lower", margin=1) == [(0, 2)]  # without weights by the mean
    assert pairs(record(("a", "m", 3), ("b", "m", 3)), "best_vs_lower", margin=0) == []  # an equal is not lower
    assert pairs(record(), "best_vs_lower", margin=0) == []


def test_the_lot_depends_on_seed_and_record_alone():
    many = [("t", "m", 9), *(("t", "m", n) for n in range(7))]
    drawn = {}
    for number in range(300):
        one = dataclasses.replace(record(*many), id=f"record {number}")
        ((chosen, rejected),) = pairs(one, "best_vs_lower", margin=3)
        assert chosen == 0
        assert pairs(one, "best_vs_lower", margin=3) == [(0, rejected)]
        drawn[number] = rejected, pairs(one, "best_vs_lower", margin=3, seed=1)[0][1]
    for seed in (0, 1):
        counts = Counter(pair[seed] for pair in drawn.values())
        assert sorted(counts) == list(range(1, 8))
        assert max(counts.values()) < 75  # of 300 in seven boxes: 43 are expected
    assert 20 < sum(a == b for a, b in drawn.values()) < 75


def test_given():
    assert pairs(FOUR, "given") == [(1, 0)]


def test_by_source():
    rule = {
        "name": "by_source",
        "red-team": {"name": "aspect", "aspect": "B"},
        "record": "given",
        "other": "best_vs_worst",
    }
    check_rule(rule, ["A", "B"])
    of = {source: pairs(dataclasses.replace(FOUR, source=source), rule) for source in ("red-team", "record", "x", "")}
    assert of == {"red-team": [(1, 0), (2, 0), (2, 1)], "record": [(1, 0)], "x": [(0, 2)], "": [(0, 2)]}
    assert pairs(FOUR, "by_source", s="given") == pairs(FOUR, "mean_rating")
    with pytest.raises(
        UserError, match="pair_rule by_source: red-team: pair_rule aspect: this corpus has no aspect 'B'"
    ):
        check_rule(rule, ["A"])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"name": "by_source", "s": 3}, "by_source: s must be a rule, not 3"),
        ({"name": "by_source", "s": {"name": "aspect"}}, "by_source: s: pair_rule aspect: give its option 'aspect'"),
        ({"name": "by_source", "other": "worst"}, "by_source: other: pair_rule: there is no rule 'worst'"),
        ("best", f"no rule 'best'; choose one of {', '.join(RULES)}"),
        ({"weights": {}}, "no rule ''"),
        (None, "no rule None"),
        (["mean_rating"], "no rule"),
        ({"name": "given", "weights": {}}, "unknown option 'weights'; its options: none"),
        ({"name": "mean_rating", "weights": {}}, "unknown option 'weights'; its options: margin"),
        ({"name": "mean_rating", "margin": -1}, "margin must be a number of at least 0, not -1"),
        ({"name": "aspect", "aspect": "A", "margin": "2"}, "margin must be a number of at least 0, not '2'"),
        ("best_vs_lower", "give its option 'margin'"),
        ({"name": "best_vs_lower", "margin": True}, "margin must be a number of at least 0, not True"),
        ({"name": "best_vs_lower", "margin": 2, "seed": 0.5}, "seed must be a whole number, not 0.5"),
        ({"name": "best_vs_lower", "margin": 2, "weights": {}}, "weights must map"),
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
    lower = {"name": "best_vs_lower", "margin": 2}
    check_rule(lower, ["A"])
    with pytest.raises(UserError, match="no aspect 'C'"):
        check_rule(lower | {"weights": {"C": 1}}, ["A", "B"])
    for rule in ("mean_rating", lower):
        with pytest.raises(UserError, match="use pair_rule: given"):
            check_rule(rule, [])
