"""Loading a checkpoint into a model, each device getting just its slice, and saving a trained model as a checkpoint."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from silkie_jax.checkpoints.convert import parse_dtype
from silkie_jax.checkpoints.folders import check_room, copy_side_files, new_folder
from silkie_jax.checkpoints.peft import load_adapter
from silkie_jax.checkpoints.sources import (
    MARKER,
    WEIGHTS,
    Piece,
    Source,
    lay_out,
    open_source,
    pieces,
    read_ahead,
    write_marker,
)
from silkie_jax.checkpoints.tensor_files import nbytes
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.models.qwen_vl.names import Leaf, abstract_model, leaves

ShardingOf = Callable[[tuple[str | None, ...], tuple[int, ...]], Sharding]
"""From an array's logical axes ("layers" first where layers are stacked) and its shape to its sharding."""


def load_model(
    path: str | Path,
    dtype: str = "float32",
    adapter: str | Path | None = None,
    sharding_of: ShardingOf | None = None,
    *,
    param_dtype: str | None = None,
) -> QwenVL:
    """Loads a Hugging Face folder or a converted one.

    Each byte is read once, and goes straight to the devices that need it: no second copy of the model exists on the
    host, and no random weights are drawn.

    Args:
      path: the folder.
      dtype: the type to compute in, "float32" or "bfloat16".
      adapter: a PEFT folder to attach.
      sharding_of: where each array goes (see `ShardingOf`); None: the default device.
      param_dtype: the type to keep parameters in; None: `dtype`.

    Raises:
      UserError: all that is wrong with the folder or the adapter, in one line.
    """
    source = open_source(path)
    kind = parse_dtype(param_dtype or dtype)
    model = abstract_model(source.config, dtype=parse_dtype(dtype), param_dtype=kind)
    graph, state = nnx.split(model)
    arrays = []
    for keys, variable in nnx.to_flat_state(state):
        leaf = source.tree[".".join(keys)]
        arrays.append((keys, variable.replace(_load_leaf(source, leaf, kind, _sharding(leaf, sharding_of)))))
    model = nnx.merge(graph, nnx.from_flat_state(arrays))
    if adapter is not None:
        load_adapter(model, adapter, sharding_of)
    return model


def _sharding(leaf: Leaf, sharding_of: ShardingOf | None) -> Sharding:
    if sharding_of is None:
        return jnp.zeros(()).sharding
    return sharding_of(("layers", *leaf.axes) if leaf.stacked else leaf.axes, leaf.shape)


def _load_leaf(source: Source, leaf: Leaf, dtype: np.dtype, sharding: Sharding) -> jax.Array:
    """Fills the slices that this process's devices need, in one pass over the stored pieces."""
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        assert index is not None
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    slices = {bounds: _aligned_empty([b - a for a, b in bounds], dtype) for bounds in devices}

    def fill(piece: Piece) -> None:
        values = None
        for bounds, target in slices.items():
            overlap = _overlap(piece, bounds)
            if overlap is not None:
                values = source.read(piece) if values is None else values
                inside, outside = overlap
                target[outside] = values[inside]  # casts

    for _ in read_ahead(partial(fill, piece) for piece in pieces(leaf, source.dtypes[leaf.path])):
        pass
    shards = [jax.device_put(slices[bounds], device) for bounds, group in devices.items() for device in group]
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards))


def _overlap(piece: Piece, bounds: tuple[tuple[int, int], ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What a piece and a slice of the leaf share: its place within the piece, and within the slice."""
    inside, outside = [], []
    covered = (*((s.start, s.stop) for s in piece.index), *((0, n) for n in piece.leaf.shape[len(piece.index) :]))
    for (first, last), (start, stop) in zip(covered, bounds, strict=True):
        low, high = max(first, start), min(last, stop)
        if low >= high:
            return None
        inside.append(slice(low - first, high - first))
        outside.append(slice(low - start, high - start))
    return tuple(inside), tuple(outside)


def _aligned_empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which JAX on a CPU takes over without copying."""
    size = nbytes(dtype, tuple(shape))
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def save_model(model: QwenVL, dst: str | Path, like: str | Path, dtype: str | None = None) -> None:
    """Writes a trained model as a converted folder that `load_model` and `export` read; replaces what is at `dst`.

    Adapters are not included (see `peft.save_adapter`). Every process of a multi-host run must call this; the first
    one writes.

    Args:
      model: the model; its arrays may be sharded.
      dst: the folder to make.
      like: the checkpoint the model began as: its tokenizer and configuration files are copied.
      dtype: "float32" or "bfloat16"; None keeps the arrays' own types.
    """
    target = dtype and parse_dtype(dtype)
    tree = leaves(model.config)
    arrays = {".".join(keys): variable[...] for keys, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    dtypes = {path: target or np.dtype(arrays[path].dtype) for path in tree}
    parts = (
        (piece, _gather(arrays[path], piece)) for path, leaf in tree.items() for piece in pieces(leaf, dtypes[path])
    )
    if jax.process_index() != 0:
        for _ in parts:  # gathering needs every process
            pass
        return
    try:
        with new_folder(dst, replace=(MARKER, WEIGHTS)) as folder:
            check_room(folder, sum(nbytes(dtypes[path], leaf.shape) for path, leaf in tree.items()))
            copy_side_files(Path(like), folder)
            write = lay_out(folder, tree, dtypes)
            for piece, values in parts:
                write(piece, values.astype(dtypes[piece.leaf.path], copy=False))
            write_marker(folder, dtypes.values())
    finally:
        for _ in parts:  # where it could not be written, the others still gather
            pass


def _gather(array: jax.Array, piece: Piece) -> np.ndarray:
    """A piece of an array that may be spread over the devices of several hosts."""
    starts = (*(s.start for s in piece.index), *(0 for _ in piece.leaf.shape[len(piece.index) :]))
    everywhere = None
    if isinstance(array.sharding, NamedSharding):
        everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
    return np.asarray(_cut(array, starts, piece.shape, everywhere).addressable_data(0))


@partial(jax.jit, static_argnames=("shape", "sharding"))
def _cut(array: jax.Array, starts: tuple[int, ...], shape: tuple[int, ...], sharding: Sharding | None) -> jax.Array:
    values = jax.lax.dynamic_slice(array, starts, shape)
    return values if sharding is None else jax.lax.with_sharding_constraint(values, sharding)
