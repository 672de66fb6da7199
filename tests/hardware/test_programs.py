"""What was compiled once is not compiled again: counted by JAX itself, and by the files."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml

from silkie_jax.errors import UserError
from silkie_jax.hardware import programs
from silkie_jax.hardware.programs import kept_programs, users_folder
from tests.training.support import make_tiny, record, write_corpus

ROOT = Path(__file__).resolve().parents[2]
COUNT = """
import json, sys
from collections import Counter
import jax
from silkie_jax import cli

events = Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rsplit("/", 1)[-1]]))
status = cli.main(sys.argv[1:])
print("\\n" + json.dumps([status, events["cache_hits"], events["cache_misses"]]))
"""


@pytest.fixture
def compiled():
    """Compiles `number` programs; how many of them JAX found and how many it made."""
    events = Counter()

    def listen(name, **_):
        events.update([name.rsplit("/", 1)[-1]])

    def run(number=1):
        events.clear()
        for n in range(number):
            jax.jit(lambda x, n=n: x * 3 + n).lower(jax.ShapeDtypeStruct((7,), jnp.float32)).compile()
        return events["cache_hits"], events["cache_misses"]

    jax.monitoring.register_event_listener(listen)
    yield run
    jax.monitoring.unregister_event_listener(listen)


def entries(folder):
    return sorted(path.name for path in folder.glob("*-cache"))


def test_what_was_compiled_is_found_again(tmp_path, compiled):
    with kept_programs(tmp_path / "a"):
        assert compiled(2) == (0, 2)
    kept = entries(tmp_path / "a")
    assert len(kept) == 2
    with kept_programs(tmp_path / "a"):
        assert compiled(2) == (2, 0)
    assert entries(tmp_path / "a") == kept
    with kept_programs(tmp_path / "b"):
        assert compiled(1) == (0, 1)
    assert compiled(1) == (0, 0)  # outside nothing is kept
    assert jax.config.jax_compilation_cache_dir is None


def test_an_own_choice_of_the_cache_stands(tmp_path, compiled):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    try:
        with kept_programs(tmp_path / "ours"):
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
            compiled()
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert not (tmp_path / "ours").exists()


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(programs.os, "access", lambda *_: False)
    with kept_programs(tmp_path / "a"):
        assert compiled() == (0, 0)
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    monkeypatch.undo()
    with kept_programs(tmp_path / "file" / "a"):
        assert compiled() == (0, 0)


@pytest.mark.parametrize("left", [0, 1, -1])
def test_a_program_that_was_cut_off_is_made_again_without_a_word(tmp_path, compiled, recwarn, left):
    with kept_programs(tmp_path):
        compiled(3)
    newest = max(tmp_path.glob("*-cache"), key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:left])
    for counts in ((2, 1), (3, 0)):
        with kept_programs(tmp_path):
            assert compiled(3) == counts
    assert not recwarn.list


def test_the_oldest_programs_go_first(tmp_path, compiled, monkeypatch):
    with kept_programs(tmp_path):
        compiled(3)
    sizes = []
    for age, path in enumerate(sorted(tmp_path.glob("*-cache"))):
        os.utime(path, (time.time() - age, time.time() - age))
        sizes.append(path.stat().st_size)
    kept = entries(tmp_path)[:2]
    monkeypatch.setattr(programs, "LIMIT", sizes[0] + sizes[1])
    with kept_programs(tmp_path):
        pass
    assert entries(tmp_path) == kept


def fails(run, compile_some):
    with kept_programs(run / "compiled"):
        compile_some()
        raise UserError("the corpus is not one")


def test_a_mistake_before_a_run_begins_leaves_no_folder_of_one(tmp_path, compiled):
    with pytest.raises(UserError):
        fails(tmp_path / "run", compiled)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError):  # in a folder that was there before
        fails(tmp_path, compiled)
    assert entries(tmp_path / "compiled")
    with pytest.raises(UserError):
        fails(tmp_path, compiled)
    assert entries(tmp_path / "compiled")


def test_the_folder_of_the_user(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert users_folder() == Path("/somewhere/silkie_jax/compiled")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert users_folder() == Path("/home/me/.cache/silkie_jax/compiled")
    monkeypatch.setattr(programs.os.path, "expanduser", lambda path: path)
    assert users_folder() is None


@pytest.mark.slow
def test_a_run_that_goes_on_compiles_nothing(tmp_path):
    given = {
        "model": str(make_tiny(tmp_path / "model")),
        "corpus": str(write_corpus(tmp_path / "corpus", [record(n, (2, 1), images=0) for n in range(8)])),
        "run_dir": str(tmp_path / "run"),
        "lora": {"rank": 2},
        "batch_rows": 2,
        "mesh": {"data": 1},
        "steps": 2,
        "checkpoint_every": 1,
        "evaluation_fraction": 0.2,
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(given))

    def train():
        command = [sys.executable, "-c", COUNT, "train", tmp_path / "train.yaml"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    status, hits, misses = train()
    kept = entries(tmp_path / "run" / "compiled")
    assert (status, hits) == (0, 0)
    assert misses == len(kept) > 10
    for path in ("checkpoints/2", "adapter"):
        (tmp_path / "run" / path).rename(tmp_path / path.replace("/", "-"))
    status, hits, misses = train()
    assert (status, misses) == (0, 0)
    assert hits > 10
    assert entries(tmp_path / "run" / "compiled") == kept
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / "adapter" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
