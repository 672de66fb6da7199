"""Checkpoints of what resuming needs: trained parameters, optimiser state and the number of updates done.

Frozen weights are not among them: they are read from the model again. The data order follows from the seed and the
number of updates, so there is no iterator to save.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from silkie_jax.checkpoints.sources import quiet
from silkie_jax.errors import UserError


class Checkpoints:
    """Asynchronous checkpoints in a folder; a save that was cut off is never taken for one."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self.folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """Updates done at the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, *state: Any) -> None:
        """Starts writing what is trained, the optimiser's state and what else a run keeps, in this order.

        The arrays may be donated as soon as this returns. A part without arrays leaves no trace.
        """
        self._manager.save(step, args=ocp.args.StandardSave(_named(*state)))

    def restore(self, step: int, *state: Any) -> tuple[Any, ...]:
        """Reads checkpoint `step` into the shapes, types and shardings of the arrays given, in the order of `save`.

        Raises:
          UserError: the checkpoint does not fit the run.
        """
        named = _named(*state)
        like = {name: ocp.utils.to_shape_dtype_struct(leaf) for name, leaf in named.items()}
        try:
            found = self._manager.restore(step, args=ocp.args.StandardRestore(like))
        except (ValueError, KeyError, FileNotFoundError) as e:
            reason = str(e).splitlines()[0]
            raise UserError(f"{self.folder / str(step)}: does not fit this run ({reason}); use a new run_dir") from e
        return jax.tree.unflatten(jax.tree.structure(state), [found[name] for name in named])

    def close(self) -> None:
        """Waits for the last save."""
        self._manager.wait_until_finished()
        self._manager.close()


def kept_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending; a run that goes on in it is not disturbed."""
    if not folder.is_dir():
        return []
    with quiet(), _reader(folder) as manager:
        return sorted(manager.all_steps())


def read_trainable(folder: Path, step: int, like: nnx.State) -> nnx.State:
    """What was trained as it was at checkpoint `step`, as arrays of the host; the optimiser's state is not read.

    A run that goes on in the folder is not disturbed, and no device is touched.

    Args:
      like: the state's shapes.

    Raises:
      UserError: the checkpoint does not fit, is damaged, or the run has removed it meanwhile.
    """
    named = _named(like)
    form = ocp.args.PyTreeRestore(
        {name: np.zeros(()) for name in named},
        restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in named},
        partial_restore=True,
    )
    place = folder / str(step)
    try:
        with quiet(), _reader(folder) as manager:
            found = manager.restore(step, args=form)
        shapes = {name: getattr(found[name], "shape", None) for name in named}
        odd = [name for name, leaf in named.items() if shapes[name] != leaf.shape]
        if odd:
            raise ValueError(f"{odd[0]} is {shapes[odd[0]]} and not {named[odd[0]].shape}")
    except (ValueError, KeyError, FileNotFoundError) as e:
        if not place.is_dir():
            raise UserError(f"{place}: the run has removed this checkpoint while it was read; try again") from e
        raise UserError(f"{place}: does not fit this run ({str(e).splitlines()[0]})") from e
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in named])


def _reader(folder: Path) -> ocp.CheckpointManager:
    """Changes nothing in the folder: unlike a run's own manager it removes no save that is under way."""
    return ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(read_only=True))


def _named(*state: Any) -> dict[str, jax.Array]:
    """Every array under its path, in the order of the tree; paths begin with the part's number."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
