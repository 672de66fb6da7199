"""HallusionBench: the official tool's figures on golden, what an error is blamed on, and what is refused."""

import json

import numpy as np
import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation import hallusionbench as bench
from silkie_jax.evaluation.benchmark import Replies
from silkie_jax.evaluation.rules.verdicts import blame, read_same, read_verdict


def row(figure, question="0", category="VD", truth="1", prediction="Yes", **more):
    visual = ("0" if category == "VS" else "1") if figure == "0" else "2"
    return {
        "category": category,
        "subcategory": "chart",
        "visual_input": visual,
        "set_id": "0",
        "figure_id": figure,
        "question_id": question,
        "question": f"Question {question}?",
        "gt_answer_details": "It is {so}.",
        "gt_answer": truth,
        "model_prediction": prediction,
        **more,
    }


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def scored(path, replies=None, parser="official"):
    items, answers = bench.read_answers(path, None, {})
    if replies is not None:
        replies = Replies([replies])
    return bench.score(items, answers, replies, parser, {})


@pytest.fixture
def judged(golden):
    folder = golden / "evaluation" / "hallusionbench"
    raw = json.loads((folder / "judge_replies.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    return folder / "HallusionBench_result.json", bench.official_replies(raw, [], []), expected


def test_golden(judged):
    path, replies, expected = judged
    score = scored(path, replies)
    printed = {name: value for name, value in expected["official"].items() if not isinstance(value, dict)}
    assert score.official == printed
    figures, names = score.sums.figures(), {"aAcc": "per question (aAcc)", "qAcc": "per question pair (qAcc)"}
    for ours, official in names.items():
        assert round(float(figures[ours]), 4) == printed[f"Acc {official}"]
    assert score.counts["rows"] == 103
    assert score.notes == []


def test_golden_verdicts(judged):
    _, replies, expected = judged
    digits = {key: read_verdict(first) + str(int(read_same(second))) for key, (first, second) in replies.items()}
    assert digits == expected["official"]["verdicts"]


def test_golden_saved_verdicts(judged, tmp_path):
    """The tool's own files hold digits; the replies are not needed then."""
    path, _, expected = judged
    rows = json.loads(path.read_text())
    for r in rows:
        key = "_".join(r[k] for k in ("category", "subcategory", "set_id", "figure_id", "question_id"))
        r["gpt4v_output_gpt_check"], r["same"] = expected["official"]["verdicts"][key]
    for category in ("VD", "VS"):
        part = [r for r in rows if r["category"] == category]
        write(tmp_path / f"hallusion_output_{category.lower()}_model.json", part)
    score = scored(tmp_path)
    assert score.official == {k: v for k, v in expected["official"].items() if not isinstance(v, dict)}
    items, answers = bench.read_answers(tmp_path, None, {})
    assert bench.dialogues(items, answers, {}) == {}
    assert score.counts["saved verdicts"] == 103


def test_golden_harnesses(judged):
    path, replies, expected = judged
    figures = scored(path, replies, "lmms-eval").sums.figures()
    harness = expected["harness"]["lmms_eval_questions_with_an_image_only_as_its_split"]
    assert {name: round(float(figures[name]), 4) for name in harness} == harness
    score = scored(path, None, "vlmevalkit")  # no judge
    harness = dict(expected["harness"]["vlmevalkit_exact_matching_questions_with_an_image_only"])
    assert score.counts["undecided"] == harness.pop("unknown")
    assert {name: score.sums.figures()[name] for name in harness} == pytest.approx(harness)
    assert score.official == {}


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Correct.", "1"),
        ("INCORRECT", "0"),
        ("correct, not incorrect", "0"),
        ("not correct", "1"),
        ("in-correct", "1"),
        ("wrong", "2"),
        ("", "2"),
    ],
)
def test_verdicts(reply, verdict):
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize(
    ("category", "edited", "counterfactual", "verdict", "original", "same", "cause"),
    [
        ("VD", False, False, "2", "2", False, "VI"),
        ("VD", True, True, "0", "1", True, "Mixed"),
        ("VD", True, True, "0", "1", False, "VI"),
        ("VD", True, True, "2", "1", True, "VI"),
        ("VD", True, True, "0", "0", True, "VI"),
        ("VS", False, False, "0", "0", False, "LH"),
        ("VS", False, False, "2", "2", False, None),
        ("VS", True, True, "0", "0", True, "LH"),
        ("VS", True, True, "0", "0", False, "Mixed"),
        ("VS", True, False, "2", "0", True, "Mixed"),
        ("VS", True, True, "0", "2", True, "VI"),
        ("VS", True, True, "0", "1", True, "LH"),
        ("VS", True, False, "0", "1", True, "VI"),
        ("VS", True, True, "2", "1", True, "VI"),
        ("VS", True, True, "1", "0", True, None),
    ],
)
def test_blame(category, edited, counterfactual, verdict, original, same, cause):
    assert blame(category, edited, counterfactual, verdict, original, same) == cause


