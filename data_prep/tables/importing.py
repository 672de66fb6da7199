"""The road every import takes: scan the rows, check the images, write the shards, sum up.

The input is read twice. The scan reads every row once, keeps its place and a hash, and lists what cannot be used. Then
the usable rows are cut into shards of equal length, and each shard is made on its own from those places: workers are
threads (decoding, hashing and writing release the interpreter's lock), memory stays flat, and a run killed at any
moment keeps its finished shards. The same input gives the same bytes, however often it was interrupted.
"""

import hashlib
import json
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from tqdm import tqdm

from data_prep.tables.archives import Images, images_of_rows
from data_prep.tables.fields import Scale
from data_prep.tables.images import check_image
from data_prep.tables.rejections import Rejected, Rejection, nothing_usable
from data_prep.tables.summary import Summary, counts_of, finish, pairs_by_rule, rejections_of
from data_prep.tables.table import Place, Table
from silkie_jax.corpus.reader import read_manifest
from silkie_jax.corpus.schema import Record, Response
from silkie_jax.corpus.shards import BUILDING, FORMAT, MANIFEST, CorpusBuilder, Entry
from silkie_jax.errors import UserError
from silkie_jax.image_limits import MAX_BYTES, MAX_PIXELS

VERSION = 1  # of the way rows become records; a resumed import keeps no shard that another version made
_ROWS_PER_SHARD = 1000


@dataclass
class Draft:
    """A row in the corpus's terms, before its images are looked up.

    Attributes:
        id: "" where the row has none.
        images: a path to look up among the image files, or the bytes themselves.
        image_id: where a path is absent or not found, an image file of this name with any suffix is meant.
        dropped: why responses were left out, one text each.
        off_scale: which ratings were left out because they are off the scale, one text each.
        (the rest): as in `Record`.
    """

    id: str
    prompt: str
    responses: list[Response]
    images: list[str | bytes]
    image_id: str = ""
    history: list[tuple[str, str]] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    off_scale: list[str] = field(default_factory=list)


Parser = Callable[[dict[str, Any]], Draft]
"""Turns a row's fields into a draft, or raises `Rejected`."""


class ImportOptions(TypedDict, total=False):
    """How rows of any kind are imported.

    Attributes:
        shards: number of files; about one for each 1,000 rows by default.
        workers: threads; as many as there are processors by default.
        progress: whether to show progress on stderr; true by default.
        max_pixels: limit on an image's width x height; `MAX_PIXELS` by default.
        max_image_bytes: limit on the size of an image file; `MAX_BYTES` by default.
    """

    shards: int | None
    workers: int | None
    progress: bool
    max_pixels: int
    max_image_bytes: int


class _Accepted(NamedTuple):
    """A usable row: where it lies, which it is, the id of its record, and a hash of all that the record will hold."""

    place: Place
    number: int
    line: int
    id: str
    digest: bytes


@dataclass
class _Plan:
    """What the scan found."""

    accepted: list[_Accepted] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    rows: int = 0
    renamed: Counter[str] = field(default_factory=Counter)


