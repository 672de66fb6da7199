"""`silkie export` of a run that is not finished, or goes on: from its checkpoints, which stay as they are."""

import dataclasses
import json
import shutil

import pytest

from silkie_jax.checkpoints.export import CARD
from silkie_jax.cli import main
from silkie_jax.errors import UserError
from silkie_jax.training.checkpoint import kept_steps
from silkie_jax.training.config_file import load_config, make_config
from silkie_jax.training.loop import train
from silkie_jax.training.result import export_run
from tests.training.support import make_tiny, read_lines, record, write_corpus

RESULTS = ("adapter", "model")
# What names a path, of the model that an adapter belongs to, or a time.
DATED = ("adapter_config.json", "_CHECKPOINT_METADATA", "commit_success.txt")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unfinished")
    return {
        "model": str(make_tiny(folder / "model")),
        "corpus": str(write_corpus(folder / "corpus", [record(n, images=0) for n in range(6)])),
        "optimizer": {"learning_rate": 1e-2, "warmup_ratio": 0},
        "batch_rows": 3,
        "steps": 4,
        "dtype": "bfloat16",
        "mesh": {"data": 1},
        "evaluation_fraction": 0,
        "checkpoint_every": 2,
    }


KINDS = {
    "adapter": {"lora": {"rank": 2, "alpha": 3}},
    "tower and adapter": {
        "lora": {"rank": 2},
        "train_vision": "resampler",
        "optimizer": {"learning_rate": 1e-2, "warmup_ratio": 0, "resampler_learning_rate": 1e-3},
    },
    "all weights": {"lora": None, "train_vision": "all"},
}


@pytest.fixture(scope="module", params=KINDS)
def finished(request, base, tmp_path_factory):
    return train(make_config(base | KINDS[request.param] | {"run_dir": str(tmp_path_factory.mktemp("runs") / "run")}))


@pytest.fixture
def unfinished(finished, tmp_path):
    """The same run before it wrote its results, with a save under way."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in RESULTS:
        shutil.rmtree(run / name, ignore_errors=True)
    half = run / "checkpoints" / "6.orbax-checkpoint-tmp-7"
    half.mkdir()
    (half / "half").write_bytes(b"x")
    return run


def contents(folder):
    """Of its files, but for the card, which tells a checkpoint from a result."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != CARD)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_last_checkpoint_gives_what_the_finished_run_gives(finished, unfinished, tmp_path):
    before = contents(unfinished)
    assert export_run(finished, tmp_path / "expected") is None
    assert export_run(unfinished, tmp_path / "merged") == 4
    assert contents(tmp_path / "merged") == contents(tmp_path / "expected")
    assert "| steps | finished after 4 |" in (tmp_path / "expected" / CARD).read_text()
    assert "| steps | checkpoint of 4 |" in (tmp_path / "merged" / CARD).read_text()
    if (finished / "adapter").exists():
        assert export_run(unfinished, tmp_path / "alone", adapter=True) == 4
        ours, expected = (contents(folder) for folder in (tmp_path / "alone", finished / "adapter"))
        assert ours["adapter_model.safetensors"] == expected["adapter_model.safetensors"]
        assert set(ours) == set(expected)
        assert "library_name: peft" in (tmp_path / "alone" / CARD).read_text()
    assert contents(unfinished) == before
    assert kept_steps(unfinished / "checkpoints") == [2, 4]


def test_an_adapter_that_was_scaled_by_the_root_of_its_rank_stays_so(base, tmp_path):
    """Its scale is in no checkpoint, and not what alpha and rank of the run's configuration give."""
    first = train(make_config(base | KINDS["adapter"] | {"run_dir": str(tmp_path / "first")}))
    path = first / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": True}))
    values = {"adapter": str(first / "adapter"), "steps": 2, "run_dir": str(tmp_path / "second")}
    second = train(make_config(base | values))
    export_run(second, tmp_path / "expected")
    export_run(second, tmp_path / "merged", step=2)
    assert contents(tmp_path / "merged") == contents(tmp_path / "expected")


def test_an_earlier_step_of_a_finished_run_is_another_model(finished, base, tmp_path, capsys):
    """That of a run that was as far."""
    assert main(["export", str(finished), str(tmp_path / "two"), "--step", "2", "--dtype", "float32"]) == 0
    assert f"exported step 2 of {finished} to {tmp_path / 'two'}" in capsys.readouterr().out
    export_run(finished, tmp_path / "four", step=4, dtype="float32")
    export_run(finished, tmp_path / "result", dtype="float32")
    assert contents(tmp_path / "four") == contents(tmp_path / "result")
    assert contents(tmp_path / "two") != contents(tmp_path / "four")
    earlier = tmp_path / "earlier"
    shutil.copytree(finished, earlier)
    shutil.rmtree(earlier / "checkpoints" / "4")
    for name in RESULTS:
        shutil.rmtree(earlier / name, ignore_errors=True)
    assert export_run(earlier, tmp_path / "again", dtype="float32") == 2
    assert contents(tmp_path / "again") == contents(tmp_path / "two")


def test_a_step_that_is_not_kept_is_refused_with_those_that_are(unfinished, tmp_path):
    with pytest.raises(UserError, match=r"run: no checkpoint of step 3; there are those of steps 2, 4$"):
        export_run(unfinished, tmp_path / "out", step=3)
    for step in (2, 4):
        shutil.rmtree(unfinished / "checkpoints" / str(step))
    with pytest.raises(UserError, match="run: no checkpoint yet; there is one after checkpoint_every steps"):
        export_run(unfinished, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_after_its_export_to_the_same_end(finished, unfinished, tmp_path):
    """The save that was under way is the run's to remove."""
    shutil.rmtree(unfinished / "checkpoints" / "4")
    export_run(unfinished, tmp_path / "out")
    assert (unfinished / "checkpoints" / "6.orbax-checkpoint-tmp-7" / "half").exists()
    config = dataclasses.replace(load_config(unfinished / "config.yaml"), run_dir=str(unfinished))
    train(config)
    found = [name for name in RESULTS if (finished / name).exists()]
    assert found
    for name in found:
        ours, expected = contents(unfinished / name), contents(finished / name)
        assert set(ours) == set(expected)
        assert [k for k in ours if ours[k] != expected[k] and not k.endswith(DATED)] == []
    (line,) = [line for line in read_lines(unfinished / "metrics.jsonl") if line["step"] == 4]
    own = {name for name in line if name.endswith("_learning_rate")}
    assert own == ({"resampler_learning_rate"} if config.optimizer.resampler_learning_rate else set())
