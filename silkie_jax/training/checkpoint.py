"""Checkpoints of what resuming needs: trained parameters, optimiser state and the number of updates done.

Frozen weights are not among them: they are read from the model again. The data order follows from the seed and the
number of updates, so there is no iterator to save.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

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

    def save(self, step: int, trainable: nnx.State, optimizer: Any) -> None:
        """Starts writing; the arrays may be donated as soon as this returns."""
        self._manager.save(step, args=ocp.args.StandardSave(_named(trainable, optimizer)))

    def restore(self, step: int, trainable: nnx.State, optimizer: Any) -> tuple[nnx.State, Any]:
        """Reads checkpoint `step` into the shapes, types and shardings of the arrays given.

        Raises:
          UserError: the checkpoint does not fit the run.
        """
        named = _named(trainable, optimizer)
        like = {name: ocp.utils.to_shape_dtype_struct(leaf) for name, leaf in named.items()}
        try:
            found = self._manager.restore(step, args=ocp.args.StandardRestore(like))
        except (ValueError, KeyError, FileNotFoundError) as e:
            reason = str(e).splitlines()[0]
            raise UserError(f"{self.folder / str(step)}: does not fit this run ({reason}); use a new run_dir") from e
        return jax.tree.unflatten(jax.tree.structure((trainable, optimizer)), [found[name] for name in named])

    def close(self) -> None:
        """Waits for the last save."""
        self._manager.wait_until_finished()
        self._manager.close()


def _named(trainable: nnx.State, optimizer: Any) -> dict[str, jax.Array]:
    """Every array under its path, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path((trainable, optimizer))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
