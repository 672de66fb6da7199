"""Every number that official tools gave comes out of `silkie evaluate score`, and the check finds what does not."""

import json
import shutil

import pytest

from tests.evaluation.check_index import check, check_answer, differences, main


def test_the_golden_index_has_no_difference(golden):
    assert check(golden / "evaluation" / "index.json") == []


def test_a_number_that_differs_is_a_line(golden, tmp_path, capsys):
    shutil.copytree(golden / "evaluation", tmp_path / "cases")
    index = tmp_path / "cases" / "index.json"
    cases = {case["benchmark"]: case for case in json.loads(index.read_text())}
    cases["mme"]["expected"]["tasks"]["count"] += 1e-6
    cases["pope"]["expected"]["basic"]["TP"] += 1
    index.write_text(json.dumps([cases["mme"], cases["pope"]]))
    assert main([str(index)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3  # POPE's answers lie there in two forms
    assert said[0].startswith("mme: results: tasks: count: 33.33")
    assert main([]) == 2


@pytest.mark.parametrize(
    ("expected", "found", "said"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, []),
        ({"a": 1}, {}, ["x: a is missing"]),
        ([1, 2], [1], ["x: [1] instead of [1, 2]"]),
        ({"a": "2.30"}, {"a": "2.3"}, ["x: a: '2.3' instead of '2.30'"]),
        ({"a": 2.3}, {"a": None}, ["x: a: None instead of 2.3"]),
    ],
)
def test_differences(expected, found, said):
    assert list(differences("x", expected, found)) == said


def test_errors_must_be_one_line_that_names_what_is_wrong():
    assert not list(check_answer("x", "error naming v1_7", 1, "", "silkie: v1_7: no answer\n"))
    assert list(check_answer("x", "error naming v1_7", 1, "", "silkie: no answer\n"))
    assert list(check_answer("x", "error naming v1_7", 0, '{"notes": []}', ""))
    assert list(check_answer("x", "error naming v1_7", 1, "", "v1_7\nv1_7\n"))
    assert list(check_answer("x", "0 with a note", 0, '{"notes": []}', ""))
    assert list(check_answer("x", "0 with a note", 1, "", "silkie: refused\n"))
