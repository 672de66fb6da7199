"""An import killed at any moment is finished by the same command: the same bytes, and no shard made twice."""

import signal
import subprocess
import sys
import time

import pytest

from data_prep.tables.vlfeedback import import_vlfeedback
from silkie_jax.corpus.reader import CorpusReader
from silkie_jax.errors import UserError
from tests.data_prep.conftest import encode, row, write_rows
from tests.data_prep.rated import files

SHARDS = 4

# Imports `sys.argv[1:4]` and kills itself when `sys.argv[4]` (image or rename) happens for the `sys.argv[5]`-th time.
KILL_ITSELF = """
import os, signal, sys
import data_prep.tables.importing, silkie_jax.corpus.shards
from data_prep.tables.vlfeedback import import_vlfeedback
source, images, dst, event, count = sys.argv[1:]
left = int(count)

def then(function):
    def wrapped(*args, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return wrapped

if event == "image":
    data_prep.tables.importing.check_image = then(data_prep.tables.importing.check_image)
else:
    os.replace = then(os.replace)
import_vlfeedback(source, images, dst, shards=4, workers=1, progress=False)
"""


@pytest.fixture
def source(tmp_path):
    """Sixteen rows and their images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(16):
        (folder / f"r{n}.jpg").write_bytes(encode(colour=(n, n, n)))
    return write_rows(tmp_path / "rows.jsonl", [row(f"r{n}") for n in range(16)] + ["malformed"])


def start(source, dst, *arguments, code=KILL_ITSELF, **options):
    command = [sys.executable, "-c", code, str(source), str(source.parent / "images"), str(dst), *arguments]
    return subprocess.Popen(command, **options)


@pytest.fixture
def uninterrupted(source, tmp_path):
    import_vlfeedback(source, tmp_path / "images", tmp_path / "whole", shards=SHARDS, progress=False)
    return files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("event", "count", "finished"),
    [
        ("image", 11, 2),  # within the third shard
        ("rename", 5, 2),  # the third shard is written but not in its place
        ("rename", 6, 2),  # it is in its place but its entry is not
        ("rename", 9, 4),  # all shards are there, the index is not
        ("rename", 12, 4),  # all but the manifest
    ],
)
def test_killed_then_finished(source, tmp_path, uninterrupted, event, count, finished):
    dst = tmp_path / "corpus"
    assert start(source, dst, event, str(count)).wait() == -signal.SIGKILL
    with pytest.raises(UserError, match="unfinished: rerun"):
        CorpusReader(dst)
    before = {path.name: path.stat().st_mtime_ns for path in sorted(dst.glob("*array_record*"))}
    kept = dict(list(before.items())[:finished])
    assert len(kept) == finished

    import_vlfeedback(source, tmp_path / "images", dst, shards=SHARDS, progress=False)
    assert files(dst) == uninterrupted
    assert {name: (dst / name).stat().st_mtime_ns for name in kept} == kept
    CorpusReader(dst).verify()


def test_killed_from_outside(source, tmp_path, uninterrupted):
    """Two workers, killed by another process as soon as it sees a finished shard."""
    code = """
import sys, time
import data_prep.tables.importing as importing
from data_prep.tables.vlfeedback import import_vlfeedback
check = importing.check_image
importing.check_image = lambda *a, **k: time.sleep(0.05) or check(*a, **k)
import_vlfeedback(*sys.argv[1:4], shards=4, workers=2, progress=False)
"""
    dst = tmp_path / "corpus"
    process = start(source, dst, code=code)
    while process.poll() is None and not list(dst.glob(".building/*.json")):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    import_vlfeedback(source, tmp_path / "images", dst, shards=SHARDS, progress=False)
    assert files(dst) == uninterrupted


def test_a_finished_import_is_left_alone_and_other_input_refused(source, tmp_path, uninterrupted):
    dst = tmp_path / "whole"
    times = {path: path.stat().st_mtime_ns for path in dst.iterdir()}
    (dst / ".building").mkdir()  # as a kill right after the manifest leaves it
    again = import_vlfeedback(source, tmp_path / "images", dst, progress=False)
    assert again.rows == 17
    assert {path: path.stat().st_mtime_ns for path in dst.iterdir()} == times
    write_rows(source, [row("r1")])
    with pytest.raises(UserError, match="made from other input"):
        import_vlfeedback(source, tmp_path / "images", dst, progress=False)
    assert files(dst) == uninterrupted


def test_only_shards_of_unchanged_input_are_kept(source, tmp_path):
    """A row and an image are mended between the kill and the next run: the shards that hold them are made again."""
    dst = tmp_path / "corpus"
    assert start(source, dst, "rename", "9").wait() == -signal.SIGKILL
    shards = sorted(dst.glob("*array_record*"))
    before = [path.stat().st_mtime_ns for path in shards]
    write_rows(source, [row(f"r{n}", prompt="mended" if n == 5 else "prompt of r" + str(n)) for n in range(16)])
    (tmp_path / "images" / "r15.jpg").write_bytes(encode(colour=(200, 0, 0)))
    import_vlfeedback(source, tmp_path / "images", dst, shards=SHARDS, progress=False)
    assert [path.stat().st_mtime_ns == time for path, time in zip(shards, before, strict=True)] == [
        True,
        False,
        True,
        False,
    ]
    reader = CorpusReader(dst)
    assert reader[5].prompt == "mended"
    assert reader[15].images == ((tmp_path / "images" / "r15.jpg").read_bytes(),)
    assert reader.summary["rows"] == 16


def test_an_interrupt_stops_all_workers(source, tmp_path, monkeypatch):
    import data_prep.tables.importing as importing

    def interrupted(data, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importing, "check_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_vlfeedback(source, tmp_path / "images", tmp_path / "corpus", shards=SHARDS, progress=False)
    monkeypatch.undo()
    import_vlfeedback(source, tmp_path / "images", tmp_path / "corpus", shards=SHARDS, progress=False)
    assert len(CorpusReader(tmp_path / "corpus")) == 16
