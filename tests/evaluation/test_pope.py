"""POPE: the official tool's figures on golden, pairing by position, splits, and what is refused."""

import json

import numpy as np
import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation import pope

CASES = ("basic", "odd_labels", "fewer_answers", "wrong_order", "duplicate")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labels(*truths, start=1, word="dog", **more):
    return [
        {"question_id": start + k, "image": f"{k // 2}.jpg", "text": f"Is there a {word} {k}?", "label": truth, **more}
        for k, truth in enumerate(truths)
    ]


def scored(answers, data, parser="official"):
    return pope.score(*pope.read_answers(answers, pope.items(data, {}), {}), None, parser, {})


@pytest.mark.parametrize("form", ["answers", "llava_answers"])
@pytest.mark.parametrize("case", CASES)
def test_golden(golden, case, form):
    folder = golden / "evaluation" / "pope"
    expected = json.loads((folder / "expected.json").read_text())[case]["official"]
    score = scored(folder / f"{case}.{form}.jsonl", folder / f"{case}.labels.jsonl")
    assert score.official == expected
    figures = score.sums.figures()
    for name, ours in (("accuracy",) * 2, ("f1_score", "f1"), ("yes_ratio",) * 2, ("recall",) * 2):
        assert figures[ours] == pytest.approx(expected[name], abs=1e-9)


@pytest.mark.parametrize("case", [case for case in CASES if case != "odd_labels"])
def test_golden_harnesses(golden, case):
    folder = golden / "evaluation" / "pope"
    harness = json.loads((folder / "expected.json").read_text())[case]["harness_pairing_by_question_id"]
    data, answers = folder / f"{case}.labels.jsonl", folder / f"{case}.answers.jsonl"
    figures = scored(answers, data, "lmms-eval").sums.figures()
    for name, ours in (("accuracy",) * 2, ("precision",) * 2, ("recall",) * 2, ("f1_score", "f1")):
        assert figures[ours] == pytest.approx(harness["lmms_eval"][f"pope_{name}"])
    score = scored(answers, data, "vlmevalkit")
    figures, expected = score.sums.figures(), harness["vlmevalkit_exact_matching"]
    assert [100 * figures[name] for name in ("f1", "accuracy", "precision", "recall")] == pytest.approx(
        [expected[name] for name in ("Overall_F1", "acc", "precision", "recall")]
    )
    assert score.counts["undecided"] == expected["unknown"]


def test_golden_no_yes_at_all(golden):
    folder = golden / "evaluation" / "errors" / "pope"
    score = scored(folder / "answers.jsonl", folder / "labels.jsonl")
    assert [score.official[name] for name in ("accuracy", "precision", "recall", "f1_score")] == [0.5, 0, 0, 0]
    assert any("no answer is yes" in note for note in score.notes)


def test_more_answers_than_labels(tmp_path):
    """They count in the yes ratio and nowhere else."""
    data = write(tmp_path / "labels", labels("yes", "no"))
    score = scored(write(tmp_path / "a", [{"answer": text} for text in ("Yes", "No", "Yes")]), data)
    assert score.official["accuracy"] == 1.0
    assert score.official["yes_ratio"] == 2 / 3
    assert score.sums.figures()["yes_ratio"] == 2 / 3
    assert score.counts["without a label"] == 1
    assert "1 answers have no label" in score.notes[0]


def test_what_does_not_belong_together_is_said(tmp_path):
    data = write(tmp_path / "labels", labels("yes", "no", "No"))
    rows = [
        {"question_id": 3, "question": "Is there a dog 2?", "answer": "Yes"},
        {"question_id": 2, "question": "Is there a dog 1?\nOne word.", "answer": "No"},
        {"question_id": "3", "prompt": "Is there a dog 2?", "answer": "No"},
    ]
    score = scored(write(tmp_path / "a", rows), data)
    assert [note.split(" ")[:2] for note in score.notes] == [["1", "answers"], ["1", "answers"], ["1", "labels"]]
    assert (score.official["TP"], score.official["TN"], score.official["FN"]) == (1, 1, 1)  # "No" is yes, officially


def folder_of_three(folder):
    folder.mkdir()
    for split, truths in (("random", ("yes", "no")), ("popular", ("no", "no")), ("adversarial", ("yes", "yes"))):
        write(folder / f"coco_pope_{split}.json", labels(*truths, word=split))
    return folder


