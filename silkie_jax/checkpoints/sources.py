"""Where weights lie on disk, a Hugging Face folder or a converted one, both read piece by piece through one interface.

A converted folder holds config.json and tokenizer files as they came, `silkie.json`, and in `weights/` an Orbax
checkpoint of the stacked tree: Zarr arrays without compression, cut so that a chunk is some rows of one layer. That
makes a chunk a run of bytes of the official tensor, and any slice cheap to find.
"""

import dataclasses
import json
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging

from silkie_jax.checkpoints.tensor_files import BFLOAT16, OTHER, StoredTensor, list_folder, nbytes
from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl.config import QwenVLConfig
from silkie_jax.models.qwen_vl.names import Leaf, leaves, misfits, shorten

MARKER = "silkie.json"
WEIGHTS = "weights"
_FORMAT = 1
_PIECE = 32 * 2**20  # bytes read, cast and written at a time, unless a single row is larger
STORED_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16}

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some rows of one layer, or a whole small leaf: layers first..last, and rows start..stop of each."""

    leaf: Leaf
    first: int
    last: int
    start: int
    stop: int

    @property
    def index(self) -> tuple[slice, ...]:
        """The piece's place in the leaf's array."""
        rows = slice(self.start, self.stop)
        return (slice(self.first, self.last), rows) if self.leaf.stacked else (rows,)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `array[index]`."""
        lead = (self.last - self.first,) if self.leaf.stacked else ()
        return (*lead, self.stop - self.start, *self.leaf.own[1:])


