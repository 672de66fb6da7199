"""`silkie convert`: an official checkpoint becomes a converted folder, tensor by tensor."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from silkie_jax.checkpoints.folders import TRAVELS, check_room, copy_side_files, new_folder
from silkie_jax.checkpoints.sources import (
    STORED_DTYPES,
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


def convert(src: str | Path, dst: str | Path, dtype: str | None = None, progress: bool = True) -> None:
    """Converts a checkpoint to a folder that `silkie_jax.load`, training and evaluation read.

    Memory stays within a few pieces of 32 MiB, whatever the size of the model. Interrupted, it leaves nothing at `dst`;
    run it again.

    Args:
      src: a Hugging Face folder (safetensors, or `.bin` with the torch extra), or the name of a model on the hub.
      dst: the folder to make.
      dtype: "float32" or "bfloat16" (rounding to nearest even); None keeps the stored type.
      progress: whether to show a progress bar on stderr.

    Raises:
      UserError: `src` is not a sound checkpoint (everything wrong with it in one line), `dst` exists, or the disk
        is too small.
    """
    target = dtype and parse_dtype(dtype)
    source = open_source(resolve(src))
    dtypes = {path: target or stored for path, stored in source.dtypes.items()}
    sizes = {path: nbytes(dtypes[path], leaf.shape) for path, leaf in source.tree.items()}
    with new_folder(dst) as folder:
        check_room(folder, sum(sizes.values()))
        copy_side_files(source.folder, folder)
        write = lay_out(folder, source.tree, dtypes)
        tasks = _tasks(source, dtypes, write)
        with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="convert", disable=not progress) as bar:
            for done in read_ahead(tasks):
                bar.update(done)
        write_marker(folder, dtypes.values())


def _tasks(
    source: Source, dtypes: dict[str, np.dtype], write: Callable[[Piece, np.ndarray], None]
) -> Iterator[Callable[[], int]]:
    def move(piece: Piece, dtype: np.dtype) -> int:
        values = source.read(piece).astype(dtype, copy=False)
        write(piece, values)
        return values.nbytes

    for path, leaf in source.tree.items():
        for piece in pieces(leaf, dtypes[path]):
            yield partial(move, piece, dtypes[path])


def parse_dtype(name: str) -> np.dtype:
    """The type of that name, if weights may be of it."""
    if name not in STORED_DTYPES:
        raise UserError(f"dtype: {name!r} is not one of {', '.join(STORED_DTYPES)}")
    return STORED_DTYPES[name]


def resolve(src: str | Path) -> Path:
    """The folder that `src` names: itself, or the hub's model of that name, downloaded to the hub client's cache."""
    if os.path.isdir(src):
        return Path(src)
    name = str(src)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise UserError(f"{src}: no such folder (and not a hub name such as Qwen/Qwen-VL-Chat)")
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        raise UserError(f"{src}: no such folder; to fetch it from the hub, pip install transformers") from None
    try:
        files = [file.rfilename for file in HfApi().model_info(name, timeout=20).siblings or ()]
        weights = "*.safetensors" if any(f.endswith(".safetensors") for f in files) else "pytorch_model*.bin"
        return Path(snapshot_download(name, allow_patterns=[*TRAVELS, weights]))
    except Exception as offline:  # the client raises its own, its HTTP library's and the operating system's errors
        try:
            return Path(snapshot_download(name, allow_patterns=[*TRAVELS], local_files_only=True))
        except Exception:
            reason = str(offline).splitlines()[0] if str(offline) else type(offline).__name__
            raise UserError(f"{src}: no such folder, and the hub does not give it ({reason})") from None
