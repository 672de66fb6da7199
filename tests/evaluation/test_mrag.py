"""MRAG-Bench: the official tool's numbers, files that it would take or stop at, and the hub's parquet files."""

import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation import mrag
from tests.evaluation.scoring import figures, load, score, write


@pytest.fixture
def folder(golden):
    return golden / "evaluation" / "mrag"


def line(n, output, choice="A", scenario="Angle", **changes):
    prompt = "...directly. <image>\nWhat is it?\n Choices:\nA: cat\nB: dog\nC: red fox\nD: owl"
    return {"qs_id": n, "prompt": prompt, "output": output, "gt_choice": choice, "scenario": scenario, **changes}


class TestGolden:
    def test_accuracy(self, folder):
        expected = load(folder / "expected.json")["official"]
        found = score("mrag", None, folder / "output.jsonl", folder / "judge_replies.json")
        assert found.official == expected["printed"]
        letters = {id: letter for id, letter in found.readings.items() if id in expected["letter_by_rule"]}
        assert letters == expected["letter_by_rule"]
        assert figures(found)["Overall Accuracy"] == pytest.approx(100 * 41 / 72)

    def test_the_judge_is_asked_about_the_same(self, folder):
        items, answers = mrag.read_answers(folder / "output.jsonl", None, {})
        asked = mrag.dialogues(items, answers, {}).keys()
        sent = load(folder / "expected.json")["official"]["sent_to_the_judge"]
        assert asked == sent.keys() - {"13"}  # that one is empty: no request

    def test_long_answers_are_judged_too(self, folder, tmp_path):
        replies = write(tmp_path / "replies.json", {"48": "D"})
        found = score("mrag", None, folder / "crash.jsonl", replies)
        assert found.official["Overall Accuracy"] == 100
        assert found.counts["long without a letter"] == 1
        with pytest.raises(UserError, match="1 answers name no letter"):
            score("mrag", None, folder / "crash.jsonl")


def test_contents_instead_of_a_judge(tmp_path):
    outputs = ["A", "a cat", "dog or owl", "it is the red fox, of course, and nothing else", ""]
    answers = write(tmp_path / "o.jsonl", [line(n, text) for n, text in enumerate(outputs)])
    found = score("mrag", None, answers, parser="content")
    assert list(found.readings) == ["0", "1", "2", "3", "4"]
    assert [found.outcomes[str(n)] for n in range(5)] == [1, 1, 0, 0, 0]
    assert (found.counts["undecided"], found.counts["empty"]) == (2, 1)
    assert found.official == {}  # the official rule would have asked


def test_failed_replies_are_no_zeros(tmp_path):
    answers = write(tmp_path / "o.jsonl", [line(0, "A"), line(1, "a cat"), line(2, "a dog")])
    lines = [{"key": "1", "replies": ["", "B."]}, {"key": "2", "replies": [], "outcome": "rejected"}]
    found = score("mrag", None, answers, write(tmp_path / "r.jsonl", lines))
    assert found.official["Overall Accuracy"] == 33.33
    assert figures(found)["Overall Accuracy"] == 50
    assert (found.counts["no reply"], found.counts["undecided"], found.counts["by a judge"]) == (1, 1, 1)


def test_the_judge_sees_question_options_and_answer(tmp_path):
    items, answers = mrag.read_answers(write(tmp_path / "o.jsonl", [line(0, "a cat, I think")]), None, {})
    ask = mrag.dialogues(items, answers, {})["0"]([])
    assert all(part in ask.user for part in ("What is it?", "C: red fox", "a cat, I think"))
    assert ask.max_tokens == 256


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (line(0, 5), "output must be a text"),
        (line(0, "A", choice="E"), "'gt_choice' must be one of"),
        (line(True, "A"), "qs_id must be a text or an integer"),
        ({"qs_id": 1}, "no field 'output'"),
        (line(7, "A"), "question 7 was answered before"),
        ([1], "expected an object"),
    ],
)
def test_records_of_another_form(tmp_path, record, message):
    with pytest.raises(UserError, match=rf"line 2: .*{message}"):
        score("mrag", None, write(tmp_path / "o.jsonl", [line(7, "A"), record]))


def test_an_empty_file(tmp_path):
    (tmp_path / "o.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty"):
        score("mrag", None, tmp_path / "o.jsonl")


class TestData:
    @pytest.fixture
    def parquet(self, tmp_path):
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        def image(name):
            return {"bytes": name.encode(), "path": None}

        rows = [
            {
                "id": f"{n}", "question": f"q{n}?", "answer": "x", "answer_choice": "B", "scenario": scenario,
                "aspect": "p", "A": "cat", "B": "dog", "C": "fox", "D": "owl", "image": image(f"own {n}"),
                "gt_images": [image(f"right {n} {k}") for k in range(5)],
                "retrieved_images": [image(f"found {n} {k}") for k in range(5)],
            }
            for n, scenario in enumerate(["Angle", "Incomplete", "Others"])
        ]  # fmt: skip
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "test-0.parquet", row_group_size=2)
        return tmp_path

    @pytest.mark.parametrize(("rag", "word"), [("retrieved", "found"), ("examples", "right")])
    def test_the_hub_form(self, parquet, rag, word):
        plain, shown = mrag.items(parquet, {}), mrag.items(parquet, {"rag": rag})
        assert [len(item.pictures) for item in plain] == [1, 1, 1]
        assert [len(item.pictures) for item in shown] == [6, 2, 6]
        assert shown[2].pictures[0].read() == b"own 2"
        assert shown[2].pictures[4].read() == f"{word} 2 3".encode()
        assert shown[1].pictures[1].read() == f"{word} 1 0".encode()
        assert (shown[2].truth, shown[2].options) == ("B", ("cat", "dog", "fox", "owl"))

    def test_prompts(self, parquet):
        words = mrag.prompt(mrag.items(parquet, {})[0], "official")
        assert words.endswith("directly.\nq0?\n Choices:\nA: cat\nB: dog\nC: fox\nD: owl")
        assert "retrieved" in mrag.prompt(mrag.items(parquet, {"rag": "retrieved"})[0], "official")

    def test_an_export(self, tmp_path):
        fields = {"question": "q?", "answer_choice": "A", "scenario": "Angle", **dict(zip("ABCD", "wxyz", strict=True))}
        write(tmp_path / "questions.jsonl", [{"id": 1, **fields, "image": "i.jpg", "retrieved_images": ["j.jpg"]}])
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "j.jpg").write_bytes(b"j")
        (item,) = mrag.items(tmp_path, {"rag": "retrieved"})
        assert [picture.name for picture in item.pictures] == ["i.jpg", "j.jpg"]
        assert item.pictures[1].read() == b"j"

    def test_what_is_not_there(self, tmp_path, parquet):
        with pytest.raises(UserError, match="rag=all"):
            mrag.items(parquet, {"rag": "all"})
        with pytest.raises(UserError, match="no parquet files here"):
            mrag.items(tmp_path / "elsewhere", {})
        (tmp_path / "test-0.parquet").write_bytes(b"not parquet")
        with pytest.raises(UserError, match="not a parquet file that can be read"):
            mrag.items(tmp_path, {})
