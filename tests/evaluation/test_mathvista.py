"""MathVista: the official tool's numbers, its options, and files that it would take or stop at."""

import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation import mathvista
from tests.evaluation.scoring import figures, load, score, write


@pytest.fixture
def folder(golden):
    return golden / "evaluation" / "mathvista"


@pytest.fixture
def files(folder):
    return folder / "testmini.json", folder / "output.json", folder / "judge_replies.json"


def row(pid, answer="5", answer_type="integer", **changes):
    choices = ["3", "5"] if answer_type == "text" else None
    kind = "multi_choice" if choices else "free_form"
    given = {"question": f"q{pid}?", "image": f"images/{pid}.jpg", "choices": choices, "unit": None, "precision": None}
    fields = {"answer": answer, "question_type": kind, "answer_type": answer_type, "metadata": {"skills": ["a", "b"]}}
    return {**given, **fields, "pid": pid, **changes}


class TestGolden:
    @pytest.mark.parametrize(
        ("settings", "name"),
        [
            ({}, "default"),
            ({"ignore_empty_extractions": "true"}, "default+ignore_empty_extractions"),
            ({"quick_extract": "true"}, "quick_extract"),
            ({"quick_extract": "1", "ignore_empty_extractions": "yes"}, "quick_extract+ignore_empty_extractions"),
        ],
    )
    def test_options(self, folder, files, settings, name):
        expected = load(folder / "expected.json")["official"]
        found = score("mathvista", *files, **settings)
        for variant in ("default", "quick_extract"):
            for end in ("", "+ignore_empty_extractions"):
                assert found.official[variant + end] == expected[variant + end]["scores"]["average"]
        scores = dict(expected[name]["scores"])
        assert {key: found.official[key] for key in scores["average"]} == scores.pop("average")
        assert found.official["by"] == scores
        assert figures(found)["accuracy"] == pytest.approx(100 * 31 / 51, abs=1e-9)

    def test_every_prediction(self, folder, files):
        found = score("mathvista", *files)
        for pid, (_, normal, right) in load(folder / "expected.json")["official"]["default"]["predictions"].items():
            assert (found.readings[pid], found.outcomes[pid]) == (str(normal), float(right))

    @pytest.mark.parametrize(("quick", "name"), [("false", "default"), ("true", "quick_extract")])
    def test_as_many_requests_as_officially(self, folder, files, quick, name):
        items, answers = mathvista.read_answers(files[1], None, {})
        asked = mathvista.dialogues(items, answers, {"quick_extract": quick})
        # One reply there was empty, and the stand-in did not give another.
        assert len(asked) == load(folder / "expected.json")["official"][name]["judge_requests"] - 1

    @pytest.mark.parametrize(("parser", "right"), [("lmms-eval", 31), ("vlmevalkit", 21)])
    def test_harnesses(self, files, parser, right):
        found = score("mathvista", *files, parser)
        assert sum(found.outcomes.values()) == right
        assert found.official["correct"] == 31

    def test_stored_extractions(self, folder):
        expected = load(folder / "expected.json")["official"]["stored_extractions"]
        found = score("mathvista", folder / "testmini.json", folder / "stored_extractions.json")
        assert found.official["stored_extractions"] == expected["average"]
        assert found.official["correct"] == 4
        assert "default" not in found.official
        for pid, (_, normal, right) in expected["predictions"].items():
            assert (found.readings[pid], found.outcomes[pid]) == (str(normal), float(right))
        assert found.counts["missing"] == 27
        assert any("27 of 51" in note for note in found.notes)

    def test_a_row_without_extraction(self, golden):
        with pytest.raises(UserError, match="no extraction for pid 13"):
            score("mathvista", None, golden / "evaluation" / "errors" / "mathvista" / "output.json")


def test_accuracy_is_over_the_answers_that_are_there(tmp_path):
    data = write(tmp_path / "testmini.json", {p: row(p) for p in "1234"})
    answers = write(tmp_path / "output.json", {"1": {"response": "5"}, "2": {"response": "6"}, "3": {"response": ""}})
    found = score("mathvista", data, answers)
    assert found.official["accuracy"] == 1 / 3
    assert figures(found)["skills/b"] == pytest.approx(100 / 3)
    assert found.counts["missing"] == 1
    assert found.counts["empty extractions"] == 1


