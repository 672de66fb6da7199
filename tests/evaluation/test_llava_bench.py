"""LLaVA-Bench: the official tool's numbers, and files that it would take or mix up."""

import math

import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation import llava_bench
from tests.evaluation.scoring import figures, load, score, write


@pytest.fixture
def folder(golden):
    return golden / "evaluation" / "llava_bench"


@pytest.fixture
def data(tmp_path):
    """Three questions on two images."""
    categories = ("conv", "detail", "llava_bench_complex")
    questions = [
        {"question_id": n, "image": f"{n % 2}.jpg", "text": f"q{n}?", "category": c} for n, c in enumerate(categories)
    ]
    write(tmp_path / "questions.jsonl", questions)
    write(tmp_path / "context.jsonl", [{"image": "0.jpg", "caption": ["a", "b"]}, {"image": "1.jpg", "caption": "c"}])
    write(tmp_path / "answers_gpt4.jsonl", [{"question_id": n, "text": f"reference {n}"} for n in range(3)])
    return tmp_path


def answers(path, order=(0, 1, 2)):
    return write(path / "answers.jsonl", [{"question_id": n, "text": f"model\u2028{n}"} for n in order])


class TestGolden:
    @pytest.mark.parametrize("replies", ["judge_replies.json", "reviews.jsonl"])
    def test_replies(self, folder, replies):
        expected = load(folder / "expected.json")["official"]
        found = score("llava_bench", folder, folder / "answers_model.jsonl", folder / replies)
        assert found.official == expected["ratio_reference_model_by_category"]
        assert list(found.outcomes.values()) == [pair[1] for pair in expected["tuples"]]
        assert found.counts["no scores"] == expected["failed_to_parse"]

    def test_saved_reviews_alone(self, folder):
        found = score("llava_bench", None, folder / "reviews.jsonl")
        assert found.official == load(folder / "expected.json")["official"]["ratio_reference_model_by_category"]

    def test_lmms_eval(self, folder):
        found = score("llava_bench", folder, folder / "answers_model.jsonl", folder / "judge_replies.json", "lmms-eval")
        expected = load(folder / "expected.json")["harness"]
        assert round(figures(found)["ratio"], 1) == expected["lmms_eval_all"]
        assert list(found.outcomes.values()) == [pair[1] for pair in expected["lmms_eval_tuples"]]
        assert found.official["all"] == [73.5, 52.2, 38.3]

    def test_an_unknown_category(self, golden):
        with pytest.raises(UserError, match=r"questions.jsonl: line 2: unknown category 'poem'"):
            llava_bench.items(golden / "evaluation" / "errors" / "llava_bench", {})


def test_by_hand(data):
    found = score("llava_bench", data, answers(data), write(data / "r.json", ["8 6", "10 9\nx", "no"]))
    assert found.official["llava_bench_conv"] == [75.0, 80.0, 60.0]
    assert found.official["llava_bench_complex"] == [100.0, -10.0, -10.0]
    assert found.official["all"] == [round(4.667 / 5.667 * 100, 1), 56.7, 46.7]
    assert figures(found)["detail/ratio"] == 90
    assert "1 replies hold no two scores" in found.notes[0]


def test_failed_replies_are_no_scores(data):
    lines = [{"key": "0", "replies": ["8 6"]}, {"key": "1", "replies": ["10 9"]}]
    lines.append({"key": "2", "replies": [], "outcome": "refusal"})
    found = score("llava_bench", data, answers(data), write(data / "r.jsonl", lines))
    assert figures(found)["ratio"] == pytest.approx(100 * 15 / 18)
    assert found.official["llava_bench_complex"] == [100.0, -10.0, -10.0]
    assert found.counts["no reply"] == 1


def test_a_reference_of_zero_has_no_ratio(data):
    found = score("llava_bench", data, answers(data), write(data / "r.json", ["0 6", "10 9", "nan 1"]))
    assert found.official["llava_bench_conv"] == [None, 0.0, 60.0]
    assert math.isnan(figures(found)["conv/ratio"])
    assert found.counts["not a number"] == 1


def test_answers_are_paired_by_question(data):
    given = answers(data, (2, 0, 1))
    found = score("llava_bench", data, given, write(data / "r.json", {"0": "8 6", "1": "8 4", "2": "8 2"}))
    assert found.official["llava_bench_complex"] == [25.0, 80.0, 20.0]
    assert any("another order" in note for note in found.notes)


def test_the_request(data):
    items, given = llava_bench.read_answers(answers(data), llava_bench.items(data, {}), {})
    ask = llava_bench.dialogues(items, given, {})["0"]([])
    assert ask.user.startswith("[Context]\na\nb\n\n[Question]\nq0?\n\n[Assistant 1]\nreference 0\n")
    assert "[Assistant 2]\nmodel\u20280\n" in ask.user
    assert (ask.temperature, ask.max_tokens, bool(ask.system)) == (0.2, 1024, True)


@pytest.mark.parametrize(
    ("order", "message"),
    [((0, 1), "no answer to question 2"), ((0, 1, 2, 3), "no question 3"), ((0, 1, 1), "line 3: question 1 was")],
)
def test_answers_that_do_not_fit(data, order, message):
    with pytest.raises(UserError, match=message):
        llava_bench.read_answers(answers(data, order), llava_bench.items(data, {}), {})


@pytest.mark.parametrize(
    ("file", "records", "message"),
    [
        ("context.jsonl", [{"image": "0.jpg", "caption": "a"}], "no line for the image '1.jpg'"),
        ("context.jsonl", [{"image": "0.jpg", "caption": 5}], "'caption' must be a text or a list"),
        ("answers_gpt4.jsonl", [{"question_id": 0, "text": "x"}], "has no answer to question 1"),
        ("questions.jsonl", [{"question_id": 0}], "no field 'category'"),
    ],
)
def test_data_that_does_not_fit(data, file, records, message):
    write(data / file, records)
    with pytest.raises(UserError, match=message):
        llava_bench.items(data, {})


def test_reviews_that_do_not_fit(data):
    reviews = [{"question_id": n, "category": "llava_bench_conv", "tuple": [8, 9]} for n in (0, 0)]
    with pytest.raises(UserError, match="question 0 was reviewed before"):
        score("llava_bench", None, write(data / "reviews.jsonl", reviews))
    with pytest.raises(UserError, match="'tuple' must be a list of two numbers"):
        score("llava_bench", None, write(data / "reviews.jsonl", [{**reviews[0], "tuple": [8]}]))


def test_win_rate(tmp_path):
    preferences = [1, 2, 2, 0, None, 1.5]
    found = score("llava_bench", None, write(tmp_path / "a.json", [{"preference": p} for p in preferences]))
    assert found.official["win_rate"] == 0.6
    assert found.counts["left out"] == 1
    with pytest.raises(UserError, match="'preference' must be from 1 to 2"):
        score("llava_bench", None, write(tmp_path / "a.json", [{"preference": 3}]))
