"""A run that is killed or stopped again and again ends exactly like one that was left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from silkie_jax.training.config_file import load_config
from silkie_jax.training.loop import train
from tests.training.support import make_tiny, read_lines, record, write_corpus

ROOT = Path(__file__).resolve().parents[2]
STEPS = 14
PATIENCE = 300  # seconds, for a machine with much else to do


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    # Rows of two lengths: the longer ones are compiled in one run and not needed in another.
    records = [record(n, (2, 1), images=0, words=8 * (n % 2)) for n in range(10)]
    given = {
        "model": str(make_tiny(folder / "model")),
        "corpus": str(write_corpus(folder / "corpus", records)),
        "run_dir": str(folder / "killed"),
        "lora": {"rank": 2},
        "batch_rows": 2,
        "accumulate": 2,
        "steps": STEPS,
        "dtype": "float32",
        "remat": "none",
        "mesh": {"data": 1},
        "evaluation_fraction": 0.2,
        "evaluate_every": 4,
        "log_every": 1,
        "checkpoint_every": 1,
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(given))
    return folder / "train.yaml"


class Run:
    """`silkie train` in a process of its own."""

    def __init__(self, config, log):
        self.run, self.log = Path(load_config(config).run_dir), log
        with log.open("w") as out:
            command = [sys.executable, "-m", "silkie_jax.cli", "train", str(config)]
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, text=True)

    def steps(self):
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def saving(self):
        folder = self.run / "checkpoints"
        return folder.is_dir() and any("orbax-checkpoint-tmp" in name for name in os.listdir(folder))

    def signal_when(self, condition, number):
        """Sends a signal as soon as the condition holds; returns the exit status."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"ended too soon:\n{self.log.read_text()}"
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


def kept(path):
    """The metrics without what depends on the clock."""
    clock = ("_per_second", "_seconds", "input_wait", "memory_gib")
    return [{k: v for k, v in line.items() if not k.endswith(clock)} for line in read_lines(path / "metrics.jsonl")]


@pytest.mark.slow(70)
def test_killed_and_stopped_runs_end_as_if_nothing_had_happened(config, tmp_path):
    def start():
        run = Run(config, tmp_path / "log")
        return run, run.steps()

    # While it computes.
    run, _ = start()
    assert run.signal_when(lambda: run.steps() >= 2, signal.SIGKILL) == -signal.SIGKILL
    # While it saves; further than before, so that each attempt comes on.
    run, before = start()
    assert run.signal_when(lambda: run.steps() > 3 and run.saving(), signal.SIGKILL) == -signal.SIGKILL
    # A machine that is about to go, and Ctrl-C: the step is finished and saved.
    for number, least in ((signal.SIGTERM, 6), (signal.SIGINT, 9)):
        run, _ = start()
        assert run.signal_when(lambda run=run, least=least: run.steps() >= least, number) == 130
        said = run.log.read_text().splitlines()[-1]
        done = run.steps()
        assert said == f"silkie: stopped after step {done} of {STEPS}; run the same command to continue"
        assert (run.run / "checkpoints" / str(done)).is_dir()
        assert not (run.run / "adapter").exists()
    run, before = start()
    assert before == done < STEPS
    assert run.process.wait(PATIENCE) == 0, run.log.read_text()
    assert f"continuing after step {done} of {STEPS}" in run.log.read_text()

    alone = train(load_config(config, [f"run_dir={tmp_path / 'alone'}"]))
    assert kept(run.run) == kept(alone)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run.run / "adapter" / name).read_bytes() == (alone / "adapter" / name).read_bytes()
