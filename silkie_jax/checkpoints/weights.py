"""Loading a checkpoint into a model, each device getting just its slice, and saving a trained model as a checkpoint."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl.model import PARTS, QwenVL
from silkie_jax.models.qwen_vl.names import Leaf, abstract_model, leaves, scale_path
from silkie_jax.nn.quantize import encode, is_code

ShardingOf = Callable[[tuple[str | None, ...], tuple[int, ...]], Sharding]
"""From an array's logical axes ("layers" first where layers are stacked) and its shape to its sharding."""


def load_model(
    path: str | Path,
    dtype: str = "float32",
    adapter: str | Path | None = None,
    sharding_of: ShardingOf | None = None,
    *,
    param_dtype: str | None = None,
    parts: Sequence[str] = PARTS,
    quantize: str | None = None,
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
      parts: which parts of the model (`model.PARTS`) are loaded; the others are not read.
      quantize: "int8" or "fp8": large weights are kept in 8 bits (nn/quantize.py), piece after piece as they are read.

    Raises:
      UserError: all that is wrong with the folder or the adapter, in one line.
    """
    source = open_source(path)
    kind = parse_dtype(param_dtype or dtype)
    blank = abstract_model(source.config, parts, quantize, dtype=parse_dtype(dtype), param_dtype=kind)
    graph, state = nnx.split(blank)
    variables = dict(nnx.to_flat_state(state))
    arrays = _load(source, variables, kind, sharding_of)
    loaded = [(keys, variables[keys].replace(array)) for keys, array in arrays]
    model = nnx.merge(graph, nnx.from_flat_state(loaded))
    if adapter is not None:
        load_adapter(model, adapter, sharding_of)
    return model


def stream_part(
    path: str | Path, part: str, dtype: str, sharding_of: ShardingOf | None = None, quantize: str | None = None
) -> Iterator[tuple[tuple, jax.Array]]:
    """The arrays of one part of a model under their paths, one after another.

    Who lets go of each before taking the next needs room for the largest alone.

    Raises:
      UserError: all that is wrong with the folder, in one line.
    """
    source = open_source(path)
    kind = parse_dtype(dtype)
    state = nnx.state(abstract_model(source.config, (part,), quantize, dtype=kind))
    yield from _load(source, dict(nnx.to_flat_state(state)), kind, sharding_of)


def _load(
    source: Source, variables: Mapping[tuple, nnx.Variable], dtype: np.dtype, sharding_of: ShardingOf | None
) -> Iterator[tuple[tuple, jax.Array]]:
    """The arrays that these abstract variables stand for."""
    where = sharding_of or (lambda axes, shape: jnp.zeros(()).sharding)
    paths = {".".join(keys): keys for keys in variables}
    for path in paths:
        if path not in source.tree:  # scales, which come with their codes
            continue
        names = [path, *({scale_path(path)} & paths.keys())]
        targets = []
        for name in names:
            variable = variables[paths[name]]
            shape, coded = tuple(variable.shape), len(names) > 1
            axes = ("layers", *variable.axes) if source.tree[path].stacked else variable.axes
            targets.append(_Target(shape, variable.dtype if coded else dtype, where(axes, shape)))
        _fill(source, source.tree[path], targets)
        yield from ((paths[name], target.array()) for name, target in zip(names, targets, strict=True))


def _fill(source: Source, leaf: Leaf, targets: list["_Target"]) -> None:
    """Reads a leaf in one pass over its stored pieces, for one target or for codes and scales."""

    def fill(piece: Piece) -> None:
        if not any(target.wants(piece) for target in targets):
            return
        values = source.read(piece)
        parts = encode(values, targets[0].dtype) if len(targets) > 1 else (values,)
        for target, part in zip(targets, parts, strict=True):
            target.fill(piece, part)

    for _ in read_ahead(partial(fill, piece) for piece in pieces(leaf, source.dtypes[leaf.path])):
        pass


class _Target:
    """An array to be: the slices of it that this process's devices need, filled piece by piece."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding):
        self._shape, self.dtype, self._sharding = shape, dtype, sharding
        self._devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            assert index is not None
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
            self._devices.setdefault(bounds, []).append(device)
        self._slices = {bounds: _aligned_empty([b - a for a, b in bounds], dtype) for bounds in self._devices}

    def wants(self, piece: Piece) -> bool:
        """Whether a piece has something of a slice."""
        return any(_overlap(piece, bounds) for bounds in self._slices)

    def fill(self, piece: Piece, values: np.ndarray) -> None:
        """Takes what belongs to the slices."""
        for bounds, target in self._slices.items():
            overlap = _overlap(piece, bounds)
            if overlap is not None:
                inside, outside = overlap
                target[outside] = values[inside]  # casts

    def array(self) -> jax.Array:
        """The slices on their devices."""
        devices = [(bounds, device) for bounds, group in self._devices.items() for device in group]
        shards = [jax.device_put(self._slices[bounds], device) for bounds, device in devices]
        array = jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)
        return jax.block_until_ready(array)


def _overlap(piece: Piece, bounds: tuple[tuple[int, int], ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What a piece and a slice of the leaf, or of its scales, share: the place within the piece, and the slice."""
    inside, outside = [], []
    covered = (*((s.start, s.stop) for s in piece.index), *((0, n) for n in piece.leaf.shape[len(piece.index) :]))
    for (first, last), (start, stop) in zip(covered[: len(bounds)], bounds, strict=True):
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

    What the model lacks is taken from `like`. Adapters are not included (see `peft.save_adapter`). Every process of a
    multi-host run must call this; the first one writes.

    Args:
      model: the model; its arrays may be sharded.
      dst: the folder to make.
      like: the checkpoint the model began as: its tokenizer and configuration files are copied, and its own weights
        where the model has only some of its parts.
      dtype: "float32" or "bfloat16"; None keeps the arrays' own types.

    Raises:
      UserError: the weights are codes, which a checkpoint does not hold.
    """
    target = dtype and parse_dtype(dtype)
    tree = leaves(model.config)
    arrays = {".".join(keys): variable[...] for keys, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    if any(is_code(array.dtype) for array in arrays.values()):
        raise UserError(f"{dst}: weights in 8 bits are no checkpoint; load the model without quantize to save it")
    source = open_source(like) if tree.keys() - arrays.keys() else None
    own = source.dtypes if source else {}
    dtypes = {path: target or np.dtype(arrays[path].dtype if path in arrays else own[path]) for path in tree}

    def values(path: str, piece: Piece) -> np.ndarray:
        if path in arrays:
            return _gather(arrays[path], piece)
        assert source is not None
        return source.read(piece)

    parts = ((piece, values(path, piece)) for path, leaf in tree.items() for piece in pieces(leaf, dtypes[path]))
    if jax.process_index() != 0:
        for _ in parts:  # gathering needs every process
            pass
        return
    try:
        with new_folder(dst, replace=(MARKER, WEIGHTS)) as folder:
            check_room(folder, sum(nbytes(dtypes[path], leaf.shape) for path, leaf in tree.items()))
            copy_side_files(Path(like), folder)
            write = lay_out(folder, tree, dtypes)
            for piece, found in parts:
                write(piece, found.astype(dtypes[piece.leaf.path], copy=False))
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
