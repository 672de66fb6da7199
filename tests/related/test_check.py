"""The related systems' official numbers against ours, and the command that compares other folders of that form."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.related import check
from tests.related.differences import close, same

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(check.CHECKS))
def test_equal_to_the_official_code(golden, name):
    assert list(check.found_in(name, golden / "related")) == []


def test_numbers_are_close_within_the_sum_of_both_tolerances():
    assert list(close("x", [1.0, 100.0], [1.1, 101.0], rtol=0.01, atol=0.09)) == []
    assert list(close("x", [1.0, 100.0, 7.0], [1.2, 100.0, 8.0], atol=0.1)) == [
        "x: 7 is not 8 at [2] (2 of 3 differ)",
    ]
    assert list(close("x", [np.nan], [1.0], atol=9)) == ["x: nan is not 1 at [0] (1 of 1 differ)"]
    assert list(close("x", [1.0], 1.0)) == ["x: shape [1] is not []"]
    assert list(same("y", [1], [2])) == ["y: [1] is not [2]"]


def run(folder):
    return subprocess.run(
        [sys.executable, "-m", "tests.related.check", folder], capture_output=True, text=True, cwd=ROOT, check=False
    )


def test_the_command_says_what_differs_and_what_it_does_not_know(tmp_path):
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "unheard_of.json").write_text(json.dumps({}))
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (1, "unheard_of: nothing here compares it\n")
    assert "no such folder" in run(tmp_path / "absent").stderr