def test_a_failed_reply_is_no_zero(tmp_path):
    answers = write(tmp_path / "output.json", {p: row(p, response="five, or so") for p in "12"})
    lines = [{"key": "1", "replies": ["", " 5 "]}, {"key": "2", "replies": [], "outcome": "refusal"}]
    found = score("mathvista", None, answers, write(tmp_path / "r.jsonl", lines))
    assert found.official["accuracy"] == 0.5
    assert figures(found)["accuracy"] == 100
    assert found.counts["no reply"] == 1
    assert "default" not in found.official
    assert "1 refusal" in found.notes[0]


def test_stored_extractions_are_not_asked_for(tmp_path):
    rows = {"1": row("1", response="five", extraction="5"), "2": row("2", response="six")}
    items, answers = mathvista.read_answers(write(tmp_path / "o.json", rows), None, {})
    assert list(mathvista.dialogues(items, answers, {})) == ["2"]


def test_an_empty_reply_is_asked_for_again(tmp_path):
    items, answers = mathvista.read_answers(
        write(tmp_path / "o.json", {"1": row("1", response="five {{x}}")}), None, {}
    )
    dialogue = mathvista.dialogues(items, answers, {})["1"]
    assert "five {{x}}" in dialogue([]).user
    assert items[0].fields["query"] in dialogue([" "]).user
    assert dialogue(["", "5"]) is None
    assert (dialogue([]).temperature, dialogue([]).max_tokens) == (0.0, 1024)


def test_queries(tmp_path):
    rows = {
        "1": row("1", unit="cm"),
        "2": row("2", answer_type="text"),
        "3": row("3", answer_type="float", precision=2.0),
    }
    write(tmp_path / "data" / "testmini.json", rows)
    prompts = [mathvista.prompt(item, "official") for item in mathvista.items(tmp_path, {})]
    assert prompts[0].endswith("\nQuestion: q1? (Unit: cm)")
    assert prompts[1].endswith("\nQuestion: q2?\nChoices:\n(A) 3\n(B) 5")
    assert "two decimal places" in prompts[2]
    write(tmp_path / "data" / "query.json", {"1": "as given"})
    items = mathvista.items(tmp_path / "data" / "testmini.json", {})
    assert mathvista.prompt(items[0], "official") == "as given"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(b"jpeg")
    assert items[0].pictures[0].read() == b"jpeg"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response": 5}, "pid 1: 'response' must be a text, not a number"),
        ({"question_type": "essay"}, "'question_type' must be one of"),
        ({"answer_type": "text", "question_type": "multi_choice", "choices": None}, "'choices' of a multiple choice"),
        ({"metadata": []}, "'metadata' must be an object"),
    ],
)
def test_records_of_another_form(tmp_path, change, message):
    answers = write(tmp_path / "output.json", {"1": {**row("1"), "response": "5", **change}})
    with pytest.raises(UserError, match=message):
        score("mathvista", None, answers)


def test_fields_that_are_missing(tmp_path):
    data = write(tmp_path / "testmini.json", {"1": row("1")})
    with pytest.raises(UserError, match="pid 1: no field 'response'"):
        score("mathvista", data, write(tmp_path / "output.json", {"1": {}}))
    with pytest.raises(UserError, match="pid 9: the data has no such question"):
        score("mathvista", data, write(tmp_path / "output.json", {"9": {"response": ""}}))
    without = {k: v for k, v in row("1", response="5").items() if k != "answer"}
    with pytest.raises(UserError, match="no field 'answer': name the data"):
        score("mathvista", None, write(tmp_path / "output.json", {"1": without}))
    with pytest.raises(UserError, match="quick_extract=maybe"):
        score("mathvista", data, write(tmp_path / "o.json", {"1": {"response": "5"}}), quick_extract="maybe")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"1": 5}', "{", '{"1": {}, "1": {}}'])
def test_files_of_another_form(tmp_path, content):
    path = tmp_path / "output.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"output\.json"):
        score("mathvista", None, path)
