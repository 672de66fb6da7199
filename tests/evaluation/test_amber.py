"""AMBER: the official numbers of every evaluation type, the rules for nouns, and files that cannot be scored."""

import json

import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation import amber
from silkie_jax.evaluation.rules import words
from silkie_jax.evaluation.rules.words import WordTool
from tests.evaluation.scoring import figures, load, score, write

RELATION = {"dog": ["puppy"], "cat": [], "sea": ["water"], "ship": ["boat"], "sky": [], "sun": ["star"]}


@pytest.fixture
def folder(golden):
    return golden / "evaluation" / "amber"


def data(tmp_path, annotations, similarity=(), safe="sign\n", relation=RELATION):
    rows = [{"id": number, **row} for number, row in enumerate(annotations, start=1)]
    write(tmp_path / "annotations.json", rows)
    write(tmp_path / "relation.json", relation)
    write(tmp_path / "similarity.json", [{"a": a, "b": b, "similarity": value} for a, b, value in similarity])
    (tmp_path / "safe_words.txt").write_text(safe, encoding="utf-8")
    return tmp_path


def described(tmp_path, truth, hallu, nouns, **more):
    """Score of one description with recorded nouns."""
    folder = data(tmp_path, [{"type": "generative", "truth": truth, "hallu": hallu}], **more)
    write(folder / "nouns.json", {"1": nouns})
    return score("amber", folder, write(folder / "r.json", [{"id": 1, "response": "a text"}]))


def asked(tmp_path, *pairs, kind="discriminative-relation", parser="official"):
    """Score of yes/no answers: (truth, response)."""
    folder = data(tmp_path, [{"type": kind, "truth": truth} for truth, _ in pairs])
    rows = [{"id": number, "response": text} for number, (_, text) in enumerate(pairs, start=1)]
    return score("amber", folder, write(folder / "r.json", rows), parser=parser)


class TestGolden:
    @pytest.mark.parametrize("kind", ["a", "g", "d", "de", "da", "dr"])
    @pytest.mark.parametrize("parser", amber.ABOUT.parsers)
    def test_every_type_under_every_parser(self, folder, kind, parser):
        found = score("amber", folder, folder / "responses.json", parser=parser, evaluation_type=kind)
        assert found.official == load(folder / "expected.json")["official"][kind]

    def test_the_parsers_of_the_harnesses(self, folder):
        expected = load(folder / "expected.json")["harness"]
        found = figures(score("amber", folder, folder / "responses.json", parser="vlmevalkit"))
        for group, value in expected["vlmevalkit_exact_matching"].items():
            if group in ("Attribute", "Existence", "Relation"):
                assert found[f"{group.lower()}/Accuracy"] == pytest.approx(value)
        found = figures(score("amber", folder, folder / "responses.json", parser="lmms-eval"))
        assert found["Accuracy"] == pytest.approx(76.04087457422318, abs=1e-2)  # over n + 0.001 there
        assert found["Precision"] == pytest.approx(80.7676775446626, abs=1e-2)

    def test_counts_and_notes(self, folder):
        found = score("amber", folder, folder / "responses.json")
        assert found.counts["not exactly Yes or No"] == 13
        assert found.counts["repeated"] == found.counts["missing"] == 1
        assert any("recorded nouns of 12 descriptions" in n and "recorded table" in n for n in found.notes)
        assert figures(found)["AMBER"] == pytest.approx((100 - 30 + figures(found)["F1"]) / 2)

    def test_yes_no_alone_needs_no_words(self, folder, tmp_path):
        (tmp_path / "annotations.json").write_bytes((folder / "annotations.json").read_bytes())
        rows = [row for row in load(folder / "responses.json") if row["id"] > 12]
        found = score("amber", tmp_path, write(tmp_path / "r.json", rows))
        assert found.official == load(folder / "expected.json")["official"]["d"]

    def test_an_unknown_id(self, golden, folder):
        with pytest.raises(UserError, match=r"responses.json: entry 1: id 99999 is not among"):
            score("amber", folder, golden / "evaluation" / "errors" / "amber" / "responses.json")


