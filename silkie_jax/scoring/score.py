"""`silkie score`: the log-probability of every response of a corpus, as training sees it."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.corpus import CorpusReader, Record
from silkie_jax.errors import UserError
from silkie_jax.hardware.kernel import sound_kernel
from silkie_jax.hardware.mesh import make_mesh, sharding_of
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.preference.rows import Row, RowTooLong
from silkie_jax.scoring.fingerprints import adapter_fingerprint, weights_fingerprint
from silkie_jax.scoring.scorer import Scored, Scorer

About = dict[str, Any]
"""What a file of scores rests on: options, and fingerprints of corpus, tokenizer, weights and adapter."""


def score(
    model_path: str | Path,
    corpus_path: str | Path,
    out: Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "float32",
    quantize: str | None = None,
    batch_rows: int = 4,
    max_length: int = 2048,
) -> None:
    """Writes one JSON line a response, in corpus order: id, response (its index), logp (summed), tokens (labels).

    A record whose images leave no room for its responses has logp null and an `error`. What is done is kept in
    FILE.part; the same command continues there, wherever model, adapter and corpus lie by then.

    Raises:
      UserError: a folder or file is not sound, or FILE.part was begun with something else.
    """
    if batch_rows < 1:
        raise UserError(f"--batch-rows must be at least 1, not {batch_rows}")
    if max_length < 2:
        raise UserError(f"--max-length must be at least 2, not {max_length}")
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file to write")
    corpus, tokenizer = CorpusReader(corpus_path), Tokenizer.from_folder(model_path)
    paths = {"model": str(model_path), "adapter": str(adapter or "")}
    about: About = {"dtype": dtype, "max_length": max_length}
    about |= {"corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint}
    part = out.with_name(out.name + ".part")
    _check_same(part, about, paths)  # what is wrong is said before gigabytes are read
    mesh = make_mesh()
    where = partial(sharding_of, mesh)
    model = load_model(model_path, dtype=dtype, adapter=adapter, sharding_of=where, quantize=quantize)
    about |= {"weights": weights_fingerprint(model), "adapter": adapter_fingerprint(model)}
    _check_same(part, about, paths)
    done = _records_done(part)
    kernel = sound_kernel("auto", dtype, mesh)
    scorer = Scorer(model, tokenizer, mesh, batch_rows=batch_rows, max_length=max_length, kernel=kernel)
    cut = left_out = 0
    at_once = AT_ONCE * scorer.rows
    with (
        part.open("a", encoding="utf-8") as file,
        tqdm(total=len(corpus), initial=done, desc="score", unit="row") as bar,
    ):
        if not file.tell():
            file.write(json.dumps(about) + "\n")
        for first in range(done, len(corpus), at_once):
            records = corpus.batch(range(first, min(first + at_once, len(corpus))))
            for record, scored in zip(records, scorer(records), strict=True):
                cut += isinstance(scored.row, Row) and scored.row.truncated
                left_out += isinstance(scored.row, RowTooLong)
                lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(record, scored))
                file.write("".join(lines) + _END + "\n")
            file.flush()
            bar.update(len(records))
    _finish(part, out)
    if cut or left_out:
        print(f"max_length {max_length}: {cut} rows were cut and {left_out} left out")


AT_ONCE = 16  # batches whose rows are sorted by length together
_END = "{}"  # in FILE.part, the line after each record: what follows the last one was cut off


def _lines(record: Record, scored: Scored) -> Iterator[dict[str, Any]]:
    for i in range(len(record.responses)):
        if isinstance(scored.row, Row):
            tokens = int((scored.row.label_branches == i + 1).sum())
            yield {"id": record.id, "response": i, "logp": float(scored.logps[i]), "tokens": tokens}
        else:
            yield {"id": record.id, "response": i, "logp": None, "tokens": 0, "error": str(scored.row)}


def _check_same(part: Path, now: About, paths: dict[str, str]) -> None:
    """Refuses a FILE.part that was begun with something else, and says with what."""
    before = _begun(part)
    if before is None:
        return
    if "model" in before:  # by an earlier version, which knew model and adapter by their paths
        now = {name: now[name] for name in ("corpus", "dtype", "max_length")} | paths
    different = [_NAMES[name] for name, value in now.items() if before.get(name) != value]
    if different:
        raise UserError(f"{part} was begun with {' and '.join(different)}; remove it to score anew")


_NAMES = {
    "corpus": "another corpus",
    "tokenizer": "another tokenizer",
    "model": "another model",
    "weights": "other weights",
    "adapter": "another adapter",
    "dtype": "another --dtype",
    "max_length": "another --max-length",
}


def _begun(part: Path) -> About | None:
    """What FILE.part was begun with; None where there is none, or where it was cut off before it said so."""
    if not part.parent.is_dir():
        raise UserError(f"{part.parent}: no such folder to write {part.stem} in")
    if not part.exists():
        return None
    with part.open("r+b") as file:
        header = file.readline()
        if not header.endswith(b"\n"):
            file.truncate(0)
            return None
    try:
        return dict(json.loads(header))
    except (ValueError, TypeError):
        raise UserError(f"{part} was not begun by `silkie score`; remove it, or name another file") from None


def _records_done(part: Path) -> int:
    """How many records FILE.part holds whole; what follows them is cut off."""
    if not part.exists():
        return 0
    with part.open("r+b") as file:
        done, position = 0, len(file.readline())
        kept = position
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
