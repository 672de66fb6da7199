"""Trees of sentences: selection, filters, rewards and the responses that come of them (the release's numbers are in
tests/related)."""

import math

import pytest

from data_prep.sentences import Sentence, choice, kept, path_reward, paths, ranks, selected, sentence_rewards, text_of


def tree(*rows):
    """Sentences of (parent, text, probability, final)."""
    return [Sentence(n, parent, text, math.log(p), final) for n, (parent, text, p, final) in enumerate(rows, 1)]


TREE = tree(
    (0, "A cat.", 0.5, False), (0, "A dog.", 0.25, False), (1, " It sits.", 0.5, True), (1, " Sits sits.", 0.1, True),
    (1, "", 0.4, True), (2, " It runs.", 0.9, False), (2, " Far.", 0.1, True),
)  # fmt: skip
LIKENESS = {1: 30.0, 2: 10.0, 3: 20.0, 4: -5.0, 6: 25.0, 7: 15.0}


def test_the_best_and_the_worst_are_continued_and_all_of_few():
    def score(x):
        return x

    assert selected([3, 1, 2], score) == [3, 2, 1]
    assert selected([3, 1, 2, 5, 4], score) == [5, 2, 1]
    assert selected(range(9), score, candidates=4, best=2, worst=1) == [8, 7, 0]
    assert selected(range(3), score, candidates=1, best=2, worst=2) == [2, 1, 0], "none twice"
    assert selected(range(6), score, best=1, worst=0) == [5]


def test_finished_responses_and_their_texts():
    assert [text_of(path) for path in paths(TREE)] == ["A cat. It sits.", "A cat. Sits sits.", "A cat.", "A dog. Far."]


def test_ranks_are_among_siblings_that_say_something():
    assert ranks(TREE, {one.number: one.language for one in TREE}) == {1: 0.5, 2: 1, 3: 0.5, 4: 1, 6: 0.5, 7: 1}


def test_rewards_by_name():
    raw = sentence_rewards(TREE, LIKENESS, reward="raw")
    assert raw[1] == pytest.approx(0.9 * 30 + 0.1 * 0.5)
    assert raw[4] == pytest.approx(0.01), "no likeness below 0"
    by_rank = sentence_rewards(TREE, LIKENESS, clip_weight=0.75)
    assert by_rank[3] == -0.5
    ways = {text_of(path): path for path in paths(TREE)}
    both = ways["A cat. It sits."]
    assert path_reward(both, raw, "sum") == pytest.approx(raw[1] + raw[3])
    assert path_reward(both, by_rank) == -0.5
    assert path_reward(both, by_rank, "release") == pytest.approx(-1 / 3)
    assert path_reward(ways["A cat."], by_rank) == by_rank[1], "an end without words is no sentence"
    assert math.isnan(path_reward([TREE[4]], by_rank))


def test_the_mean_over_sentences_has_no_bias_for_length():
    """Rank 0.6 throughout: the release prefers one sentence to five, ours does not care."""
    rewards = dict.fromkeys(range(1, 6), -0.6)
    short, long = ([Sentence(n, n - 1, "x", 0.0, False) for n in range(1, count + 1)] for count in (1, 5))
    assert path_reward(short, rewards) == pytest.approx(path_reward(long, rewards))
    assert path_reward(short, rewards, "release") == pytest.approx(-0.3)
    assert path_reward(long, rewards, "release") == pytest.approx(-0.5)


def test_choice():
    assert choice({"a": 1.0, "b": 3.0, "c": 3.0, "d": 1.0}) == ("b", "a")
    assert choice({"a": 1.0}) is choice({}) is choice({"a": 2.0, "b": 2.0}) is None


@pytest.mark.parametrize(
    ("text", "repetition", "release"),
    [
        ("A cat sits.", True, True), ("no no no no no no.", False, False), ("No, no, no, no, no.", True, True),
        ("xxxxxxxxxxx.", False, False), ("No.", True, False), ("Кот sits.", True, False), ("ねこ sits.", True, False),
        ("고양이 sits.", True, False), ("A cat 😺.", True, False), ("A&nbsp;&nbsp;cat.", True, False),
        ("a\nb\nc\nd\ne\nf.", True, False), ("A&nbsp;cat.", True, True),
    ],
)  # fmt: skip
def test_filters(text, repetition, release):
    rows = tree((0, text, 0.5, False), (1, " Further.", 0.5, True), (0, "Another.", 0.5, True))
    for rule, stays in (("repetition", repetition), ("release", release), ("none", True)):
        assert [one.number for one in kept(rows, rule)] == ([1, 2, 3] if stays else [3])