class TestDescriptions:
    def test_case_is_kept_and_unknown_words_are_left_out(self, tmp_path):
        found = described(tmp_path, ["dog"], ["cat"], ["Dog", "tree", "puppy"])
        assert found.readings["1"] == "puppy"
        assert found.official["Generative Task"] == {"CHAIR": 0.0, "Cover": 99.9, "Hal": 0.1, "Cog": 0.0}

    def test_repeated_nouns_count_again(self, tmp_path):
        found = described(tmp_path, ["dog"], [], ["cat", "cat", "dog"])
        assert figures(found)["CHAIR"] == pytest.approx(200 / 3)
        assert figures(found)["Cog"] != figures(found)["Cog"]
        assert found.outcomes == {"1": 0.0}

    def test_a_truth_that_is_there_twice_is_covered_once(self, tmp_path):
        found = described(tmp_path, ["ship", "ship"], [], ["ship", "ship", "ship"])
        assert figures(found)["Cover"] == 50

    def test_an_associate_of_the_second_covers_the_second(self, tmp_path):
        found = described(tmp_path, ["sky", "sea"], [], ["water", "sea"])
        assert figures(found)["Cover"] == 50

    def test_a_safe_word_covers_nothing(self, tmp_path):
        found = described(tmp_path, ["dog"], ["cat"], ["dog", "cat"], safe="dog\ncat")
        assert {name: figures(found)[name] for name in ("CHAIR", "Cover", "Cog")} == {"CHAIR": 0, "Cover": 0, "Cog": 0}

    @pytest.mark.parametrize(("likeness", "fine"), [(0.81, True), (0.8, False)])
    def test_likeness_above_a_threshold_covers(self, tmp_path, likeness, fine):
        found = described(tmp_path, ["dog"], [], ["cat"], similarity=[("dog", "cat", likeness)])
        assert found.outcomes["1"] == fine
        assert figures(found)["Cover"] == 100 * fine

    def test_an_imagined_word_is_marked_even_where_the_noun_is_fine(self, tmp_path):
        like = [("puppy", "water", 0.9), ("puppy", "sky", 0.95)]
        found = described(tmp_path, ["sky"], ["sea", "dog"], ["puppy"], similarity=like)
        assert found.outcomes["1"] == 1  # like "sky"
        assert figures(found)["Cog"] == 100  # equals an associate of "dog", and is like one of "sea"

    def test_an_annotated_word_without_associates_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"relation.json: no entry 'yak', which item 1"):
            described(tmp_path, ["yak"], [], ["dog"])

    def test_nouns_are_found_where_none_are_recorded(self, tmp_path, monkeypatch):
        monkeypatch.setattr(words, "noun_finder", lambda why: WordTool("tagger 1.0", str.split))
        rows = [{"type": "generative", "truth": ["dog"], "hallu": []}] * 2
        folder = data(tmp_path, rows)
        write(folder / "nouns.json", {"1": {"nouns": ["dog"], "kept": ["dog"]}})
        answers = write(folder / "r.json", [{"id": 1, "response": "cat"}, {"id": 2, "response": "a cat"}])
        found = score("amber", folder, answers)
        assert found.outcomes == {"1": 1, "2": 0}
        assert "tagger 1.0; recorded nouns of 1 descriptions" in found.notes[0]

    def test_what_is_missing_is_named(self, tmp_path, monkeypatch):
        folder = data(tmp_path, [{"type": "generative", "truth": ["dog"], "hallu": []}])
        answers = write(folder / "r.json", [{"id": 1, "response": "cat"}])

        def absent(why):
            raise UserError("no tagger")

        monkeypatch.setattr(words, "noun_finder", absent)
        with pytest.raises(UserError, match=r"no tagger; or record the nouns"):
            score("amber", folder, answers)
        (folder / "similarity.json").unlink()
        with pytest.raises(UserError, match=r"similarity=spacy:en_core_web_lg"):
            score("amber", folder, answers)
        (folder / "safe_words.txt").unlink()
        with pytest.raises(UserError, match=r"safe_words.txt: no such file"):
            score("amber", folder, answers)
        (folder / "relation.json").unlink()
        with pytest.raises(UserError, match=r"relation.json: no such file"):
            score("amber", folder, answers)
        assert score("amber", folder, answers, evaluation_type="d").official == {}

    def test_likeness_can_be_recorded(self, tmp_path):
        folder = data(tmp_path, [{"type": "generative", "truth": ["dog"], "hallu": []}], [("cat", "dog", 0.9)])
        write(folder / "n.json", {"1": ["cat", "sea"]})
        answers = write(folder / "r.json", [{"id": 1, "response": "x"}])
        settings = {"record": str(folder / "new.json"), "nouns": str(folder / "n.json")}
        before = score("amber", folder, answers, **settings)
        assert load(folder / "new.json") == [{"a": "cat", "b": "dog", "similarity": 0.9}]
        after = score("amber", folder, answers, similarity=str(folder / "new.json"), nouns=settings["nouns"])
        assert after.official == before.official


