"""Tensor files of the PyTorch world: safetensors and `.bin` shards, found by their headers and read piece by piece.

Opening a folder reads headers only and reports everything that is wrong with its files at once. Data is read by
position into fresh buffers, never mapped, so that resident memory is the pieces in use and nothing else.
"""

import dataclasses
import json
import math
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from silkie_jax.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Types of weights by their name in a safetensors header (https://github.com/huggingface/safetensors, "Format").
DTYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16}
OTHER = np.dtype(np.void)
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: raw, contiguous, little-endian, in C order."""

    name: str
    dtype: np.dtype  # OTHER: a type that weights never have
    shape: tuple[int, ...]
    path: Path
    offset: int  # bytes from the start of the file

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements start..stop of the flattened tensor."""
        size = self.dtype.itemsize
        buffer = np.empty(stop - start, self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * size)
            view = buffer.view(np.uint8).data
            while view:
                count = file.readinto(view)
                if not count:
                    raise UserError(f"{self.path}: ends inside {self.name}; copy the file again")
                view = view[count:]
        return buffer


@dataclasses.dataclass
class Listing:
    """What the headers of a folder's files say, and everything that is wrong with them."""

    tensors: dict[str, StoredTensor]
    problems: list[str]
    lost: set[str]  # tensors that an index puts into files that are missing or broken


def list_folder(folder: Path) -> Listing:
    """Reads the headers of a checkpoint folder: safetensors if there are any, else `.bin` files.

    Raises:
      UserError: the folder holds neither, or `.bin` files and torch is not installed.
    """
    for index, single, read_header in (
        (SAFETENSORS_INDEX, "model.safetensors", read_safetensors_header),
        (TORCH_INDEX, "pytorch_model.bin", read_torch_header),
    ):
        if (folder / index).is_file():
            return _list_sharded(folder / index, read_header)
        if (folder / single).is_file():
            return list_files([folder / single], read_header)
    raise UserError(f"{folder}: no weights found (model.safetensors or pytorch_model.bin, or an index of either)")


def list_files(paths: Iterable[Path], read_header=None) -> Listing:
    """Reads the headers of the given files; the reader is chosen by suffix if not given."""
    listing = Listing({}, [], set())
    for path in paths:
        read = read_header or (read_safetensors_header if path.suffix == ".safetensors" else read_torch_header)
        try:
            for tensor in read(path):
                if tensor.name in listing.tensors:
                    other = listing.tensors[tensor.name].path.name
                    listing.problems.append(f"{tensor.name} is in both {other} and {path.name}")
                listing.tensors[tensor.name] = tensor
        except _BrokenFile as e:
            listing.problems.append(f"{path.name} {e}")
    return listing


def _list_sharded(index: Path, read_header) -> Listing:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: not an index of tensors (expected JSON with 'weight_map')") from None
    foreign = [f for f in files if not isinstance(f, str) or Path(f).name != f]
    if foreign:
        raise UserError(f"{index}: names files outside its folder: {', '.join(map(str, foreign))}")
    listing = list_files((index.parent / f for f in files), read_header)
    broken = {p.split(" ", 1)[0] for p in listing.problems} & set(files)
    listing.lost = {name for name, file in weight_map.items() if file in broken}
    for name, file in weight_map.items():
        if name not in listing.tensors and file not in broken:
            listing.problems.append(f"{file} does not hold {name}, which the index puts there")
            listing.lost.add(name)
    for name, tensor in listing.tensors.items():
        if weight_map.get(name) != tensor.path.name:
            listing.problems.append(f"{tensor.path.name} holds {name}, which the index does not put there")
    return listing


class _BrokenFile(Exception):
    """What is wrong with a file, worded to follow its name."""


