"""MM-Vet: the official tool's numbers, its six requests, and files that it would take or stop at."""

import math

import pytest

from silkie_jax.errors import UserError
from silkie_jax.evaluation import mmvet
from tests.evaluation.scoring import figures, load, score, write


@pytest.fixture
def folder(golden):
    return golden / "evaluation" / "mmvet"


def questions(tmp_path, *capabilities):
    return write(
        tmp_path / "mm-vet.json",
        {
            f"v1_{n}": {"imagename": f"{n}.png", "question": f"q{n}?", "answer": "a<AND>b<OR>c", "capability": list(c)}
            for n, c in enumerate(capabilities)
        },
    )


class TestGolden:
    def test_all_runs(self, folder):
        expected = load(folder / "expected.json")["official"]
        found = score("mmvet", folder / "mm-vet.json", folder / "results.json", folder / "judge_replies.json")
        for variant in ("one_run", "two_runs", "subset"):
            figures_ = dict(found.official[variant])
            assert figures_.pop("capability_sets") == {
                "_".join(sorted(name.split("_"))): value for name, value in expected[variant]["per_combination"].items()
            }
            assert figures_ == expected[variant]["per_capability"]
        assert {k: found.official[k] for k in expected["two_runs"]["per_capability"]} == expected["two_runs"][
            "per_capability"
        ]
        totals = expected["two_runs"]["derived_unrounded_total_per_run"]
        assert figures(found)["total"] == pytest.approx(sum(totals) / 2, abs=1e-9)
        for id, grades in expected["two_runs"]["grades"].items():
            assert found.outcomes[id] == pytest.approx(sum(grades) / 2)

    def test_one_run_and_the_harness(self, folder):
        files = folder / "mm-vet.json", folder / "results.json", folder / "judge_replies.json"
        found = score("mmvet", *files, "vlmevalkit", runs="1")
        expected = load(folder / "expected.json")
        harness = (
            expected["official"].get("harness_vlmevalkit_same_replies") or expected["harness_vlmevalkit_same_replies"]
        )
        assert figures(found)["total"] == pytest.approx(harness["total"], abs=1e-9)
        assert found.official["total"] == 44.1
        official = score("mmvet", *files, runs="1").outcomes
        assert [id for id in official if official[id] != found.outcomes[id]] == harness[
            "samples_that_differ_from_official"
        ]

    def test_requests_are_those_that_the_tool_made(self, folder):
        items, answers = mmvet.read_answers(folder / "results.json", mmvet.items(folder / "mm-vet.json", {}), {})
        dialogues = mmvet.dialogues(items, answers, {})
        recorded = load(folder / "judge_replies.json")
        requests = 0
        for id, runs in recorded.items():
            asks = [dialogues[id](runs[0][:n]) for n in range(len(runs[0]))]
            assert None not in asks
            assert dialogues[id](runs[0]) is None
            assert [ask.temperature for ask in asks] == list(mmvet.TEMPERATURES[: len(asks)])
            requests += len(asks)
        assert requests == load(folder / "expected.json")["official"]["one_run"]["requests"]

    def test_an_answer_is_missing(self, golden, folder):
        with pytest.raises(UserError, match=r"results.json: no answer to v1_7:"):
            score("mmvet", folder / "mm-vet.json", golden / "evaluation" / "errors" / "mmvet" / "results.json")


def test_figures_by_hand(tmp_path):
    data = questions(tmp_path, ["ocr"], ["ocr", "math"], ["math", "ocr"], ["rec"])
    answers = write(tmp_path / "results.json", {f"v1_{n}": "x" for n in range(4)})
    replies = {"v1_0": "1", "v1_1": "0.5", "v1_2": "0.25", "v1_3": ["no", "0.1"]}
    found = score("mmvet", data, answers, write(tmp_path / "replies.json", replies))
    assert found.official["total"] == 46.2  # 46.25: half to even
    assert found.official["ocr"] == 58.3
    assert found.official["capability_sets"]["math_ocr"] == 37.5
    assert (found.official["std"], found.official["runs"]) == (0.0, [46.2])
    assert "two_runs" not in found.official
    assert "subset" not in found.official
    assert figures(found)["capabilities/math"] == 37.5