class TestYesNo:
    def test_anything_but_yes_and_no_is_wrong(self, tmp_path):
        found = asked(tmp_path, ("yes", "yes"), ("yes", "Yes."), ("no", "no"), ("no", " No"), ("yes", "Yes"))
        assert found.official["Relation"]["Accuracy"] == 20.0
        assert found.official["Relation"]["Precision"] == 0.0
        assert found.counts["not exactly Yes or No"] == found.counts["undecided"] == 4
        assert any("4 of 5 yes/no answers are not exactly" in note for note in found.notes)

    @pytest.mark.parametrize(("parser", "right"), [("official", 0), ("lmms-eval", 2), ("vlmevalkit", 1)])
    def test_parsers(self, tmp_path, parser, right):
        found = asked(tmp_path, ("no", "no."), ("no", "I do not know"), parser=parser)
        assert sum(found.outcomes.values()) == right
        assert found.official["Relation"]["Accuracy"] == 0.0

    def test_no_is_the_positive_class(self, tmp_path):
        found = asked(tmp_path, ("no", "No"), ("no", "Yes"), ("yes", "No"), ("yes", "No"))
        assert {k: found.official["Relation"][k] for k in ("Accuracy", "Precision", "Recall")} == {
            "Accuracy": 25.0,
            "Precision": 33.3,
            "Recall": 50.0,
        }

    def test_f1_is_of_the_rounded_ones_and_of_existence_over_more(self, tmp_path):
        found = asked(tmp_path, ("no", "No"), ("no", "Yes"), kind="discriminative-hallucination")
        p, r = found.official["Exsitence"]["Precision"] / 100, found.official["Exsitence"]["Recall"] / 100
        assert found.official["Exsitence"]["F1"] == round(2 * p * r / (p + r + 0.001) * 100, 1)
        assert found.official["Descriminative Task"]["F1"] == round(2 * p * r / (p + r + 0.0001) * 100, 1)
        assert set(found.official) == {"Descriminative Task", "Exsitence"}


def test_queries_and_prompts(tmp_path):
    rows = [{"type": "generative", "truth": [], "hallu": []}, {"type": "relation", "truth": "no"}]
    folder = data(tmp_path, rows)
    write(folder / "query" / "query_all.json", [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}])
    write(folder / "query_discriminative.json", [{"id": 2, "image": "AMBER_1.jpg", "query": "Is it?"}])
    (folder / "image").mkdir()
    (folder / "image" / "AMBER_1.jpg").write_bytes(b"jpg")
    first, second = amber.items(folder, {})
    assert first.pictures[0].read() == b"jpg"
    assert first.cluster == second.cluster == "AMBER_1.jpg"
    assert amber.prompt(first, "vlmevalkit") == "Describe this image."
    assert amber.prompt(second, "official") == "Is it?"
    assert amber.prompt(second, "vlmevalkit") == "Is it?\nPlease answer yes or no."
    (folder / "query_discriminative.json").unlink()
    with pytest.raises(UserError, match="item 2 has no query"):
        amber.prompt(amber.items(folder, {})[1], "official")