def test_three_splits_in_folders(tmp_path):
    data = folder_of_three(tmp_path / "data")
    items = pope.items(data, {})
    assert len({item.id for item in items}) == 6
    assert items[2].id == "popular/1"
    answers = tmp_path / "answers"
    answers.mkdir()
    for split in pope.SPLITS:
        write(answers / f"llava_{split}.jsonl", [{"text": "Yes"}, {"text": "Yes"}])
    score = scored(answers, data)
    f1 = {split: score.official[split]["f1_score"] for split in pope.SPLITS}
    assert f1 == {"random": pytest.approx(2 / 3), "popular": 0.0, "adversarial": 1.0}
    assert score.official["mean_f1_score"] == pytest.approx(5 / 9) == score.sums.figures()["f1"]
    assert score.sums.figures()["random/f1"] == pytest.approx(2 / 3)
    (answers / "llava_popular.jsonl").unlink()
    with pytest.raises(UserError, match="no file with 'popular' in the name"):
        scored(answers, data)


@pytest.mark.parametrize("order", [pope.SPLITS, ("adversarial", "popular", "random")])
def test_three_splits_in_one_file(tmp_path, order):
    """Ids repeat from split to split, so the questions' texts say which comes first."""
    data = folder_of_three(tmp_path / "data")
    said = {"random": ("Yes", "No"), "popular": ("No", "Yes"), "adversarial": ("Yes", "No")}
    rows = [
        {"question_id": k + 1, "prompt": f"Is there a {split} {k}?\nOne word.", "text": text}
        for split in order
        for k, text in enumerate(said[split])
    ]
    score = scored(write(tmp_path / "a", rows), data)
    assert [score.official[split]["accuracy"] for split in pope.SPLITS] == [1.0, 0.5, 0.5]
    assert score.notes == []


def test_one_file_of_labels_with_categories(tmp_path):
    rows = labels("yes", "no", category="random") + labels("yes", "no", start=11, category="popular")
    data = write(tmp_path / "labels", rows)
    by_id = [{"question_id": k, "answer": "Yes" if k in (1, 11) else "No"} for k in (11, 12, 1, 2)]
    by_category = [{"category": c, "answer": a} for c in ("popular", "random") for a in ("Yes", "No")]
    by_position = [{"answer": a} for a in ("Yes", "No", "Yes", "No")]
    for name, answers in (("id", by_id), ("category", by_category), ("position", by_position)):
        score = scored(write(tmp_path / name, answers), data)
        assert score.official["random"]["accuracy"] == score.official["popular"]["accuracy"] == 1.0, name


def test_images_and_resampling(tmp_path):
    data = write(tmp_path / "labels", labels("yes", "no", "yes", "no"))
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "0.jpg").write_bytes(b"jpeg")
    items = pope.items(data, {})
    assert items[0].pictures[0].read() == b"jpeg"
    assert pope.prompt(items[0], "official") == "Is there a dog 0?"
    assert pope.prompt(items[0], "llava") == "Is there a dog 0?\nAnswer the question using a single word or phrase."
    sums = scored(write(tmp_path / "a", [{"answer": a} for a in ("Yes", "No", "No", "Yes")]), data).sums
    assert sums.figures(np.array([[2.0, 0.0], [0.0, 2.0]]))["accuracy"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"question_id": 1}], "line 1: no field 'answer'"),
        ([{"answer": True}], "line 1: answer must be a text, found true or false"),
        ([{"answer": "Yes"}, {"answer": None}], "line 2: answer must be a text, found null"),
        ([{"question_id": [1], "answer": "Yes"}], "line 1: question_id must be a text or an integer, found a list"),
        (labels("yes"), "line 1: has a label and no answer"),
        ([], "empty"),
    ],
)
def test_malformed_answers(tmp_path, answers, message):
    data, path = write(tmp_path / "labels", labels("yes", "no")), write(tmp_path / "a", answers)
    with pytest.raises(UserError) as error:
        scored(path, data)
    assert f"{path}: {message}" in str(error.value)


def test_malformed_data(tmp_path):
    for rows, message in (([{"question_id": 1}], "no field 'label'"), ([{"label": 1}], "label must be a text")):
        with pytest.raises(UserError, match=message):
            pope.items(write(tmp_path / "labels", rows), {})
    with pytest.raises(UserError, match="no coco_pope_random"):
        pope.items(tmp_path, {})
    with pytest.raises(UserError, match="name them with --data"):
        pope.read_answers(tmp_path / "labels", None, {})
    item = pope.items(write(tmp_path / "labels", [{"label": "no"}]), {})[0]
    with pytest.raises(UserError, match="the data holds no text"):
        pope.prompt(item, "official")
