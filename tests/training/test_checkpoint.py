"""Checkpoints hold what was saved, whatever happens to the arrays or the folder afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from silkie_jax.errors import UserError
from silkie_jax.hardware.mesh import batch_sharding, make_mesh, replicated
from silkie_jax.training.checkpoint import Checkpoints


def state(value, size=8, sharding=None):
    weight = jnp.full((size, 16), value, jnp.float32)
    return nnx.State({"a": {"weight": nnx.Param(weight if sharding is None else jax.device_put(weight, sharding))}})


def values(trainable):
    return {float(x) for leaf in jax.tree.leaves(trainable) for x in np.unique(np.asarray(leaf))}


OPTIMIZER = optax.adam(1e-3)


def test_a_save_survives_the_donation_of_its_arrays(tmp_path):
    """The next step reuses their memory while the file is still being written."""
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1.0, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        trainable = state(float(step), size=200_000)
        checkpoints.save(step, trainable, OPTIMIZER.init(trainable))
        jax.block_until_ready(overwrite(trainable))
    checkpoints.close()
    for step in (1, 2, 3):
        blank = state(0.0, size=200_000)
        found, optimizer = Checkpoints(tmp_path, keep=3).restore(step, blank, OPTIMIZER.init(blank))
        assert values(found) == {step}
        assert values(optimizer) == {0}


def test_only_the_last_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest is None
    for step in (2, 4, 6):
        checkpoints.save(step, state(step), ())
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {"4", "6"}
    assert Checkpoints(tmp_path, keep=2).latest == 6


def test_what_a_kill_leaves_behind_is_not_a_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(2, state(2), ())
    checkpoints.close()
    unfinished = tmp_path / "4.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "half").write_bytes(b"x")
    again = Checkpoints(tmp_path, keep=2)
    assert again.latest == 2
    again.save(4, state(4), ())
    again.close()
    assert {path.name for path in tmp_path.iterdir()} == {"2", "4"}


def test_a_restore_lies_where_it_is_wanted(tmp_path):
    """Also on another mesh than the one that wrote it."""
    wide, narrow = make_mesh(8, 1, 1), make_mesh(1, 2, 1)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state(7.0, sharding=batch_sharding(wide)), ())
    checkpoints.close()
    for where in (batch_sharding(narrow), replicated(wide)):
        found, _ = Checkpoints(tmp_path, keep=1).restore(1, state(0.0, sharding=where), ())
        (leaf,) = jax.tree.leaves(found)
        assert leaf.sharding == where
        assert values(found) == {7}


@pytest.mark.parametrize("size", [4, 16])
def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path, size):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state(1.0, size=8), ())
    checkpoints.close()
    with pytest.raises(UserError, match=r"does not fit this run") as caught:
        Checkpoints(tmp_path, keep=1).restore(1, state(0.0, size=size), ())
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state(1.0), ())
    checkpoints.close()
    for file in (tmp_path / "1").rglob("*"):
        if file.is_file() and "d" in file.parts:
            file.write_bytes(b"")
    with pytest.raises(UserError, match=r"does not fit this run") as caught:
        Checkpoints(tmp_path, keep=1).restore(1, state(0.0), ())
    assert "\n" not in str(caught.value)
