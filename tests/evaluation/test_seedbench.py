"""SEED-Bench: three forms of answers on golden, prompts, and what is refused."""

import json

import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation import seedbench as bench
from silkie_jax.evaluation.benchmark import Answer


def question(number, answer="A", dimension=1, **more):
    choices = {f"choice_{letter}": f"content {letter}" for letter in "abcd"}
    kind = "image" if dimension < 10 else "video"
    data = {"question": "Which?", "question_id": number, "question_type_id": dimension, "data_type": kind}
    return {"answer": answer, "data_id": f"{number}.jpg", **data, **choices, **more}


def data_of(path, *questions, names=None):
    found = {"question_type": names or {"Scene Understanding": 1, "Action Recognition": 10}, "questions": questions}
    path.write_text(json.dumps(found))
    return path


def write(path, rows, end="\n"):
    path.write_text("".join(json.dumps(row) + end for row in rows))
    return path


def scored(answers, data, parser="official"):
    items = None if data is None else bench.items(data, {})
    return bench.score(*bench.read_answers(answers, items, {}), None, parser, {})


@pytest.fixture
def expected(golden):
    return json.loads((golden / "evaluation" / "seedbench" / "expected.json").read_text())


@pytest.fixture
def folder(golden):
    return golden / "evaluation" / "seedbench"


def test_golden_llava(folder, expected):
    score = scored(folder / "answers.llava.jsonl", folder)
    assert score.official == {"llava_script": expected["llava_script_on_answers.llava.jsonl"]}
    assert (score.counts["missing"], score.counts["repeated"]) == (2, 1)
    assert len(score.notes) == 3
    assert round(float(score.sums.figures()["image"]), 2) == score.official["llava_script"]["image"]


def test_golden_leaderboard(folder, expected):
    official = scored(folder / "results.json", folder).official
    counts = official["leaderboard_form"] | official["leaderboard_form_by_dimension"]
    assert counts == expected["leaderboard_form_results.json_right_and_total"]
    assert list(official["leaderboard_form"]) == ["all", "image", "video"]


def test_golden_likelihood(folder, expected):
    score = scored(folder / "losses.json", folder)
    assert score.official == {"likelihood_mean_image": expected["likelihood"]["image_right_and_total"]}
    assert score.readings == expected["likelihood"]["mean_over_tokens_argmin"]
    added = scored(folder / "losses.json", folder, "likelihood-sum")
    assert added.readings == expected["likelihood"]["sum_over_tokens_argmin_for_contrast"]
    right, total = expected["likelihood"]["image_right_and_total_by_sum"]
    assert added.sums.figures()["image"] == 100 * right / total


def test_golden_harnesses(folder, expected):
    figures = scored(folder / "answers.llava.jsonl", folder, "lmms-eval").sums.figures()
    harness = expected["harness"]["lmms_eval"]
    assert [figures[name] for name in ("image", "total", "video")] == pytest.approx(
        [harness[name] for name in ("seed_image", "seed_all", "seed_video")]
    )
    score = scored(folder / "answers.llava.jsonl", folder, "vlmevalkit")
    harness = expected["harness"]["vlmevalkit_can_infer"]
    assert sum(score.outcomes.values()) == harness["right"]
    assert len(score.outcomes) == harness["answered"]
    assert score.counts["undecided"] == harness["not_inferred_goes_to_a_judge"]


def test_llava_looks_for_integers(tmp_path):
    """A question_id "1" is a text, which LLaVA's script does not find; our own figures do."""
    data = data_of(tmp_path / "d.json", question("1"), question("v2", dimension=10))
    score = scored(write(tmp_path / "a", [{"question_id": "1", "text": "A"}, {"question_id": "v2", "text": "A"}]), data)
    assert score.official["llava_script"]["image"] == 0.0
    assert score.official["llava_script"]["video"] == 100.0
    assert score.sums.figures()["image"] == 100.0
    assert "does not find 1 answers" in score.notes[-1]
    score = scored(write(tmp_path / "a", [{"question_id": 1, "text": "A"}, {"question_id": "v2", "text": "B"}]), data)
    assert score.official["llava_script"] == {
        "Scene Understanding": 100.0,
        "Action Recognition": 0.0,
        "Total": 50.0,
        "image": 100.0,
        "video": 0.0,
    }


def test_published_files_need_no_data(tmp_path):
    rows = [{"question_id": k, "prediction": p, "gt_answer": "B"} for k, p in ((1, "B"), (2, "A"), (2, "B"), (3, "C"))]
    score = scored(write(tmp_path / "a", rows, end=",\n"), None)
    assert score.official == {"leaderboard_form": {"all": [2, 3]}}
    assert score.counts["repeated"] == 1
    assert score.sums.figures()["total"] == pytest.approx(200 / 3)


