"""`silkie export`: a checkpoint becomes a folder that PyTorch users load, with an adapter merged into it if asked."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from silkie_jax.checkpoints.convert import parse_dtype, resolve
from silkie_jax.checkpoints.folders import check_room, copy_side_files, new_folder
from silkie_jax.checkpoints.peft import Adapter, open_adapter
from silkie_jax.checkpoints.sources import Piece, Source, layer_pieces, main_dtype, open_source, read_ahead
from silkie_jax.checkpoints.tensor_files import SAFETENSORS_INDEX, index_of, nbytes, plan_shards
from silkie_jax.models.qwen_vl.names import official_tensors

CARD = "README.md"
SHARD_BYTES = 5 * 10**9  # the size at which transformers begins another file


def export(
    src: str | Path | Source,
    dst: str | Path,
    adapter: str | Path | Sequence[str | Path] | None = None,
    dtype: str | None = None,
    progress: bool = True,
    *,
    shard_bytes: int = SHARD_BYTES,
    card: str | None = None,
) -> None:
    """Writes a checkpoint in the official form, tensor by tensor, an adapter merged into it if one is given.

    Merging is W + scale B A in float32, summed over the adapters, then cast once. Memory stays within a few pieces of
    32 MiB. Interrupted, it leaves nothing at `dst`.

    Args:
      src: a converted folder, the `model/` of a training run, or a Hugging Face folder; or what gives weights as such
        a folder does.
      dst: the folder to make.
      adapter: a PEFT folder, such as the `adapter/` of a training run, or several.
      dtype: "float32" or "bfloat16"; None keeps the stored type.
      progress: whether to show a progress bar on stderr.
      shard_bytes: the most bytes of tensors in one file.
      card: text of CARD, the model card; None: none is written.

    Raises:
      UserError: `src` or `adapter` is not sound, `dst` exists, or the disk is too small.
    """
    target = dtype and parse_dtype(dtype)
    source = open_source(resolve(src)) if isinstance(src, str | Path) else src
    folders = [] if adapter is None else [adapter] if isinstance(adapter, str | Path) else list(adapter)
    merged = [open_adapter(folder, source.tree) for folder in folders]
    dtypes = {path: target or stored for path, stored in source.dtypes.items()}
    plan = plan_shards(
        ((name, dtypes[leaf.path], leaf.official) for name, leaf, _ in official_tensors(source.tree)), shard_bytes
    )
    places = {name: (leaf, layer) for name, leaf, layer in official_tensors(source.tree)}
    total = sum(nbytes(dtypes[path], leaf.shape) for path, leaf in source.tree.items())
    with new_folder(dst) as folder:
        check_room(folder, total)
        copy_side_files(source.folder, folder)
        _write_json(folder / "config.json", _config_fields(source, main_dtype(dtypes.values())))
        with tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=not progress) as bar:
            for shard in plan:
                tasks = _tasks(source, [places[name] for name in shard.tensors], dtypes, merged)
                shard.write(folder, _counted(read_ahead(tasks), bar))
        if len(plan) > 1:
            _write_json(folder / SAFETENSORS_INDEX, index_of(plan))
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")


def _tasks(
    source: Source, tensors: list[tuple[Any, int]], dtypes: dict[str, np.dtype], adapters: Sequence[Adapter]
) -> Iterator[Callable[[], np.ndarray]]:
    def take(piece: Piece, dtype: np.dtype) -> np.ndarray:
        values = source.read(piece)
        for adapter in adapters:
            if piece.leaf.adaptable and piece.leaf.target in adapter.targets:
                values = values.astype(np.float32, copy=False) + adapter.delta(piece)
        return values.astype(dtype, copy=False)

    for leaf, layer in tensors:
        for piece in layer_pieces(leaf, layer, source.dtypes[leaf.path]):
            yield partial(take, piece, dtypes[leaf.path])


def _counted(pieces: Iterator[np.ndarray], bar: tqdm) -> Iterator[np.ndarray]:
    for piece in pieces:
        yield piece
        bar.update(piece.nbytes)


def _config_fields(source: Source, dtype: str) -> dict[str, Any]:
    """config.json with the type that is written. The official code casts to whichever of bf16, fp16, fp32 is true."""
    fields = source.config.to_dict() | {"torch_dtype": dtype}
    flags = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    if any(fields.get(flag) for flag in flags):
        fields |= {flag: name == dtype for flag, name in flags.items()}
    return fields


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n")