def chunk_rows(leaf: Leaf, dtype: np.dtype) -> int | None:
    """Rows of a layer in one piece, evenly cut if possible; None if the whole leaf is one piece."""
    if nbytes(dtype, leaf.shape) <= _PIECE:
        return None
    rows = leaf.own[0]
    parts = min(rows, -(-nbytes(dtype, leaf.own) // _PIECE))
    even = next((n for n in range(parts, min(2 * parts, rows) + 1) if rows % n == 0), parts)
    return -(-rows // even)


def pieces(leaf: Leaf, dtype: np.dtype) -> Iterator[Piece]:
    """Cuts a leaf as its chunks are cut."""
    rows = chunk_rows(leaf, dtype)
    if rows is None:
        yield Piece(leaf, 0, leaf.layers, 0, leaf.own[0])
        return
    for layer in range(leaf.layers):
        yield from layer_pieces(leaf, layer, dtype)


def layer_pieces(leaf: Leaf, layer: int, dtype: np.dtype) -> Iterator[Piece]:
    """One layer of a leaf, in pieces."""
    rows = chunk_rows(leaf, dtype) or leaf.own[0]
    for start in range(0, leaf.own[0], rows):
        yield Piece(leaf, layer, layer + 1, start, min(start + rows, leaf.own[0]))


class Source(Protocol):
    """A checkpoint whose names, shapes and files have been checked."""

    folder: Path
    config: QwenVLConfig
    tree: dict[str, Leaf]
    dtypes: dict[str, np.dtype]  # stored type by path

    def read(self, piece: Piece) -> np.ndarray:
        """The piece's values as they are stored, shaped `piece.shape`."""
        ...


def open_source(folder: str | Path) -> Source:
    """Opens a Hugging Face folder or a converted one; reads no weights, but checks all their names, shapes and files.

    Raises:
      UserError: everything that is wrong with the folder, in one message.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    config = QwenVLConfig.from_folder(folder)
    return ConvertedFolder(folder, config) if (folder / MARKER).is_file() else HuggingFaceFolder(folder, config)


class HuggingFaceFolder:
    """safetensors or PyTorch files with the official names."""

    def __init__(self, folder: Path, config: QwenVLConfig):
        self.folder, self.config, self.tree = folder, config, leaves(config)
        listing = list_folder(folder)
        expected = {name: leaf.official for leaf in self.tree.values() for name in leaf.names}
        found = {name: tensor.shape for name, tensor in listing.tensors.items()}
        problems = listing.problems + misfits(found, expected, listing.lost)
        strange = [n for n in expected if n in listing.tensors and listing.tensors[n].dtype == OTHER]
        if strange:
            problems.append(f"not of a floating-point type: {shorten(strange)}")
        if problems:
            raise UserError(f"{folder}: {'; '.join(problems)}")
        self._tensors: dict[str, StoredTensor] = listing.tensors
        self.dtypes = {path: _common(listing.tensors[n].dtype for n in leaf.names) for path, leaf in self.tree.items()}

    def read(self, piece: Piece) -> np.ndarray:
        row = math.prod(piece.leaf.own[1:])
        layers = [
            self._tensors[name].read(piece.start * row, piece.stop * row)
            for name in piece.leaf.names[piece.first : piece.last]
        ]
        return (layers[0] if len(layers) == 1 else np.stack(layers)).reshape(piece.shape)


def _common(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The type to keep a stacked leaf in: its layers' own if they agree, else float32. float64 is kept as float32."""
    kinds = set(dtypes)
    only = kinds.pop()
    return np.dtype(np.float32) if kinds or only.itemsize == 8 else only


class ConvertedFolder:
    """What `silkie convert` wrote, or the `model/` of a training run."""

    def __init__(self, folder: Path, config: QwenVLConfig):
        self.folder, self.config, self.tree = folder, config, leaves(config)
        _check_marker(folder / MARKER)
        weights = folder / WEIGHTS
        found = {p.parent.name for p in weights.glob("*/.zarray")}
        # The cache spares reading a chunk once a layer where a small leaf's layers are read one at a time.
        context = ts.Context({"cache_pool": {"total_bytes_limit": 2 * _PIECE}})
        opening = {path: ts.open(_spec(weights, path), context=context) for path in self.tree if path in found}
        try:
            self._stores = {path: future.result() for path, future in opening.items()}
        except ValueError as e:
            raise UserError(f"{weights}: not readable ({_first_line(e)}); convert again") from None
        shapes = {path: store.shape for path, store in self._stores.items()}
        shapes |= dict.fromkeys(found - set(self.tree), ())
        problems = misfits(shapes, {path: leaf.shape for path, leaf in self.tree.items()})
        broken = [
            str(p.relative_to(weights)) for path, store in self._stores.items() for p in _broken(weights, path, store)
        ]
        if broken:
            problems.append(f"missing or truncated files: {shorten(broken)}")
        if problems:
            raise UserError(f"{weights}: {'; '.join(problems)}; convert again")
        self.dtypes = {path: store.dtype.numpy_dtype for path, store in self._stores.items()}

    def read(self, piece: Piece) -> np.ndarray:
        return self._stores[piece.leaf.path][piece.index].read(order="C").result()


def _check_marker(path: Path) -> None:
    try:
        form = json.loads(path.read_text())["format"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; convert again") from None
    if form != _FORMAT:
        raise UserError(f"{path}: written in format {form}, this version reads format {_FORMAT}; convert again")


def _broken(weights: Path, path: str, store: ts.TensorStore) -> Iterator[Path]:
    """Files of an uncompressed array that are absent or not whole."""
    metadata = store.spec().to_json()["metadata"]
    if metadata["compressor"] is not None:
        return
    chunk = metadata["chunks"]
    size = math.prod(chunk) * store.dtype.numpy_dtype.itemsize
    for place in np.ndindex(*(-(-n // c) for n, c in zip(store.shape, chunk, strict=True))):
        file = weights / path / ".".join(map(str, place))
        if not file.is_file() or file.stat().st_size != size:
            yield file


def _spec(weights: Path, path: str) -> dict[str, Any]:
    kvstore = {"driver": "file", "path": f"{weights.resolve() / path}/"}
    # A chunk that is absent is damage, never zeros.
    return {"driver": "zarr", "kvstore": kvstore, "open": True, "fill_missing_data_reads": False}


def _first_line(e: BaseException) -> str:
    return str(e).splitlines()[0]


class _Space:
    """A leaf of a checkpoint that Orbax lays out and we fill."""

    def __init__(self, leaf: Leaf, dtype: np.dtype):
        self.leaf, self.dtype, self.shape = leaf, dtype, leaf.shape
        rows = chunk_rows(leaf, dtype)
        lead = (1,) if leaf.stacked else ()
        self.chunk = leaf.shape if rows is None else (*lead, rows, *leaf.own[1:])


class _SpaceHandler(ocp.type_handlers.NumpyHandler):
    """Lets Orbax write a checkpoint's metadata around arrays whose data is still to come.

    Handing Orbax the arrays themselves would need all of a stacked leaf in memory, up to 6 GB of it.
    """

    async def serialize(self, values, infos, args=None):
        del args
        for space, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            metadata = {"shape": space.shape, "chunks": space.chunk, "compressor": None}
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{info.parent_dir / info.name}/"},
                "dtype": space.dtype.name,
                "metadata": metadata,
            }
            await ts.open(spec, create=True)
        return []


def lay_out(
    folder: Path, tree: Mapping[str, Leaf], dtypes: Mapping[str, np.dtype]
) -> Callable[[Piece, np.ndarray], None]:
    """Makes `folder/weights`, an Orbax checkpoint without data; returns what writes a piece of it."""
    spaces = {path: _Space(leaf, dtypes[path]) for path, leaf in tree.items()}
    nested: dict[str, Any] = {}
    for path, space in spaces.items():
        *above, last = path.split(".")
        node = nested
        for key in above:
            node = node.setdefault(key, {})
        node[last] = space
    with quiet():
        registry = ocp.type_handlers.create_type_handler_registry((_Space, _SpaceHandler()))
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder.resolve() / WEIGHTS, args=ocp.args.PyTreeSave(nested))
    stores = {}
    for path in spaces:
        spec = _spec(folder / WEIGHTS, path) | {"store_data_equal_to_fill_value": True}
        stores[path] = ts.open(spec).result()

    def write(piece: Piece, values: np.ndarray) -> None:
        try:
            stores[piece.leaf.path][piece.index].write(values).result()
        except ValueError as e:
            raise UserError(f"{folder}: cannot be written ({_first_line(e)})") from None

    return write


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Orbax's warnings (about arrays that are not jax.Array, say) from users, who can do nothing about them."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def write_marker(folder: Path, dtypes: Iterable[np.dtype]) -> None:
    """Says that a folder is a converted checkpoint, and of which type most of it is."""
    text = json.dumps({"format": _FORMAT, "dtype": main_dtype(dtypes)}, indent=2)
    (folder / MARKER).write_text(text + "\n")


def main_dtype(dtypes: Iterable[np.dtype]) -> str:
    """The name of the most frequent type."""
    return Counter(d.name for d in dtypes).most_common(1)[0][0]


def read_ahead(tasks: Iterable[Callable[[], T]], workers: int = 4, depth: int = 4) -> Iterator[T]:
    """Runs tasks in threads, at most `depth` ahead of the consumer, and yields their results in order."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
