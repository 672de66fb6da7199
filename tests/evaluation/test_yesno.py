"""Yes/no: every tool's rule on golden's traps and on ours, and the generic benchmark."""

import json

import numpy as np
import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation import yesno
from silkie_jax.evaluation.rules.yesno import RULES, confusion, confusion_figures


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(k, answer, response, **more):
    return {"id": k, "image": f"{k}.jpg", "question": "Is it?", "answer": answer, "response": response, **more}


@pytest.mark.parametrize("rule", RULES)
def test_golden_labels(golden, rule):
    folder = golden / "evaluation" / "yesno_mcq"
    expected = json.loads((folder / "expected.json").read_text())["yesno.jsonl"][rule]
    _, answers = yesno.read_answers(folder / "yesno.jsonl", None, {})
    assert [RULES[rule](answer.text) for answer in answers] == expected["labels"]


def test_golden_numbers_right(golden):
    folder = golden / "evaluation" / "yesno_mcq"
    expected = json.loads((folder / "expected.json").read_text())["yesno.jsonl"]
    items, answers = yesno.read_answers(folder / "yesno.jsonl", None, {})
    for rule in RULES:
        score = yesno.score(items, answers, None, rule, {})
        assert score.official == {name: labels["right"] for name, labels in expected.items()}
        assert score.counts["undecided"] == expected[rule]["undecided"]
        assert score.sums.figures()["accuracy"] == expected[rule]["right"] / len(items)


@pytest.mark.parametrize(
    ("rule", "text", "label"),
    [
        ("mme_official", "  yes", "other"),  # the first four characters are not stripped
        ("mme_official", "  no", "no"),
        ("mme_official", "   no", "other"),
        ("mme_official", "no yes", "no"),
        ("mme_official", "eyes", "yes"),
        ("mme_lmms_eval", ".y.", "yes"),
        ("mme_lmms_eval", "...no", "no"),
        ("pope_official", "Mr. Smith is not", "yes"),
        ("pope_official", "no\n", "yes"),
        ("pope_official", "It is,no", "yes"),  # the comma goes and leaves "isno"
        ("pope_official", "It is, no", "no"),
        ("pope_official", ".No", "yes"),
        ("pope_lmms_eval_exact_after_lower_and_strip", "Yes.", "other"),
        ("vlmevalkit", "a/no", "no"),
        ("vlmevalkit", "a/no /", "unknown"),  # a space beside one slash drops both
        ("vlmevalkit", "1,000 yes-sir", "unknown"),  # so does a comma inside a number
        ("vlmevalkit", ". " * 31 + "yes.", "yes"),
        ("vlmevalkit", ". " * 32 + "yes.", "unknown"),  # no more than 32 full stops are taken out
        ("amber_official_exact", "Yes ", "other"),
        ("amber_lmms_eval", "I cannot say yes", "yes"),
    ],
)
def test_traps(rule, text, label):
    assert RULES[rule](text) == label


def test_confusion():
    assert [
        confusion(r, t) for r, t in [("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"), ("other", "no")]
    ] == [
        "TP",
        "FP",
        "TN",
        "FN",
        None,
    ]
    counts = {"TP": np.array([3.0, 0.0]), "FP": np.array([1.0, 0.0]), "FN": np.array([2.0, 1.0])}
    figures = confusion_figures(counts)
    assert figures["f1"].tolist() == [6 / 9, 0.0]
    assert np.isnan(figures["precision"][1])
    assert figures["precision"][0] == 0.75


def test_answers_beside_data(tmp_path):
    data = write(tmp_path / "data.jsonl", [row(k, "yes", "") for k in "abc"])
    answers = write(tmp_path / "answers.jsonl", [{"id": "c", "response": "Yes"}, {"id": "a", "response": "perhaps"}])
    items, found = yesno.read_answers(answers, yesno.items(data, {}), {})
    score = yesno.score(items, found, None, "mme_official", {})
    assert score.official["mme_official"] == 1
    assert score.counts == {"rows": 3, "answers": 2, "undecided": 1, "missing": 1}
    assert score.outcomes == {"a": 0.0, "c": 1.0}
    assert len(score.notes) == 2
    assert "1 of 3 questions have no answer" in score.notes[1]
    assert score.sums.figures()["accuracy"] == 1 / 3