def read_safetensors_header(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, checked against its size and against each other."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise _BrokenFile(f"is truncated or no safetensors file ({size} bytes)")
            if length > _MAX_HEADER:
                raise _BrokenFile(f"has a header of {length} bytes, more than safetensors allows")
            header = json.loads(file.read(length), object_pairs_hook=_table)
    except FileNotFoundError:
        raise _BrokenFile("is missing") from None
    except OSError as e:
        raise _BrokenFile(f"cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError):
        raise _BrokenFile("has a header that is not JSON") from None
    if not isinstance(header, dict):
        raise _BrokenFile("has a header that is not a table of tensors")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = []
    for name, entry in header.items():
        try:
            first, last = entry["data_offsets"]
            shape = tuple(entry["shape"])
            code = entry["dtype"]
            if not all(type(n) is int and n >= 0 for n in (*shape, first, last - first)):
                raise TypeError
        except (TypeError, KeyError, ValueError):
            raise _BrokenFile(f"has a malformed entry for {name}") from None
        dtype = DTYPES.get(code, OTHER)
        if dtype != OTHER and last - first != math.prod(shape) * dtype.itemsize:
            raise _BrokenFile(f"gives {name} {last - first} bytes, but {code} {list(shape)} needs another number")
        tensors.append((first, last, StoredTensor(name, dtype, shape, path, start + first)))
    tensors.sort(key=lambda t: t[:2])
    end = 0
    for first, last, tensor in tensors:
        if first < end:
            raise _BrokenFile(f"has overlapping tensors ({tensor.name})")
        end = last
    if start + end > size:
        raise _BrokenFile(f"is truncated: {size} bytes of {start + end}; copy it again")
    if start + end < size:
        raise _BrokenFile(f"has {size - start - end} bytes that belong to no tensor")
    return [tensor for _, _, tensor in tensors]


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise _BrokenFile(f"has two entries for {twice}")
    return table


def read_torch_header(path: Path) -> list[StoredTensor]:
    """The tensors of a file written by `torch.save`, found without loading them.

    Only plain tensors are accepted (`weights_only=True`); under fake tensors torch notes where in the file each
    storage lies instead of reading it (torch 2.7 and newer; its notes on serialization, "layout control").
    """
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError:
        raise UserError(f"{path}: reading PyTorch .bin files needs torch: pip install 'silkie-jax[torch]'") from None
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise _BrokenFile("is a compressed archive, not a file written by torch.save")
    except FileNotFoundError:
        raise _BrokenFile("is missing") from None
    except OSError as e:
        raise _BrokenFile(f"cannot be read ({e.strerror})") from None
    except zipfile.BadZipFile:
        raise _BrokenFile("is truncated, or older than torch 1.6 (then load and save it again)") from None
    try:
        with FakeTensorMode():
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds for a damaged or a hostile pickle; all mean the same to the user
        if "weights_only" in str(e) or "WeightsUnpickler" in str(e):
            raise _BrokenFile("holds more than plain tensors and is refused (weights_only)") from None
        raise _BrokenFile(
            f"cannot be read by torch ({str(e).splitlines()[0] if str(e) else type(e).__name__})"
        ) from None
    if not isinstance(contents, dict) or not all(isinstance(t, torch.Tensor) for t in contents.values()):
        raise _BrokenFile("is not a table of tensors")
    kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    size = path.stat().st_size
    tensors = []
    for name, tensor in contents.items():
        shape = tuple(tensor.shape)
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if offset is None:
            raise UserError(f"{path}: reading PyTorch .bin files needs torch 2.7 or newer: pip install -U torch")
        if not isinstance(name, str) or not tensor.is_contiguous():
            raise _BrokenFile(f"holds {name} in a form that is not contiguous; save it again with .contiguous()")
        offset += tensor.storage_offset() * tensor.element_size()
        if offset + tensor.nbytes > size:
            raise _BrokenFile(f"is truncated inside {name}")
        dtype = DTYPES.get(kinds.get(tensor.dtype, ""), OTHER)
        tensors.append(StoredTensor(name, dtype, shape, path, offset))
    return tensors


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """A safetensors file to be written: each tensor's type, shape and place are known before any data is."""

    file: str
    tensors: dict[str, tuple[np.dtype, tuple[int, ...]]]

    def header(self) -> bytes:
        """The file's first bytes: the table's length, the table, spaces up to a multiple of eight."""
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
        end = 0
        for name, (dtype, shape) in self.tensors.items():
            start, end = end, end + nbytes(dtype, shape)
            table[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write(self, folder: Path, pieces: Iterable[np.ndarray]) -> None:
        """Writes the file from its tensors' data, given in order and in pieces of any size."""
        with open(folder / self.file, "wb", buffering=0) as file:
            file.write(self.header())
            for piece in pieces:
                view = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())


def nbytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def plan_shards(
    tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]], limit: int, stem: str = "model"
) -> list[TensorFile]:
    """Distributes tensors over files of at most `limit` bytes each, in order, named as transformers names them."""
    groups: list[dict[str, tuple[np.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, dtype, shape in tensors:
        size = nbytes(dtype, shape)
        if groups[-1] and filled + size > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = (dtype, shape)
        filled += size
    if len(groups) == 1:
        return [TensorFile(f"{stem}.safetensors", groups[0])]
    count = len(groups)
    return [TensorFile(f"{stem}-{i:05}-of-{count:05}.safetensors", group) for i, group in enumerate(groups, 1)]


def index_of(shards: list[TensorFile]) -> dict[str, object]:
    """The contents of model.safetensors.index.json."""
    total = sum(nbytes(*kind) for shard in shards for kind in shard.tensors.values())
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