def run_import(
    source: str | os.PathLike[str],
    images: str | os.PathLike[str] | None,
    dst: str | os.PathLike[str],
    *,
    parse: Parser,
    name: str,
    identical_rows: Literal["leave out", "keep"],
    form: str = "",
    scale: Scale | None = None,
    shards: int | None = None,
    workers: int | None = None,
    progress: bool = True,
    max_pixels: int = MAX_PIXELS,
    max_image_bytes: int = MAX_BYTES,
) -> Summary:
    """Imports rows into a corpus; see the module for how, `import_vlfeedback` and `ImportOptions` for the rest.

    Args:
        parse: what makes a row a draft.
        name: of the data set, in file names and as the records' source.
        identical_rows: whether a row that repeats an earlier one with its id is listed as a duplicate, or kept. A row
            that has an earlier one's id but says something else is always kept. What is kept is renamed: `id#2`.
        form: what `parse` makes of rows, where it can do different things with the same ones.
        scale: lowest and highest rating, where rows have ratings.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers: {workers} is not at least 1")
    rows = Table(source)
    with closing(images_of_rows(rows.path, images, max_bytes=max_image_bytes)) as store:
        plan = _scan(rows, store, parse, identical_rows, progress)
        if not plan.accepted:
            raise nothing_usable(rows.path, plan.rejections)
        plan.rejections += [Rejection(0, f, 0, "file", "", "image refused", why) for f, why in store.refused.items()]
        settings = json.dumps([VERSION, FORMAT, name, max_pixels, max_image_bytes, *filter(None, [form])])
        key = _hash(settings, *(row.digest for row in plan.accepted), *(r.to_json() for r in plan.rejections))
        if (Path(dst) / MANIFEST).exists():
            return finished_before(Path(dst), key)
        count = math.ceil(len(plan.accepted) / _ROWS_PER_SHARD) if shards is None else shards
        with CorpusBuilder(dst, name, min(count, len(plan.accepted))) as builder:
            job = _Job(rows, store, parse, name, max_pixels, settings, builder, plan.accepted)
            entries = _run_all(job, workers or os.cpu_count() or 1, progress)
            return _finish(builder, rows, plan, entries, key, scale)


def _finish(
    builder: CorpusBuilder, rows: Table, plan: _Plan, entries: list[Entry], key: str, scale: Scale | None
) -> Summary:
    """Sums up the shards and completes the corpus."""
    rejections = sorted(plan.rejections + rejections_of(entries))
    if not any(entry.shard.records for entry in entries):
        raise nothing_usable(rows.path, rejections)
    aspects = list(dict.fromkeys(aspect for entry in entries for aspect in entry.notes["aspects"]))
    facts = {"aspects": aspects, "input": key, "scales": dict.fromkeys(aspects, scale)}
    return finish(builder, entries, rejections, facts, rows=plan.rows, renamed=plan.renamed)


def _scan(rows: Table, store: Images, parse: Parser, identical_rows: str, progress: bool) -> _Plan:
    """Reads every row once: which can be used, and why the others cannot."""
    plan = _Plan()
    seen: dict[str, dict[bytes, int]] = {}  # id -> content of the rows that came with it -> number of the row
    taken: set[str] = set()  # ids of records
    with tqdm(
        total=rows.size, unit="B", unit_scale=True, desc="reading rows", disable=not progress, mininterval=0.5
    ) as bar:
        for row in rows.scan():
            plan.rows += 1
            bar.update(row.size)
            row_id = id_of(row.value)
            try:
                if isinstance(row.value, Rejected):
                    raise row.value
                draft = parse(row.value)
                stamps = [ref if isinstance(ref, bytes) else f"{ref} {store.stamp(ref)}" for ref in _find(draft, store)]
                id = draft.id or f"row-{plan.rows}"
                before = seen.setdefault(id, {})
                if row.digest in before and identical_rows == "leave out":
                    raise Rejected("duplicate id, identical row", f"first seen in row {before[row.digest]}")
                if before:
                    same = "identical" if row.digest in before else "differing"
                    plan.renamed[f"duplicate id, {same} row"] += bool(draft.id)
                before.setdefault(row.digest, plan.rows)
                if id in taken:
                    id = next(name for n in range(2, plan.rows + 2) if (name := f"{id}#{n}") not in taken)
                taken.add(id)
            except Rejected as why:
                plan.rejections.append(_rejection(rows, row.place, plan.rows, row.line, row_id, why))
                continue
            digest = hashlib.sha256(_hash(row.digest, id, *stamps, *draft.off_scale).encode()).digest()
            plan.accepted.append(_Accepted(row.place, plan.rows, row.line, id, digest))
            for what, reason, details in (
                ("response", "response dropped", draft.dropped),
                ("rating", "rating off the scale", draft.off_scale),
            ):
                for detail in details:
                    left_out = Rejected(reason, detail)
                    plan.rejections.append(_rejection(rows, row.place, plan.rows, row.line, id, left_out, what))
    return plan


@dataclass(frozen=True)
class _Job:
    """All that making one shard needs."""

    rows: Table
    store: Images
    parse: Parser
    name: str
    max_pixels: int
    settings: str
    builder: CorpusBuilder
    accepted: list[_Accepted]
    stop: threading.Event = field(default_factory=threading.Event)

    def make(self, number: int, step: Callable[[int], None]) -> Entry:
        """Makes a shard, unless an earlier run did; `step` is told how many rows are done."""
        first, last = (len(self.accepted) * n // self.builder.shards for n in (number, number + 1))
        chunk = self.accepted[first:last]
        key = _hash(self.settings, *(row.digest for row in chunk))
        if entry := self.builder.finished(number, key):
            step(len(chunk))
            return entry
        notes: dict[str, Any] = {}
        return self.builder.write(number, key, self._records(chunk, notes, step), notes)

    def _records(self, chunk: list[_Accepted], notes: dict[str, Any], step: Callable[[int], None]) -> Iterator[Record]:
        """The records of a shard, one at a time; fills `notes` at the end."""
        counts: Counter[str] = Counter()
        pair_counts: Counter[str] = Counter()
        aspects: dict[str, None] = {}
        rejections: list[Rejection] = []
        values = self.rows.fetch(row.place for row in chunk)
        for row in chunk:
            if self.stop.is_set():
                raise _Stopped
            try:
                draft = self.parse(next(values))
            except (Rejected, StopIteration):
                raise UserError(f"{self.rows.path} changed while it was imported: run the import again") from None
            try:
                images = tuple(self._image(ref) for ref in _find(draft, self.store))
                _check_images(draft, images)
            except Rejected as why:
                rejections.append(_rejection(self.rows, row.place, row.number, row.line, row.id, why))
                continue
            finally:
                step(1)
            record = Record(
                id=row.id,
                images=images,
                prompt=draft.prompt,
                responses=tuple(draft.responses),
                history=tuple(draft.history),
                pairs=tuple(draft.pairs),
                source=self.name,
                extra=draft.extra,
            )
            counts.update(
                counts_of(record), dropped_responses=len(draft.dropped), ratings_off_scale=len(draft.off_scale)
            )
            aspects.update(dict.fromkeys(aspect for response in record.responses for aspect in response.ratings))
            for rule, found in pairs_by_rule(record).items():
                pair_counts[rule] += found
            yield record
        notes.update(counts=dict(counts), pairs=dict(pair_counts), aspects=list(aspects))
        notes.update(rejections=[asdict(rejection) for rejection in rejections])

    def _image(self, ref: str | bytes) -> bytes:
        return check_image(ref if isinstance(ref, bytes) else self.store.read(ref), max_pixels=self.max_pixels)


class _Stopped(Exception):
    """Ends a worker after another one failed or the user interrupted."""


def _run_all(job: _Job, workers: int, progress: bool) -> list[Entry]:
    shards = job.builder.shards
    lock = threading.Lock()
    with (
        tqdm(total=len(job.accepted), unit="row", desc="writing shards", disable=not progress, mininterval=0.5) as bar,
        ThreadPoolExecutor(min(workers, shards)) as pool,
    ):

        def step(rows: int) -> None:
            with lock:
                bar.update(rows)

        futures = [pool.submit(job.make, number, step) for number in range(shards)]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # also KeyboardInterrupt: let the workers end at their next row
            job.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


def finished_before(dst: Path, key: str) -> Summary:
    """The saved summary, where the corpus was made from this very input."""
    if read_manifest(dst).get("input") != key:
        raise UserError(
            f"{dst} already holds a finished corpus made from other input: choose another folder or remove it"
        )
    shutil.rmtree(dst / BUILDING, ignore_errors=True)  # a run killed right after the manifest leaves it behind
    return Summary.from_json((dst / "summary.json").read_text(encoding="utf-8"))


def _find(draft: Draft, store: Images) -> list[str | bytes]:
    """The images of a draft: names among the image files, or bytes."""
    if not draft.images and store.has(draft.image_id):
        return [store.find("", draft.image_id)]
    return [ref if isinstance(ref, bytes) else store.find(ref, draft.image_id) for ref in draft.images]


def _check_images(draft: Draft, images: tuple[bytes, ...]) -> None:
    """Refuses a pair whose images, under different names, are the same, and its texts, too.

    Raises:
        Rejected: as the parser does where the names are the same already.
    """
    seen = [(response.text, response.images and [images[n] for n in response.images]) for response in draft.responses]
    if any(seen[chosen] == seen[rejected] for chosen, rejected in draft.pairs):
        raise Rejected("chosen and rejected are the same", "images, too")


def id_of(row: Any) -> str:
    """A row's id as far as it can be read, for the list of rejections."""
    id = row.get("id") if isinstance(row, Mapping) else None
    return str(id)[:300] if isinstance(id, str | int) else ""


def _rejection(
    rows: Table, place: Place, number: int, line: int, id: str, why: Rejected, what: str = "row"
) -> Rejection:
    return Rejection(number, rows.files[place.file].name, line, what, id, why.reason, why.detail)


def _hash(*parts: str | bytes) -> str:
    """A hash of texts and bytes that does not confuse ("a", "bc") with ("ab", "c")."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()
