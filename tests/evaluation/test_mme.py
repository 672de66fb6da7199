"""MME: the official tool's figures on golden, its traps, the released layouts, and what is refused."""

import json
import shutil

import numpy as np
import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation import mme

QUESTION = "Is there one? Please answer yes or no."


def make(folder, rows=None, **files):
    """All 14 tasks with two right answers each, but for the files given by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in mme.TASKS:
        lines = rows or [f"1.jpg\t{QUESTION}\tYes\tYes", f"1.jpg\t{QUESTION}\tNo\tNo"]
        (folder / f"{task}.txt").write_text(files.get(task, "\n".join(lines) + "\n"), encoding="utf-8", newline="")
    return folder


def scored(folder, parser="official"):
    return mme.score(*mme.read_answers(folder, None, {}), None, parser, {})


def test_golden(golden):
    folder = golden / "evaluation" / "mme"
    expected = json.loads((folder / "expected.json").read_text())["official"]
    score = scored(folder / "results")
    assert score.official == {name: expected[name] for name in ("perception", "cognition", "tasks")}
    assert score.counts["undecided"] == sum(task["other_num"] for task in expected["per_task_detail"].values())
    figures = score.sums.figures()
    assert figures["perception"] == pytest.approx(expected["perception"], abs=1e-9)
    assert {task: figures[f"tasks/{task}"] for task in mme.TASKS} == pytest.approx(expected["tasks"], abs=1e-9)


def test_golden_harnesses(golden):
    folder = golden / "evaluation" / "mme"
    harness = json.loads((folder / "expected.json").read_text())["official"]["harness"]
    score = scored(folder / "results", "lmms-eval")
    figures = score.sums.figures()
    assert figures["perception"] == pytest.approx(harness["lmms_eval"]["mme_perception_score"])
    assert figures["cognition"] == pytest.approx(harness["lmms_eval"]["mme_cognition_score"])
    score = scored(folder / "results", "vlmevalkit")
    figures, expected = score.sums.figures(), harness["vlmevalkit_exact_matching"]
    assert {task: figures[f"tasks/{task}"] for task in mme.TASKS} == pytest.approx(
        {task: expected[task] for task in mme.TASKS}
    )
    assert score.counts["undecided"] == harness["vlmevalkit_unknown"]
    assert score.official == scored(folder / "results").official  # whatever parser was asked for


def test_full_marks_and_groups(tmp_path):
    score = scored(make(tmp_path / "r"))
    assert score.official["perception"] == 2000.0
    assert score.official["cognition"] == 800.0
    figures = score.sums.figures()
    assert [figures[f"groups/{name}"] for name in ("coarse", "fine", "OCR")] == [800.0, 1000.0, 200.0]
    assert score.notes == []


def test_pairs_are_consecutive_lines(tmp_path):
    """One image in two pairs: two units officially, one for VLMEvalKit, which looks at its first two questions."""
    lines = [f"1.jpg\t{QUESTION}\tYes\t{answer}" for answer in ("Yes", "Yes", "Yes", "No")]
    folder = make(tmp_path / "r", count="\r\n".join(lines))
    assert scored(folder).official["tasks"]["count"] == 75.0 + 50.0
    assert scored(folder, "vlmevalkit").sums.figures()["tasks/count"] == 75.0 + 100.0
    items, answers = mme.read_answers(folder, None, {})
    assert [item.id for item in items if item.part == "count"] == [f"count/1.jpg/{k}" for k in (1, 2, 3, 4)]
    assert len({item.id for item in items}) == len(items) == len(answers)


def test_answers_hold_line_separators(tmp_path):
    lines = f"1.jpg\t{QUESTION}\tYes\tYes\u2028no\n1.jpg\t{QUESTION}\tNo\t\x85\x0bno"
    assert scored(make(tmp_path / "r", scene=lines)).official["tasks"]["scene"] == 200.0


def test_all_other_and_missing(tmp_path):
    folder = make(tmp_path / "r", OCR=f"1.jpg\t{QUESTION}\tYes\tmaybe\n1.jpg\t{QUESTION}\tNo\t\n")
    score = scored(folder)
    assert score.official["tasks"]["OCR"] == 0.0
    assert score.official["perception"] == 1800.0
    assert score.counts["undecided"] == 2
    assert any(note.startswith("OCR: no answer is yes or no") for note in score.notes)
    items, answers = mme.read_answers(folder, None, {})
    score = mme.score(items, answers[1:], None, "official", {})
    assert score.counts["missing"] == 1
    assert score.official["tasks"]["existence"] == 50.0
    assert items[0].id not in score.outcomes


@pytest.mark.parametrize(
    ("case", "task", "message"),
    [
        ("tab_in_response", "position", "line 1: five fields"),
        ("odd_lines", "scene", "an odd number of lines (3)"),
        ("blank_line", "code_reasoning", "line 2: blank"),
        ("odd_ground_truth", "color", "line 1: ground truth must be Yes or No, found 'Yes '"),
        ("three_columns", "position", "line 1: three fields; the responses have not been filled in"),
    ],
)
def test_golden_errors(golden, tmp_path, case, task, message):
    wrong = golden / "evaluation" / "errors" / "mme" / case
    folder = make(tmp_path / "r")
    shutil.copy(wrong / f"{task}.txt", folder / f"{task}.txt")
    for place in (wrong, folder):  # what is wrong in a file comes before what is missing
        with pytest.raises(UserError) as error:
            scored(place)
        assert f"{place / task}.txt" in str(error.value)
        assert message in str(error.value)


def test_golden_all_other(golden, tmp_path):
    folder = make(tmp_path / "r")
    shutil.copy(golden / "evaluation" / "errors" / "mme" / "all_other" / "OCR.txt", folder / "OCR.txt")
    assert scored(folder).official["tasks"]["OCR"] == 0.0


def test_missing_tasks(tmp_path):
    folder = make(tmp_path / "r")
    (folder / "scene.txt").unlink()
    with pytest.raises(UserError, match=r"scene\.txt: no such file; all 14"):
        scored(folder)
    (folder / "OCR.txt").unlink()
    with pytest.raises(UserError, match=r"scene\.txt: no such file, nor 1 more"):
        scored(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("only words\n", "line 1: one field"),
        ("a\tb\tyes\tc\td\te\n", "line 1: 6 fields"),
    ],
)
def test_malformed(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        scored(make(tmp_path / "r", landmark=text))


def test_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for name, message in (("file", "not a folder"), ("none", "no such folder")):
        with pytest.raises(UserError, match=message):
            mme.read_answers(tmp_path / name, None, {})


def release(folder):
    """The released folder, with the places of artwork's and scene's images."""
    make(folder / "eval_tool" / "Your_Results", rows=[f"1.jpg\t{QUESTION}\tYes", f"1.jpg\t{QUESTION}\tNo"])
    for place in ("existence", "scene/images", "artwork/images/toy_dataset"):
        (folder / place).mkdir(parents=True)
        (folder / place / "1.jpg").write_bytes(place.encode())
    return folder


def test_released_layout(tmp_path):
    folder = release(tmp_path / "MME_Benchmark_release_version")
    for data in (tmp_path, folder, folder / "eval_tool" / "Your_Results"):
        if data == tmp_path:
            shutil.copytree(folder / "eval_tool", tmp_path / "eval_tool")
        items = {item.part: item for item in mme.items(data, {})}
        assert list(items) == list(mme.TASKS)
        assert items["existence"].pictures[0].read() == b"existence"
        assert items["scene"].pictures[0].read() == b"scene/images"
        assert items["artwork"].pictures[0].read() == b"artwork/images/toy_dataset"
        assert items["scene"].cluster == "scene/1.jpg"
        assert items["scene"].truth == "no"
        with pytest.raises(UserError, match="no such image"):
            items["color"].pictures[0].read()


def test_questions_beside_the_images(tmp_path):
    for task in mme.TASKS:
        place = tmp_path / task / ("questions_answers_YN" if task == "posters" else "")
        place.mkdir(parents=True)
        (place / "7.txt").write_text(f"{QUESTION}\tYes\n{QUESTION}\tNo\n")
    (tmp_path / "posters" / "images").mkdir()
    (tmp_path / "posters" / "images" / "7.png").write_bytes(b"png")
    items = mme.items(tmp_path, {})
    assert len(items) == 28
    assert [item.truth for item in items[:2]] == ["yes", "no"]
    poster = next(item for item in items if item.part == "posters")
    assert poster.id == "posters/7.png/1"
    assert poster.pictures[0].read() == b"png"
    (tmp_path / "color" / "7.txt").write_text(QUESTION)
    with pytest.raises(UserError, match="1 lines; two questions are one unit"):
        mme.items(tmp_path, {})
    with pytest.raises(UserError, match="neither eval_tool"):
        mme.items(tmp_path / "color", {})


def test_prompts_and_counts_of_data(tmp_path):
    items = mme.items(release(tmp_path / "data"), {})
    assert mme.prompt(items[0], "official") == QUESTION
    assert mme.prompt(items[0], "llava") == "Is there one?\nAnswer the question using a single word or phrase."
    mme.read_answers(make(tmp_path / "same"), items, {})
    longer = "\n".join([f"1.jpg\t{QUESTION}\tYes\tYes"] * 4)
    with pytest.raises(UserError, match=r"color\.txt: 4 questions, but the data has 2"):
        mme.read_answers(make(tmp_path / "longer", color=longer), items, {})


def test_some_of_the_tasks(tmp_path):
    """The sums are over the tasks that are named; what is left of a group without any is undefined."""
    for task in ("color", "existence", "OCR"):
        lines = [f"a.jpg\tQ1\tYes\t{'Yes' if task != 'OCR' else 'No'}\n", "a.jpg\tQ2\tNo\tNo\n"]
        (tmp_path / f"{task}.txt").write_text("".join(lines))
    settings = {"tasks": "color, existence"}
    items, answers = mme.read_answers(tmp_path, None, settings)
    assert [item.part for item in items] == ["existence", "existence", "color", "color"]
    found = mme.score(items, answers, None, "official", settings)
    assert found.official["perception"] == 400.0
    assert np.isnan(found.official["cognition"])
    figures = found.sums.figures()
    assert figures["perception"] == figures["groups/coarse"] == 400.0
    assert np.isnan(figures["cognition"])
    assert "tasks/OCR" not in figures
    assert "at most 400 points" in found.notes[0]


@pytest.mark.parametrize(("tasks", "message"), [("color,colour", "no task 'colour'"), (" ,", "tasks is empty")])
def test_tasks_that_are_none(tmp_path, tasks, message):
    with pytest.raises(UserError, match=message):
        mme.items(tmp_path, {"tasks": tasks})
