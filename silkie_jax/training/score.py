"""`silkie score`: the log-probability of every response of a corpus, as training sees it."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from silkie_jax.corpus import CorpusReader, Record
from silkie_jax.errors import UserError
from silkie_jax.loading import load
from silkie_jax.preference.batches import collate, decode_images
from silkie_jax.preference.rows import Row, RowTooLong, make_row
from silkie_jax.qwen_vl.tokenizer import Tokenizer
from silkie_jax.training.step import block_wrapper, branch_count, response_logps


def score(
    model_path: str | Path,
    corpus_path: str | Path,
    out: Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "float32",
    batch_rows: int = 4,
    max_length: int = 2048,
) -> None:
    """Writes one JSON line a response, in corpus order: id, response (its index), logp (summed), tokens (labels).

    A record whose images leave no room for its responses has logp null and an `error`. What is done is kept in
    FILE.part; the same command continues there.

    Raises:
      UserError: a folder or file is not sound, or FILE.part belongs to another scoring.
    """
    if batch_rows < 1:
        raise UserError(f"--batch-rows must be at least 1, not {batch_rows}")
    corpus = CorpusReader(corpus_path)
    about = {"model": str(model_path), "adapter": str(adapter or ""), "corpus": corpus.fingerprint}
    about |= {"dtype": dtype, "max_length": max_length}
    part = out.with_name(out.name + ".part")
    done = _records_done(part, about)
    model, tokenizer = load(model_path, dtype=dtype, adapter=adapter)
    forward = make_forward(model)
    cut = left_out = 0
    with (
        part.open("a", encoding="utf-8") as file,
        tqdm(total=len(corpus), initial=done, desc="score", unit="row") as bar,
    ):
        if not file.tell():
            file.write(json.dumps(about) + "\n")
        for first in range(done, len(corpus), batch_rows):
            records = corpus.batch(range(first, min(first + batch_rows, len(corpus))))
            rows = [_row(tokenizer, record, max_length) for record in records]
            logps = _logps(forward, [r if isinstance(r, Row) else None for r in rows], model, batch_rows)
            for record, row, values in zip(records, rows, logps, strict=True):
                lines = list(_lines(record, row, values))
                cut += isinstance(row, Row) and row.truncated
                left_out += isinstance(row, RowTooLong)
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines) + _END + "\n")
            file.flush()
            bar.update(len(records))
    _finish(part, out)
    if cut or left_out:
        print(f"max_length {max_length}: {cut} rows were cut and {left_out} left out")


_END = "{}"  # in FILE.part, the line after each record: what follows the last one was cut off


def make_forward(model: nnx.Module) -> Any:
    """Compiled: (arrays [B, ...], branches) -> log-probabilities [B, K]."""
    graph, state = nnx.split(model)

    @partial(jax.jit, static_argnames="branches")
    def forward(state: nnx.State, batch: dict[str, jax.Array], branches: int) -> jax.Array:
        policy = nnx.merge(graph, state)
        wrap = block_wrapper("none", None)
        features = policy.encode_images(batch["images"]) if "images" in batch else None
        return response_logps(policy, batch, features, branches=branches, adapter=True, wrap=wrap)

    return partial(forward, state)


def _row(tokenizer: Tokenizer, record: Record, max_length: int) -> Row | RowTooLong | None:
    if not record.responses:
        return None
    try:
        return make_row(tokenizer, record, responses=range(len(record.responses)), max_length=max_length)
    except RowTooLong as e:
        return e


def _logps(forward: Any, rows: list[Row | None], model: Any, batch_rows: int) -> np.ndarray:
    padded = rows + [None] * (batch_rows - len(rows))
    arrays = collate(padded, model.config.end_of_text)
    arrays |= decode_images(padded, model.config.visual.image_size)
    most = branch_count(int(arrays["label_branches"].max()))
    return np.asarray(forward(arrays, branches=most))[: len(rows)]


def _lines(record: Record, row: Row | RowTooLong | None, values: np.ndarray) -> Iterator[dict[str, Any]]:
    for i in range(len(record.responses)):
        if isinstance(row, Row):
            tokens = int((row.label_branches == i + 1).sum())
            yield {"id": record.id, "response": i, "logp": float(values[i]), "tokens": tokens}
        else:
            yield {"id": record.id, "response": i, "logp": None, "tokens": 0, "error": str(row)}


def _records_done(part: Path, about: dict[str, Any]) -> int:
    """How many records FILE.part holds whole; what follows them is cut off."""
    if not part.parent.is_dir():
        raise UserError(f"{part.parent}: no such folder to write {part.stem} in")
    if not part.exists():
        return 0
    with part.open("r+b") as file:
        header = file.readline()
        if not header.endswith(b"\n"):
            file.truncate(0)
            return 0
        if json.loads(header) != about:
            raise UserError(f"{part} is of another model, corpus or option; remove it to score anew")
        done, position, kept = 0, len(header), len(header)
        for line in file:
            position += len(line)
            if line == f"{_END}\n".encode():
                done, kept = done + 1, position
        file.truncate(kept)
    return done


def _finish(part: Path, out: Path) -> None:
    """FILE.part without what only resuming needs becomes FILE, at once."""
    done = out.with_name(out.name + ".tmp")
    with part.open(encoding="utf-8") as source, done.open("w", encoding="utf-8") as target:
        next(source)
        target.writelines(line for line in source if line != _END + "\n")
    os.replace(done, out)
    part.unlink()