def test_groups_by_hand(tmp_path):
    """VS without a figure: unclear is right, and it is in no figure. Pairs and figures need all answers."""
    rows = [
        row("0", category="VS"),
        row("1", category="VS"),
        row("0", "1", category="VS"),
        row("1", "1", category="VS"),
    ]
    keys = ["VS_chart_0_0_0", "VS_chart_0_1_0", "VS_chart_0_0_1", "VS_chart_0_1_1"]
    said = dict(zip(keys, (["unclear", ""], ["unclear", "different"], ["correct", ""], ["correct", ""]), strict=True))
    score = scored(write(tmp_path / "a.json", rows), said)
    official = score.official
    assert score.outcomes == dict(zip(keys, (1.0, 0.0, 1.0, 1.0), strict=True))
    assert official["Acc per question (aAcc)"] == 75.0
    assert official["Acc per question pair (qAcc)"] == 50.0
    assert official["Acc per figure (fAcc)"] == 0.0
    assert official["Consistency Test (inconsistent)"] == 100.0
    assert (official["Acc per easy question (easy aAcc)"], official["Acc per hard question (hard aAcc)"]) == (
        100.0,
        50.0,
    )
    assert official["Yes/No Bias (FP Ratio)"] == 0.0
    assert official["VI"] == 100.0
    assert score.sums.images == ("VS/chart/0",)
    assert score.sums.figures(np.array([[1.0], [2.0]]))["mean"].tolist() == pytest.approx([125 / 3] * 2)


def test_nothing_wrong(tmp_path):
    score = scored(write(tmp_path / "a.json", [row("0")]), {"VD_chart_0_0_0": ["correct", "same"]})
    assert [score.official[name] for name in ("Yes/No Bias (FP Ratio)", "LH", "VI", "Mixed")] == [None] * 4
    assert score.official["Acc per hard question (hard aAcc)"] is None
    assert np.isnan(score.sums.figures()["hard aAcc"])
    assert "No answer is wrong" in score.notes[0]


def test_failed_judge_is_said(tmp_path):
    path = write(tmp_path / "a.json", [row("0"), row("1")])
    score = scored(path, {"VD_chart_0_0_0": ["correct"]})
    assert score.counts["without a verdict"] == 1
    assert score.readings["VD_chart_0_1_0"] == "unclear"
    assert score.notes == ["1 answers have no usable reply of the judge; they count as unclear."]
    score = scored(path, {"VD_chart_0_0_0": ["correct"], "VD_chart_0_1_0": ["incorrect"]})
    assert "1 wrong answers were not compared" in score.notes[0]
    for replies in (None, {}):
        with pytest.raises(UserError, match="official needs the judge's replies"):
            scored(path, replies)


def test_dialogue(tmp_path):
    """Braces in texts stay; the second request compares with the answer on the original figure."""
    items, answers = bench.read_answers(write(tmp_path / "a.json", [row("0"), row("1", prediction="{No}")]), None, {})
    ask = bench.dialogues(items, answers, {})["VD_chart_0_1_0"]
    first = ask([])
    assert all(text in first.user for text in ("Question 0?", "It is {so}.", "{No}"))
    assert first.max_tokens is None
    assert first.system is None
    second = ask(["correct"])
    assert "{No}" in second.user
    assert "Yes" in second.user
    assert "Question" not in second.user
    assert ask(["correct", "same"]) is None


def test_items_and_pictures(tmp_path):
    write(tmp_path / "HallusionBench.json", [row("0"), row("0", category="VS"), row("1", "0", category="VS")])
    (tmp_path / "hallusion_bench" / "VD" / "chart").mkdir(parents=True)
    (tmp_path / "hallusion_bench" / "VD" / "chart" / "0_0.png").write_bytes(b"png")
    items = bench.items(tmp_path, {})
    assert [len(item.pictures) for item in items] == [1, 0, 1]
    assert items[0].pictures[0].read() == b"png"
    assert bench.prompt(items[0], "official") == "Question 0?"
    answers = write(tmp_path / "a.json", [row("0")])
    assert bench.read_answers(answers, items, {})[0] is items
    with pytest.raises(UserError, match="row 1: no question VD_chart_0_1_0 in the data"):
        bench.read_answers(write(tmp_path / "a.json", [row("1")]), items, {})


@pytest.mark.parametrize(
    ("name", "message"),
    [("row_twice", "VD_illusion_3_1_1 again, after row 1"), ("no_figure_0", "no row of question VD_illusion_3_0")],
)
def test_golden_errors(golden, name, message):
    path = golden / "evaluation" / "errors" / "hallusionbench" / f"{name}.json"
    with pytest.raises(UserError) as error:
        bench.dialogues(*bench.read_answers(path, None, {}), {})
    assert str(path) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "found an empty one"),
        ({"a": 1}, "expected a JSON list of rows, found an object"),
        ([1], "row 1: expected an object, found a number"),
        ([row("0", category="VX")], "row 1: category must be VD or VS, found 'VX'"),
        ([row("0", truth="2")], "row 1: gt_answer must be one of 0, 1, found '2'"),
        ([row("0", visual_input="3")], "row 1: visual_input must be one of 0, 1, 2, found '3'"),
        ([row("0", prediction=None)], "row 1: model_prediction must be a text, found null"),
        ([row("0", same="yes")], "row 1: same must be 0, 1 or 2, found 'yes'"),
        ([{"category": "VD"}], "row 1: no field 'subcategory'"),
    ],
)
def test_malformed(tmp_path, rows, message):
    path = write(tmp_path / "a.json", rows)
    with pytest.raises(UserError) as error:
        scored(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("raw", [[], {"correctness": {}}, {"correctness": {"a": 1}, "same": {}}])
def test_malformed_replies(raw):
    with pytest.raises(UserError, match="must be an object of texts"):
        bench.official_replies(raw, [], [])