def test_own_answers_and_dimensions(tmp_path):
    """Answers that a model gave here: letters without a form, or losses."""
    data = data_of(tmp_path / "d.json", question("1"), question("2", "B"), question("v3", dimension=10))
    items = bench.items(data, {"dimensions": "image"})
    assert [item.id for item in items] == ["1", "2"]
    assert len(bench.items(data, {})) == 3
    assert [bench.answerable(item) for item in bench.items(data, {})] == [True, True, False]
    score = bench.score(items, [Answer("1", "A"), Answer("2", "B.")], None, "official", {})
    assert score.official["llava_script"]["Total"] == 50.0
    assert "video" not in score.official["llava_script"]
    tie = {"losses": [[3.0], [2.0, 2.0], [2.0], [9.0]]}
    score = bench.score(items, [Answer("1", "", tie), Answer("2", "", tie)], None, "official", {})
    assert score.readings == {"1": "B", "2": "B"}
    assert score.official == {"likelihood_mean_image": [1, 2]}
    with pytest.raises(UserError, match="dimensions must be all or image"):
        bench.items(data, {"dimensions": "7"})


def test_a_loss_that_is_not_a_number_comes_last(tmp_path):
    data = data_of(tmp_path / "d.json", question("1", "D"))
    losses = [[float("nan")], [3.0], [4.0], [1.0]]
    score = scored(write(tmp_path / "a", [{"question_id": 1, "token_losses_of_choices": losses}]), data)
    assert score.readings == {"1": "D"}


def test_prompts(tmp_path):
    (item,) = bench.items(data_of(tmp_path / "d.json", question("1")), {})
    lettered = "A. content a\nB. content b\nC. content c\nD. content d"
    assert bench.prompt(item, "official") == "Which?"
    assert bench.continuations(item, "official")[0] == "content a"
    assert bench.prompt(item, "qwen") == f"Question: Which?\nOptions: {lettered}\nAnswer:"
    assert bench.continuations(item, "qwen") == (" A", " B", " C", " D")
    ask = "Answer with the option's letter from the given choices directly."
    assert bench.prompt(item, "llava") == f"Which?\n{lettered}\n{ask}"
    assert bench.continuations(item, "llava") == ()
    assert bench.prompt(item, "instructblip") == "Question: Which?\nAnswer:"
    (tmp_path / "SEED-Bench-image").mkdir()
    (tmp_path / "SEED-Bench-image" / "1.jpg").write_bytes(b"jpeg")
    assert item.pictures[0].read() == b"jpeg"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": 1}], "line 1: expected question_id with one of"),
        ([{"text": "A"}], "line 1: no field 'question_id'"),
        ([{"question_id": 1.5, "text": "A"}], "line 1: question_id must be a text or an integer"),
        ([{"question_id": 1, "text": ["A"]}], "line 1: text must be a text, found a list"),
        ([{"question_id": 1, "text": "A"}, {"question_id": 2, "prediction": "A"}], "line 2: no field 'text'"),
        ([{"question_id": 1, "token_losses_of_choices": [[1.0]]}], "must be 4 lists of losses, one a choice; found 1"),
        ([{"question_id": 1, "token_losses_of_choices": [[1.0], [], [1], [2]]}], "lists of one number or more"),
        ([{"question_id": 1, "token_losses_of_choices": [[1.0], ["2"], [1], [2]]}], "lists of one number or more"),
        ([{"question_id": 1, "token_losses_of_choices": "abcd"}], "found a text"),
    ],
)
def test_malformed_answers(tmp_path, rows, message):
    data, path = data_of(tmp_path / "d.json", question("1"), question("2")), write(tmp_path / "a", rows)
    with pytest.raises(UserError) as error:
        scored(path, data)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_malformed_data(tmp_path):
    path = tmp_path / "SEED-Bench.json"
    for text, message in (("[]", "expected an object of question_type"), ("{", "not JSON")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            bench.items(tmp_path, {})
    for wrong, message in (
        (question("1", answer="E"), "question 2: answer must be A, B, C or D, found 'E'"),
        (question("1", dimension=5), "question 2: question_type_id 5 is not in question_type"),
        (question("0"), "question 2: question_id '0' again"),
        ("words", "question 2: expected an object, found a text"),
    ):
        with pytest.raises(UserError, match=message):
            bench.items(data_of(path, question("0"), wrong), {})
    with pytest.raises(UserError, match=r"name SEED-Bench\.json with --data"):
        scored(write(tmp_path / "a", [{"question_id": 1, "prediction": "A"}]), None)


def test_losses_are_compared_in_float32(tmp_path):
    data = data_of(tmp_path / "d.json", question("1"))
    losses = [[1.00000001], [1.0], [2.0], [2.0]]  # equal in float32, so the first wins
    score = scored(write(tmp_path / "a", [{"question_id": 1, "token_losses_of_choices": losses}]), data)
    assert score.readings == {"1": "A"}