def test_what_becomes_of_replies_that_cannot_be_read(tmp_path):
    data = questions(tmp_path, *[["ocr"]] * 4)
    answers = write(tmp_path / "results.json", {f"v1_{n}": "x" for n in range(4)})
    lines = [
        {"key": "v1_0", "replies": ["1"]},
        {"key": "v1_1", "replies": ["five"] * 5 + ["0.9"]},  # the sixth is never read
        {"key": "v1_2", "replies": ["five"]},
        {"key": "v1_3", "replies": [], "outcome": "content_filter"},
    ]
    found = score("mmvet", data, answers, write(tmp_path / "r.jsonl", lines))
    assert found.official["total"] == 25
    assert figures(found)["total"] == 50
    assert (found.counts["unreadable"], found.counts["unfinished"], found.counts["no reply"]) == (1, 1, 1)
    assert found.outcomes == {"v1_0": 1.0, "v1_1": 0.0}
    assert len(found.notes) == 3


def test_nan_passes_and_is_said(tmp_path):
    data = questions(tmp_path, ["ocr"], ["rec"])
    answers = write(tmp_path / "results.json", {"v1_0": "x", "v1_1": "y", "extra": 5})
    found = score("mmvet", data, answers, write(tmp_path / "r.json", ["nan", "1"]))
    assert math.isnan(found.official["total"])
    assert found.official["rec"] == 100
    assert found.counts["not a number"] == 1
    assert any("nan" in note for note in found.notes)


def test_the_prompt_and_its_retry(tmp_path):
    items = mmvet.items(questions(tmp_path, ["ocr"]), {})
    (dialogue,) = mmvet.dialogues(items, [mmvet.Answer("v1_0", "it is {{ x }} | y")], {}).values()
    first, second = dialogue([]), dialogue(["what?"])
    assert first.user.endswith("q0? | a <AND> b <OR> c | it is {{ x }} | y | ")
    assert second.user.startswith(first.user)
    assert second.user != first.user
    assert (first.max_tokens, second.temperature, dialogue(["what?"] * 2).temperature) == (3, 0.0, 0.5)
    assert dialogue(["what?", "0.5"]) is None
    assert dialogue(["what?"] * 5) is not None
    assert dialogue(["what?"] * 6) is None


def test_saved_grades_of_the_official_tool(tmp_path):
    data = questions(tmp_path, ["ocr"], ["rec"])
    answers = write(tmp_path / "results.json", {"v1_0": "x", "v1_1": "y"})
    saved = {f"v1_{n}": {"model": ["g"] * 2, "content": ["0.5", "1.0"], "score": [0.5, 1.0]} for n in range(2)}
    found = score("mmvet", data, answers, write(tmp_path / "grades.json", saved))
    assert found.official["runs"] == [50.0, 100.0]


def test_the_subset_is_chosen_or_found(tmp_path):
    data = questions(tmp_path, ["ocr"], ["ocr"])
    answers = write(tmp_path / "results.json", {"v1_0": "x", "v1_1": "y"})
    replies = write(tmp_path / "r.json", {"v1_0": "1", "v1_1": "0"})
    chosen = write(tmp_path / "mine.json", ["v1_0"])
    assert score("mmvet", data, answers, replies, subset=str(chosen)).official["subset"]["total"] == 100
    write(tmp_path / "bard_set.json", ["v1_1"])
    assert score("mmvet", tmp_path, answers, replies).official["subset"]["total"] == 0
    with pytest.raises(UserError, match="ids that the data does not have: nowhere"):
        score("mmvet", data, answers, subset=str(write(tmp_path / "mine.json", ["nowhere"])))


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"v1_0": None}, "v1_0 must be a text, found null"),
        (["x"], "expected an object of answers by id, found a list"),
        ({}, "no answer to v1_0"),
    ],
)
def test_results_of_another_form(tmp_path, results, message):
    with pytest.raises(UserError, match=message):
        score("mmvet", questions(tmp_path, ["ocr"]), write(tmp_path / "results.json", results))


@pytest.mark.parametrize("runs", ["0", "x", "2", "1.5"])
def test_runs_that_are_not_there(tmp_path, runs):
    answers = write(tmp_path / "results.json", {"v1_0": "x"})
    with pytest.raises(UserError, match=f"runs={runs}"):
        score("mmvet", questions(tmp_path, ["ocr"]), answers, write(tmp_path / "r.json", ["1"]), runs=runs)


def test_an_id_twice_is_refused(tmp_path):
    (tmp_path / "results.json").write_text('\ufeff{"v1_0": "a",\r\n "v1_0": "b"}', encoding="utf-8")
    with pytest.raises(UserError, match="'v1_0' is there twice"):
        score("mmvet", questions(tmp_path, ["ocr"]), tmp_path / "results.json")
