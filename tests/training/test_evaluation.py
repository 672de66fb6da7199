"""Evaluation in the course of a run: when, in which batches, and cut off by a stop."""

import os
import shutil
import signal

import numpy as np
import pytest

from silkie_jax.corpus import CorpusReader
from silkie_jax.hardware.mesh import make_mesh
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.preference.grid import Grid
from silkie_jax.preference.plan import Plan
from silkie_jax.training.config_file import make_config
from silkie_jax.training.data import open_data
from silkie_jax.training.loop import train
from silkie_jax.training.trainer import Trainer
from tests.training.support import SMALL_RUN, make_tiny, read_lines, record, write_corpus

STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What all runs here share: six instructions are held out, in batches of two."""
    folder = tmp_path_factory.mktemp("evaluation")
    return SMALL_RUN | {
        "model": str(make_tiny(folder / "model")),
        "corpus": str(write_corpus(folder / "corpus", [record(n, images=0) for n in range(10)])),
        "batch_rows": 2,
        "steps": STEPS,
        "log_every": 2,
        "evaluate_every": 2,
        "evaluation_fraction": 0.6,
        "checkpoint_every": 3,
    }


def kept(run):
    """The metrics without what depends on the clock."""
    clock = ("_per_second", "_seconds", "input_wait")
    return [{k: v for k, v in line.items() if not k.endswith(clock)} for line in read_lines(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """A run that nothing disturbed, evaluated at its start, too."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    return train(make_config(base | {"run_dir": str(run), "evaluate_at_start": True}))


def test_before_the_first_step_and_every_so_many(alone):
    lines = kept(alone)
    assert [(line["step"], "loss" in line, "eval_loss" in line) for line in lines] == [
        (0, False, True),
        (2, True, True),
        (4, True, True),
    ]
    assert lines[0]["eval_loss"] == pytest.approx(np.log(2), rel=1e-5)  # nothing is learned yet
    assert lines[-1]["eval_loss"] != pytest.approx(np.log(2), rel=1e-3)


def test_never(base, tmp_path):
    run = train(make_config(base | {"run_dir": str(tmp_path / "run"), "evaluate_every": 0}))
    assert [line["step"] for line in kept(run)] == [2, 4]
    assert not any(name.startswith("eval_") for line in kept(run) for name in line)


# The number of evaluations (of two batches each, at the steps 0, 2 and 4) in whose midst the run is stopped.
@pytest.mark.parametrize(("which", "step"), [(0, 0), (1, 2), (2, 4)])
def test_a_stop_does_not_wait_for_an_evaluation_which_is_made_good(base, alone, tmp_path, monkeypatch, which, step):
    config = make_config(base | {"run_dir": str(tmp_path / "run"), "evaluate_at_start": True})
    real, batches = Trainer.evaluate, []

    def evaluate(self, batch):
        batches.append(batch)
        if len(batches) == 3 * which + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step} of {STEPS}; run the same command"):
        train(config)
    assert len(batches) == 3 * which + 1  # and not the rest of them
    before = kept(tmp_path / "run")
    assert before[:which] == kept(alone)[:which]
    assert [line["step"] for line in before] == [line["step"] for line in kept(alone)][: which + (which > 0)]
    assert not any(name.startswith("eval_") for line in before[which:] for name in line)
    assert not (tmp_path / "run" / "adapter").exists()
    train(config)
    assert kept(tmp_path / "run") == kept(alone)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (alone / name).read_bytes()


def test_an_evaluation_that_was_done_is_not_done_again(base, alone, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    shutil.rmtree(run / "adapter")
    monkeypatch.setattr(Trainer, "evaluate", None)
    train(make_config(base | {"run_dir": str(run), "evaluate_at_start": True}))
    assert kept(run) == kept(alone)


def test_programs_of_an_evaluation_are_few_and_compiled_before_the_first_step(base, tmp_path, capfd):
    """Rows of two lengths: those of a batch are of like length, so that little of it is padding."""
    records = [record(n, images=0, words=30 * (n % 2)) for n in range(24)]
    values = {"corpus": str(write_corpus(tmp_path / "corpus", records)), "batch_rows": 4, "steps": 1}
    config = make_config(base | values | {"run_dir": str(tmp_path / "run"), "evaluation_fraction": 0.5})
    corpus, tokenizer = CorpusReader(config.corpus), Tokenizer.from_folder(config.model)
    held = open_data(config, make_mesh(data=1), corpus, tokenizer).evaluation
    shapes = held.grid.shapes(range(held.steps_per_epoch))
    shuffled = np.random.default_rng(0).permutation(held.grid.plan.sizes)
    unsorted = Grid(Plan(shuffled, 4, seed=None), rows=4)
    padded, before = (
        sum(shape.at_once * count for shape, count in grid.shapes(range(held.steps_per_epoch)).items())
        for grid in (held.grid, unsorted)
    )
    assert padded < 0.8 * before
    assert len(shapes) == 2
    train(config)
    said = "".join(capfd.readouterr())
    assert said.count(": evaluation of 1 x 4 rows of ") == len(shapes)
    assert said.rindex(": evaluation of ") < said.index("step 1  loss")
