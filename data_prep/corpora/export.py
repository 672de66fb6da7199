"""Pairs of a corpus in the forms that other trainers read, with the image files beside them."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from data_prep.tables.images import suffix
from silkie_jax.corpus import CorpusReader, Record
from silkie_jax.corpus import pairs as rules
from silkie_jax.errors import UserError

Form = Literal["trl", "llama-factory"]
_BATCH = 1000  # pairs that are written together


def export_pairs(
    corpus: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    form: Form = "trl",
    file_format: Literal["jsonl", "parquet"] = "jsonl",
    rule: rules.Rule | None = None,
    say: Callable[[str], object] = print,
) -> int:
    """Writes every pair that a rule makes of a corpus, and each image once, named by its SHA-256.

    trl's conversational preference form (`prompt`, `chosen`, `rejected` as messages, `images`), as its DPOTrainer takes
    it; or LLaMA-Factory's ranking form in ShareGPT style (`conversations`, `chosen`, `rejected`, `images`), with the
    `dataset_info.json` that it asks for. Images are paths below `dst` in JSON lines, and in parquet of trl's form the
    files themselves, as the `datasets` library stores them. Neither form has a place for pairs whose responses show
    different images: they are left out, and `say` is told how many.

    Args:
        corpus: the corpus folder.
        dst: the folder to make.
        form: "trl" or "llama-factory".
        file_format: "jsonl" or "parquet" (needs pyarrow).
        rule: see `silkie_jax.corpus.pairs`; also as YAML text. None: mean_rating, or given where there are no ratings.
        say: what is told, in a line, that pairs were left out.

    Returns:
        how many pairs there are.

    Raises:
        UserError: the rule is wrong or makes no pair that has a place, or `dst` is not empty.
    """
    reader = CorpusReader(corpus)
    rule = _parse_rule(rule) if rule is not None else ("mean_rating" if reader.aspects else "given")
    rules.check_rule(rule, reader.aspects)
    dst = Path(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{dst} is not an empty folder: choose a new one")
    work = dst.with_name(f"{dst.name}.tmp")  # what is unfinished does not look finished
    shutil.rmtree(work, ignore_errors=True)
    (work / "images").mkdir(parents=True)
    as_files = form == "trl" and file_format == "parquet"
    left_out: Counter[str] = Counter()
    rows = _rows(reader, rule, form, None if as_files else work / "images", left_out)
    file = work / f"pairs.{file_format}"
    count = _write_jsonl(file, rows) if file_format == "jsonl" else _write_parquet(file, rows, as_files)
    apart = left_out["images"]
    if apart and not count:
        shutil.rmtree(work)
        raise UserError(
            f"{corpus}: chosen and rejected show different images in all pairs, which form {form} cannot say"
        )
    if apart:
        say(f"{apart:,} pairs left out: chosen and rejected show different images, which form {form} cannot say")
    if not count:
        shutil.rmtree(work)
        raise UserError(f"pair rule {rule} makes no pair of {corpus}: choose another with --pair-rule")
    if form == "llama-factory":
        info = {"silkie": _DATASET_INFO | {"file_name": file.name}}
        (work / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    if as_files:
        (work / "images").rmdir()
    if dst.exists():
        dst.rmdir()
    os.replace(work, dst)
    return count


_DATASET_INFO = {
    "formatting": "sharegpt",
    "ranking": True,
    "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"},
}


def _parse_rule(rule: rules.Rule) -> rules.Rule:
    try:
        return yaml.safe_load(rule) if isinstance(rule, str) else rule
    except yaml.YAMLError:
        raise UserError(f"--pair-rule: {rule!r} is neither a name nor valid YAML") from None


def _rows(
    reader: CorpusReader, rule: rules.Rule, form: Form, folder: Path | None, left_out: Counter[str]
) -> Iterator[dict[str, Any]]:
    for record in reader:
        found = rules.pairs(record, rule)
        for number, (chosen, rejected) in enumerate(found):
            if record.view(chosen) != record.view(rejected):
                left_out["images"] += 1
                continue
            images = [_image(record.images[image], folder) for image in record.view(chosen)]
            texts = record.responses[chosen].text, record.responses[rejected].text
            row = (_trl if form == "trl" else _llama_factory)(record, len(images), *texts)
            yield {"id": f"{record.id}/{number}", **row, "images": images}


def _image(data: bytes, folder: Path | None) -> Any:
    name = hashlib.sha256(data).hexdigest() + suffix(data)
    if folder is None:
        return {"bytes": data, "path": name}
    path = folder / name[:2] / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return f"images/{name[:2]}/{name}"


def _trl(record: Record, images: int, chosen: str, rejected: str) -> dict[str, Any]:
    """Messages in parts; the images stand at the beginning of the first message of the user."""
    turns = [turn for user, assistant in record.history for turn in (("user", user), ("assistant", assistant))]
    prompt = [_message(role, words) for role, words in [*turns, ("user", record.prompt)]]
    prompt[0]["content"] = [{"type": "image"}] * images + prompt[0]["content"]
    return {
        "prompt": prompt,
        "chosen": [_message("assistant", chosen)],
        "rejected": [_message("assistant", rejected)],
    }


def _message(role: str, words: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": words}]}


def _llama_factory(record: Record, images: int, chosen: str, rejected: str) -> dict[str, Any]:
    """ShareGPT turns; `<image>` marks where each image stands. The same letters in a text would mark one, too."""
    turns = [turn for user, assistant in record.history for turn in (("human", user), ("gpt", assistant))]
    conversation = [{"from": who, "value": _without_marks(words)} for who, words in [*turns, ("human", record.prompt)]]
    conversation[0]["value"] = "<image>" * images + conversation[0]["value"]
    return {
        "conversations": conversation,
        "chosen": {"from": "gpt", "value": _without_marks(chosen)},
        "rejected": {"from": "gpt", "value": _without_marks(rejected)},
    }


def _without_marks(words: str) -> str:
    for mark in ("<image>", "<video>", "<audio>"):
        words = words.replace(mark, f"< {mark[1:]}")
    return words


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], as_files: bool) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("writing parquet needs pyarrow: pip install 'silkie-jax[data]'") from None
    count = 0
    writer = None
    try:
        for batch in _batches(rows, 100 if as_files else _BATCH):
            if writer is None:
                schema = _schema(pa, batch[0], as_files)
                writer = pq.ParquetWriter(path, schema)
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            count += len(batch)
    finally:
        if writer is not None:
            writer.close()
    return count


def _schema(pa: Any, row: dict[str, Any], as_files: bool) -> Any:
    """Named in full: an inferred one would depend on whether the first rows have images."""
    text = pa.string()
    turn = pa.struct([("from", text), ("value", text)])
    message = pa.struct([("role", text), ("content", pa.list_(pa.struct([("type", text), ("text", text)])))])
    image = pa.struct([("bytes", pa.binary()), ("path", text)]) if as_files else text
    types = {
        "id": text,
        "prompt": pa.list_(message),
        "conversations": pa.list_(turn),
        "images": pa.list_(image),
    }
    answer = pa.list_(message) if "prompt" in row else turn
    return pa.schema([(key, types.get(key, answer)) for key in row])


def _batches(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