def test_figures_of_resampled_images(tmp_path):
    rows = [row(0, "yes", "yes"), row(1, "no", "yes"), {**row(2, "yes", "no"), "image": "0.jpg"}]
    items, answers = yesno.read_answers(write(tmp_path / "a", rows), None, {})
    sums = yesno.score(items, answers, None, "mme_official", {}).sums
    assert sums.images == ("0.jpg", "1.jpg")
    figures = sums.figures(np.array([[2.0, 0.0], [0.0, 2.0]]))
    assert figures["accuracy"].tolist() == [0.5, 0.0]
    assert figures["precision"].tolist() == [1.0, 0.0]


def test_pictures_lie_beside_the_file_or_in_images(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(b"jpeg")
    (item,) = yesno.items(write(tmp_path / "a.jsonl", [row(0, "no", "")]), {})
    assert item.pictures[0].read() == b"jpeg"
    assert item.cluster == "0.jpg"
    assert yesno.prompt(item, "question") == "Is it?"
    assert yesno.prompt(item, "yes-no") == "Is it? Please answer yes or no."


@pytest.mark.parametrize("form", ["list", "commas", "crlf", "bom", "separator"])
def test_forms_that_are_read_all_the_same(tmp_path, form):
    rows = [row(0, "yes", "Yes\u2028no, yes"), row(1, "no", "No")]
    lines = [json.dumps(r, ensure_ascii=False) for r in rows]
    text = {
        "list": json.dumps(rows, indent=1),
        "commas": ",\n".join(lines) + ",\n",
        "crlf": "\r\n".join(lines),
        "bom": "\ufeff" + "\n".join(lines),
        "separator": "\n\n".join(lines) + "\n\n",
    }[form]
    path = tmp_path / "a.jsonl"
    path.write_bytes(text.encode())
    items, answers = yesno.read_answers(path, None, {})
    assert yesno.score(items, answers, None, "mme_official", {}).official["mme_official"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ("[]", "empty"),
        ("[3]", "entry 1: expected an object, found a number"),
        ("null", "line 1: expected an object, found null"),
        ("{", "line 1: not JSON"),
        ("[\n{]", "not JSON"),
        ("9" * 5000, "not JSON that can be read"),
        (json.dumps(row(0, "yes", 3)), "line 1: response must be a text, found a number"),
        (json.dumps(row(0, "yes", None)), "line 1: response must be a text, found null"),
        (json.dumps(row(0, "maybe", "")), "line 1: answer must be yes or no, found 'maybe'"),
        (json.dumps(row(0, True, "")), "line 1: answer must be a text, found true or false"),
        (json.dumps(row(True, "yes", "")), "line 1: id must be a text or an integer"),
        (json.dumps({"id": 1, "answer": "no", "question": ""}), "line 1: no field 'response'"),
        (json.dumps(row(0, "yes", "")) + "\n" + json.dumps(row("0", "no", "")), "line 2: id '0' again, after line 1"),
        (json.dumps(row(0, "yes", "", image=[])), "line 1: image must be a text, found a list"),
    ],
)
def test_malformed(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        yesno.read_answers(path, None, {})
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_answer_to_no_question(tmp_path):
    items = yesno.items(write(tmp_path / "data", [row(0, "yes", "")]), {})
    with pytest.raises(UserError, match="line 1: no question '7'"):
        yesno.read_answers(write(tmp_path / "a", [{"id": 7, "response": ""}]), items, {})


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        yesno.read_answers(tmp_path / "a", None, {})
