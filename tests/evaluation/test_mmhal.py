"""MMHal-Bench: the official tool's numbers, and files that it would take or stop at."""

import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation import mmhal
from tests.evaluation.scoring import figures, load, score, write


@pytest.fixture
def folder(golden):
    return golden / "evaluation" / "mmhal"


def records(count=96):
    return [
        {
            "question_type": mmhal.TYPES[n % 8],
            "image_id": f"i{n}",
            "image_src": f"https://example.org/{n}.jpg",
            "image_content": ["Dog", "Tree"],
            "question": f"What is it {n}?",
            "gt_answer": "a dog",
            "model_answer": f"answer {n}",
        }
        for n in range(count)
    ]


class TestGolden:
    @pytest.mark.parametrize("replies", ["judge_replies.json", "evaluation.json"])
    def test_replies(self, folder, replies):
        expected = load(folder / "expected.json")
        found = score("mmhal", folder / "response.json", folder / "response.json", folder / replies)
        assert found.official == expected["official"]
        assert [found.outcomes[str(n)] for n in range(96)] == expected["derived_unrounded"]["scores"]
        for name in ("average_score", "hallucination_rate"):
            assert figures(found)[name] == pytest.approx(expected["derived_unrounded"][name], abs=1e-9)
        assert found.counts["no clear rating"] == 28

    def test_the_saved_evaluation_alone(self, folder):
        assert score("mmhal", None, folder / "evaluation.json").official == load(folder / "expected.json")["official"]

    def test_a_reply_is_missing(self, golden):
        with pytest.raises(UserError, match=r"evaluation.json: 96 records expected, 95 came: number 95"):
            score("mmhal", None, golden / "evaluation" / "errors" / "mmhal" / "evaluation.json")


def test_a_rating_below_three_is_a_hallucination(tmp_path):
    answers = write(tmp_path / "response.json", records())
    replies = write(tmp_path / "replies.json", ["Rating: 6"] * 48 + ["Rating: 2"] * 24 + ["?"] * 24)
    found = score("mmhal", None, answers, replies)
    assert found.official["average_score"] == "3.50"
    assert found.official["hallucination_rate"] == "0.50"
    assert found.official["by_type_in_index_order"] == [3.5] * 8
    assert figures(found)["counting/average_score"] == 3.5
    assert found.readings["95"] == "no clear rating"
    assert "24 replies" in found.notes[0]


def test_failed_replies_are_no_zeros(tmp_path):
    answers = write(tmp_path / "response.json", records())
    lines = [{"key": str(n), "replies": ["Rating: 4"]} for n in range(95)]
    lines.append({"key": "95", "replies": [], "outcome": "refusal"})
    found = score("mmhal", None, answers, write(tmp_path / "r.jsonl", lines))
    assert figures(found)["average_score"] == 4
    assert found.official["average_score"] == "3.96"
    assert found.counts["no reply"] == 1
    assert "95" not in found.outcomes
    assert "1 refusal" in found.notes[0]


def test_another_order_is_refused_or_mended(tmp_path):
    data = write(tmp_path / "response_template.json", [{**r, "model_answer": ""} for r in records()])
    moved = records()
    moved[0], moved[9] = moved[9], moved[0]
    answers = write(tmp_path / "response.json", moved)
    with pytest.raises(UserError, match=r"record 0: type 'adversarial' where .* 'attribute'"):
        score("mmhal", None, answers)
    items = mmhal.items(tmp_path, {})
    assert data.exists()
    _, found = mmhal.read_answers(answers, items, {})
    assert [answer.text for answer in found] == [f"answer {n}" for n in range(96)]


def test_a_missing_record_is_named(tmp_path):
    write(tmp_path / "response_template.json", records())
    answers = write(tmp_path / "response.json", records()[:5] + records()[6:])
    with pytest.raises(UserError, match="95 came: there is none for questions 5 of the data"):
        mmhal.read_answers(answers, mmhal.items(tmp_path, {}), {})
    with pytest.raises(UserError, match="record 5: 96 records expected, 95 came"):
        mmhal.read_answers(answers, None, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_answer": None}, "record 3: no 'model_answer'"),
        ({"model_answer": 5}, "model_answer must be a text"),
        ({"question": None}, "question must be a text"),
        ({"image_content": "Dog"}, "'image_content' must be a list"),
    ],
)
def test_records_of_another_form(tmp_path, change, message):
    rows = records()
    rows[3] |= change
    with pytest.raises(UserError, match=message):
        score("mmhal", None, write(tmp_path / "response.json", rows))


def test_an_image_that_the_data_does_not_have(tmp_path):
    write(tmp_path / "response_template.json", records())
    rows = records()
    rows[2]["image_id"] = ["i2"]
    with pytest.raises(UserError, match="record 2: the data has no question 'What is it 2\\?' on image"):
        mmhal.read_answers(write(tmp_path / "response.json", rows), mmhal.items(tmp_path, {}), {})


@pytest.mark.parametrize("content", ["", "{}", "[1]", "[", '[{"choices": []}]', "[" * 100_000])
def test_files_of_another_form(tmp_path, content):
    path = tmp_path / "response.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"response\.json") as caught:
        score("mmhal", None, path)
    assert "\n" not in str(caught.value)


def test_the_judge_sees_contents_and_answers(tmp_path):
    items, answers = mmhal.read_answers(write(tmp_path / "r.json", records()), None, {})
    dialogues = mmhal.dialogues(items, answers, {})
    ask = dialogues["7"]([])
    assert len(dialogues) == 96
    assert all(part in ask.user for part in ("Dog, Tree", "What is it 7?", "a dog", "answer 7", "Rating: 6"))
    assert (ask.system, ask.temperature, ask.max_tokens) == (None, 0.0, None)
    assert dialogues["7"](["Rating: 1"]) is None
    with pytest.raises(UserError, match="--judge"):
        mmhal.score(items, answers, None, "official", {})


def test_worked_cases_hold_one_rating_each():
    """A judge that repeats the form of a case is read."""
    from silkie_jax.evaluation.prompts import judge_prompt

    words = judge_prompt("mmhal", contents="", question="", truth="", answer="")
    cases = words.split("## Judgement")[1:6]
    assert [mmhal.mmhal_rating(case.split("# Case")[0]) for case in cases] == [2, 6, 0, 4, 3]