@pytest.mark.parametrize("text", ['[{"id": 1, "response": "No"}]', '\ufeff{"id": 1, "response": "No"}\r\n\r\n'])
def test_forms_of_answers(tmp_path, text):
    folder = data(tmp_path, [{"type": "relation", "truth": "no"}])
    (folder / "r.json").write_bytes(text.encode())
    assert score("amber", folder, folder / "r.json").outcomes == {"1": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        ([3], "entry 1: expected an object"),
        ([{"response": "No"}], "entry 1: no field 'id'"),
        ([{"id": "1", "response": "No"}], "entry 1: the id is '1', not an integer"),
        ([{"id": True, "response": "No"}], "the id is True"),
        ([{"id": 0, "response": "No"}], "id 0 is not among the 1"),
        ([{"id": -1, "response": "No"}], "id -1 is not among the 1"),
        ([{"id": 1}], "entry 1: no field 'response'"),
        ([{"id": 1, "response": None}], "response must be a text, found null"),
        ({"1": "No"}, "no field 'id'"),
    ],
)
def test_other_answers(tmp_path, rows, message):
    folder = data(tmp_path, [{"type": "relation", "truth": "no"}])
    with pytest.raises(UserError, match=message):
        score("amber", folder, write(folder / "r.json", rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "expected a list, found an object"),
        ([], "no annotations"),
        ([{"id": 1, "truth": "no"}], "row 1: no field 'type'"),
        ([{"id": 1, "type": "odd", "truth": "no"}], "type 'odd' is none of"),
        ([{"id": 1, "type": "relation", "truth": "No"}], "truth is 'No', not yes or no"),
        ([{"id": 1, "type": "generative", "truth": "dog"}], "truth: expected a list"),
        ([{"id": 1, "type": "generative", "truth": ["dog"]}], "no field 'hallu'"),
        ([{"id": 1, "type": "relation", "truth": "no"}] * 2, "row 2: id 1 is there twice"),
    ],
)
def test_other_annotations(tmp_path, rows, message):
    write(tmp_path / "annotations.json", rows)
    with pytest.raises(UserError, match=message):
        amber.items(tmp_path, {})


def test_other_settings(tmp_path):
    folder = data(tmp_path, [{"type": "generative", "truth": ["dog"], "hallu": []}])
    answers = write(folder / "r.json", [{"id": 1, "response": "No"}])
    with pytest.raises(UserError, match="evaluation_type is 'x'; there are a"):
        score("amber", folder, answers, evaluation_type="x")
    with pytest.raises(UserError, match=r"none.json: no such file"):
        score("amber", folder, answers, nouns=str(folder / "none.json"))
    write(folder / "nouns.json", {"1": {"kept": []}})
    with pytest.raises(UserError, match=r"nouns.json: '1': nouns: expected a list, found null"):
        score("amber", folder, answers)
    with pytest.raises(UserError, match="--data FOLDER"):
        score("amber", None, answers)


def test_answers_beside_their_nouns(tmp_path):
    folder = data(tmp_path / "data", [{"type": "generative", "truth": ["dog"], "hallu": []}])
    write(folder / "nouns.json", {"1": ["cat"]})
    write(tmp_path / "run" / "nouns.json", {"1": ["dog"]})
    answers = write(tmp_path / "run" / "r.json", [{"id": 1, "response": "x"}])
    assert json.loads(answers.read_text()) == [{"id": 1, "response": "x"}]
    assert score("amber", folder, answers).outcomes == {"1": 1}
