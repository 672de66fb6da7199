"""A run's first step: the policy is its own reference, unless another one was asked for."""

import math
import shutil

import numpy as np
import pytest

from silkie_jax.errors import UserError
from silkie_jax.scoring.reference import compute_reference
from silkie_jax.training.config_file import load_config, make_config
from silkie_jax.training.loop import train
from silkie_jax.training.run_file import as_it_began, save_contents
from tests.training.support import SMALL_RUN, make_tiny, read_lines, record, write_corpus

AGREE = "policy and reference agree at the start: margins of "
DIFFER = "policy and reference differ at the start"
CLOSE = {"float32": 1e-5, "bfloat16": 1e-2}  # to log 2, the loss of margins of zero


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What all runs here share."""
    folder = tmp_path_factory.mktemp("start")
    return SMALL_RUN | {
        "model": str(make_tiny(folder / "model")),
        "corpus": str(write_corpus(folder / "corpus", [record(n, images=0) for n in range(4)])),
        "lora": {"rank": 2, "alpha": 8},
        "batch_rows": 4,
        "steps": 1,
    }


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """An adapter that makes a difference."""
    run = tmp_path_factory.mktemp("runs") / "first"
    return str(train(make_config(base | {"run_dir": str(run), "steps": 6})) / "adapter")


def first_loss(base, run, **values):
    folder = train(make_config(base | {"run_dir": str(run), **values}))
    return read_lines(folder / "metrics.jsonl")[0]["loss"]


def said(capfd):
    """What was said of the start, on its own line."""
    lines = [line for line in "".join(capfd.readouterr()).splitlines() if "policy and reference" in line]
    assert len(lines) == 1
    return lines[0]


def test_a_new_adapter_starts_as_its_reference(base, tmp_path, capfd):
    """Computed in bfloat16, where both passes are not rounded alike."""
    loss = first_loss(base, tmp_path / "run", dtype="bfloat16")
    assert loss == pytest.approx(math.log(2), rel=CLOSE["bfloat16"])
    assert said(capfd).startswith(AGREE)


def test_an_adapter_that_training_starts_from_is_the_reference(base, adapter, tmp_path, capfd):
    assert first_loss(base, tmp_path / "run", adapter=adapter) == pytest.approx(math.log(2), rel=CLOSE["float32"])
    assert said(capfd).startswith(AGREE)
    assert load_config(tmp_path / "run" / "config.yaml").reference == "copy"


def test_another_reference_may_be_asked_for_by_name(base, adapter, tmp_path, capfd):
    loss = first_loss(base, tmp_path / "run", adapter=adapter, reference="adapter_off")
    assert loss < 0.6
    assert said(capfd).startswith(f"{DIFFER}, as reference: adapter_off with adapter asks: margins of ")


# Stored log-probabilities


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_stored_reference_is_of_the_adapter_that_training_starts_from(base, adapter, tmp_path, capfd, dtype):
    values = {"adapter": adapter, "reference": "precomputed", "dtype": dtype, "run_dir": str(tmp_path / "run")}
    compute_reference(make_config(base | values | {"adapter": None}))
    with pytest.raises(UserError, match=r"reference log-probabilities there were made with other adapter; run"):
        train(make_config(base | values))
    folder = compute_reference(make_config(base | values | {"batch_rows": 1}))
    assert first_loss(base, tmp_path / "run", **values) == pytest.approx(math.log(2), rel=CLOSE[dtype])
    assert said(capfd).startswith(AGREE)
    (part,) = folder.glob("part-*.npz")
    kept = dict(np.load(part))
    part.unlink()
    np.savez(part, **kept | {"logps": kept["logps"] + 4 * np.arange(len(kept["logps"])) % 9})
    with pytest.raises(UserError) as caught:
        train(make_config(base | values | {"run_dir": str(tmp_path / "stale")}))
    assert str(caught.value).startswith(f"{DIFFER}: margins of ")
    assert f"remove {folder} and run `silkie reference` again" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "stale" / "checkpoints").iterdir())
    assert not (tmp_path / "stale" / "metrics.jsonl").read_text()


# Runs that began before


def test_a_run_that_began_with_the_bare_base_by_default_continues_with_it(base, adapter, tmp_path, capfd):
    """Its configuration named no reference, and its folder says adapter_off. The start was another time."""
    named = {"adapter": adapter, "reference": "adapter_off", "steps": 1}
    first_loss(base, tmp_path / "run", **named)
    config = make_config(base | named | {"run_dir": str(tmp_path / "run"), "reference": None})
    assert config.reference == "adapter_off"
    shutil.rmtree(tmp_path / "run" / "adapter")
    capfd.readouterr()
    assert train(config) == tmp_path / "run"
    assert "policy and reference" not in "".join(capfd.readouterr())
    assert make_config(base | named | {"run_dir": str(tmp_path / "other"), "reference": None}).reference == "copy"


def test_a_run_that_began_with_a_stored_base_continues_with_it(tmp_path):
    """Its run.json, if it had one, knew of no adapter's reference; once it continues, this is written down."""
    depends, base = {"weights": "w", "adapter": "a"}, {"weights": "w"}
    assert as_it_began(depends, tmp_path, done=0) == depends  # nothing of it is done: it may begin anew
    assert as_it_began(depends, tmp_path, done=3) == base
    save_contents(tmp_path, {"adapter": "a", "reference": None})
    assert as_it_began(depends, tmp_path, done=3) == base
    (tmp_path / "run.json").unlink()
    save_contents(tmp_path, {"adapter": "a", "reference": "a"})
    assert as_it_began(depends, tmp_path, done=3) == depends
    assert as_it_began(base, tmp_path, done=3) == base
