"""Nouns of a description against an image's annotated objects, by AMBER's rules (`inference.py` there)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import Answer, Settings
from silkie_jax.evaluation.rules import words
from silkie_jax.evaluation.rules.words import Likeness, WordTool
from silkie_jax.evaluation.running.files import read_json
from silkie_jax.evaluation.running.shapes import an_object, some_words

ALIKE = 0.8
"""Words are alike above it."""

_WHY = "scoring AMBER's descriptions"


@dataclass(frozen=True)
class Lexicon:
    """What the data says of words: associates of each, words that are always fine, where likeness comes from."""

    relation_file: Path
    relation: Mapping[str, Sequence[str]]
    safe: frozenset[str] | None
    safe_file: Path
    similarity: str  # a file, spacy:MODEL, or nothing
    nouns_file: Path

    def associates(self, word: str, where: str) -> Sequence[str]:
        """Of an annotated word.

        Raises:
            UserError: there is no entry of it, without which the official tool stops.
        """
        if word not in self.relation:
            raise UserError(f"{self.relation_file}: no entry {word!r}, which {where} is annotated with")
        return self.relation[word]


@dataclass(frozen=True)
class Nouns:
    """What the kept nouns of one description came to; `hallucinated` are words, the others counts."""

    kept: tuple[str, ...]
    hallucinated: tuple[str, ...]
    covered: int
    truth: int
    marked: int
    hallu: int

    def counts(self) -> dict[str, float]:
        return {
            "hallucinated": len(self.hallucinated),
            "nouns": len(self.kept),
            "covered": self.covered,
            "truth": self.truth,
            "marked": self.marked,
            "hallu": self.hallu,
            "clean": float(not self.hallucinated),
            "descriptions": 1,
        }

    def reading(self) -> str:
        named = ", ".join(self.kept) or "no noun that counts"
        return f"{named}; not there: {', '.join(self.hallucinated)}" if self.hallucinated else named


@dataclass
class NounReader:
    """Finds nouns and their likeness; opens a tool when it is first needed, and remembers which ones were.

    Attributes:
        recorded: id -> nouns.
    """

    lexicon: Lexicon
    recorded: Mapping[str, Sequence[str]]
    recorded_in: Path
    alike: Likeness
    vocabulary: frozenset[str] = frozenset()
    _tool: WordTool | None = None
    _from_record: int = field(default=0)

    @classmethod
    def of(cls, lexicon: Lexicon, nouns_file: Path | None, settings: Settings) -> "NounReader":
        """With the files and tools that data and settings name.

        Raises:
            UserError: one is missing.
        """
        if not lexicon.relation:
            raise UserError(
                f"{lexicon.relation_file}: no such file, or empty; descriptions cannot be scored without it"
            )
        if lexicon.safe is None:
            raise UserError(f"{lexicon.safe_file}: no such file; descriptions cannot be scored without it")
        beside = nouns_file if nouns_file is not None and nouns_file.is_file() else lexicon.nouns_file
        recorded = _read_nouns(beside) if beside.is_file() else {}
        vocabulary = frozenset(word for key, others in lexicon.relation.items() for word in (key, *others))
        return cls(lexicon, recorded, beside, _likeness(lexicon.similarity), vocabulary)

    def kept(self, answer: Answer) -> list[str]:
        """The nouns of a description that the benchmark's vocabulary has, in order, case kept."""
        if answer.id in self.recorded:
            nouns = self.recorded[answer.id]
            self._from_record += 1
        else:
            self._tool = self._tool or self._open()
            nouns = self._tool.call(answer.text)
        return [noun for noun in nouns if noun in self.vocabulary]

    def _open(self) -> WordTool:
        try:
            return words.noun_finder(_WHY)
        except UserError as error:
            raise UserError(f"{error}; or record the nouns: {{id: [noun, ..]}} in {self.recorded_in}") from None

    def record(self, path: Path) -> None:
        """Writes the likenesses that were asked for."""
        path.write_text(json.dumps(self.alike.table(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def notes(self) -> list[str]:
        tools = [self._tool.name] if self._tool else []
        if self._from_record:
            tools.append(f"recorded nouns of {self._from_record} descriptions ({self.recorded_in.name})")
        return [words.words_used([*tools, f"similarity {self.alike.name}"])]


def _read_nouns(path: Path) -> dict[str, Sequence[str]]:
    """{id: [noun, ..]} or {id: {"nouns": [noun, ..]}}."""
    found: dict[str, Sequence[str]] = {}
    for identity, entry in an_object(read_json(path), str(path)).items():
        where = f"{path}: {identity!r}"
        if isinstance(entry, dict):
            entry = entry.get("nouns")
        found[identity] = some_words(entry, f"{where}: nouns")
    return found


def _likeness(source: str) -> Likeness:
    if source.startswith("spacy:"):
        return words.spacy_likeness(source.removeprefix("spacy:"), _WHY)
    if source:
        return words.recorded_likeness(Path(source))
    raise UserError(
        f"{_WHY} needs the likeness of words: --set similarity=spacy:en_core_web_lg (official), a recorded table "
        "similarity.json in the data folder, or --set evaluation_type=d for the yes/no questions alone"
    )


def judge_nouns(
    kept: Sequence[str], truth: Sequence[str], hallu: Sequence[str], reader: NounReader, where: str
) -> Nouns:
    """Holds nouns to what is there (`truth`) and to what people would imagine (`hallu`).

    A noun, in order: a word that is always fine is; an associate of a truth or a truth covers the first that it equals
    and is fine. Else it marks the imagined word that it equals, and the first that it is like; the first truth that it
    is like it covers, and is fine; what is left is hallucinated. Associates of all words come before the words.

    Raises:
        UserError: a word has no entry among the associates.
    """
    there, imagined = _Targets.of(truth, reader, where), _Targets.of(hallu, reader, where)
    wrong = []
    for noun in kept:
        if noun in (reader.lexicon.safe or ()) or there.equal(noun):
            continue
        imagined.equal(noun)
        imagined.like(noun)
        if not there.like(noun):
            wrong.append(noun)
    return Nouns(tuple(kept), tuple(wrong), len(there.hit), len(truth), len(imagined.hit), len(hallu))


@dataclass
class _Targets:
    """Words that nouns are held to, in order, each with the annotated word (its index) that it stands for."""

    words: list[tuple[str, int]]
    alike: Likeness
    hit: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, annotated: Sequence[str], reader: NounReader, where: str) -> "_Targets":
        associates = [(a, i) for i, word in enumerate(annotated) for a in reader.lexicon.associates(word, where)]
        return cls([*associates, *((word, i) for i, word in enumerate(annotated))], reader.alike)

    def equal(self, noun: str) -> bool:
        return self._take(next((i for word, i in self.words if word == noun), None))

    def like(self, noun: str) -> bool:
        return self._take(next((i for word, i in self.words if self.alike(noun, word) > ALIKE), None))

    def _take(self, index: int | None) -> bool:
        if index is None:
            return False
        self.hit.add(index)
        return True
