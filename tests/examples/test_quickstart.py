"""The quickstart in small: killed again and again it comes to its end, and what it shows is what it measured."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples import quickstart
from examples.road import DONE, Road
from examples.seeds import seeds

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["world", "ask", "build", "sft", "reference", *quickstart.RULES]
STAGES += [*(f"measure-{name}" for name in quickstart.NAMES), "report"]


def begin(folder, compiled, *options):
    # The suite pretends to have eight devices; the quickstart makes its own.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "-m", "examples.quickstart", folder, "--fast", *options],
        cwd=ROOT,
        env=environment | {"JAX_COMPILATION_CACHE_DIR": compiled},
        stdout=said_to(folder).open("w"),  # a file: nobody reads while it runs, and a pipe would fill up
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def said_to(folder):
    return folder.with_name("said.txt")


def kill_within(process, folder, stage, seconds):
    """Kills everything of the quickstart some seconds after a stage began."""
    before = STAGES[STAGES.index(stage) - 1]
    deadline = time.monotonic() + 300
    while not (folder / DONE / before).exists():
        assert process.poll() is None, said_to(folder).read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.quickstart
def test_killed_at_any_stage_it_ends_with_its_table(tmp_path, compiled):
    folder = tmp_path / "run"
    for stage, seconds in (("ask", 3.0), ("sft", 8.0), ("measure-dpo", 5.0)):
        kill_within(begin(folder, compiled), folder, stage, seconds)
        assert not (folder / DONE / "report").exists()
    last = begin(folder, compiled)
    status, said = last.wait(), said_to(folder).read_text()
    assert status == 0, said
    assert "going on in" in said
    assert said.count("(done before)") >= 9
    table = (folder / "table.md").read_text()
    assert table in said
    lines = table.splitlines()
    assert len(lines) == 2 + len(quickstart.ROWS)
    assert [line.split("|")[1].strip() for line in lines[2:]] == [about for *_, about in quickstart.ROWS]
    assert all(re.search(r"[+-]\d+\.\d+ \([+-]\d+\.\d+ to [+-]\d+\.\d+\)", line) for line in lines[2:])
    for name in ("greedy.html", "sampled.html", "corpus/report.html", "silkie-small/README.md"):
        assert (folder / name).stat().st_size > 1000, name
    beside = seeds([folder, folder]).splitlines()
    assert [line.split("|")[1].strip() for line in beside] == [line.split("|")[1].strip() for line in lines]
    assert beside[0].count(f"seed {quickstart.SEED}") == 2

    # Again: nothing is left to do, and the table is the same.
    again = begin(folder, compiled)
    status, said = again.wait(), said_to(folder).read_text()
    assert status == 0, said
    assert said.count("(done before)") == len(STAGES)
    assert table in said


def test_what_was_begun_otherwise_does_not_go_on(tmp_path, capsys):
    settings = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for path in settings:
        path.write_text("beta: 0.1")
    Road("quickstart", tmp_path / "run", 0, quickstart.FAST, settings)
    Road("quickstart", tmp_path / "run", 0, quickstart.FAST, settings[::-1])
    assert "going on in" in capsys.readouterr().out
    sizes = dataclasses.replace(quickstart.FAST, scenes=3, dpo_steps=2)
    with pytest.raises(SystemExit, match="was begun with another dpo_steps, scenes, seed"):
        Road("quickstart", tmp_path / "run", 1, sizes, settings)
    settings[1].write_text("beta: 0.2")
    with pytest.raises(SystemExit, match=r"was begun with another b\.yaml:"):
        Road("quickstart", tmp_path / "run", 0, quickstart.FAST, settings)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(SystemExit, match="is not empty and was not made by this program"):
        Road("quickstart", tmp_path / "mine", 0, quickstart.FAST)


def test_a_stage_that_failed_is_done_again(tmp_path):
    road = Road("quickstart", tmp_path / "run", 0, quickstart.FAST)
    done = []
    with pytest.raises(SystemExit, match="`silkie` ended with status"):
        road.stage("first", "fails", lambda: road.silkie("no-such-verb"))
    for _ in range(2):
        road.stage("first", "works", lambda: done.append(1))
    assert done == [1]
