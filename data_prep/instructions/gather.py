"""Instructions for a run: read from their sources, images checked and stored once, duplicates found, a sample drawn.

Rows are taken in the order of the input or, where a source has a quota, in a seeded order until the quota is full, so
that only images are decoded that may be used. An instruction repeats another if both the images look alike and the
prompts read alike: many prompts about one image, and one prompt for many images, are what such sets are made of.
"""

import hashlib
import heapq
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.instructions.config import InstructionsConfig, SourceConfig
from data_prep.instructions.dedupe import Looks, look, normal_prompt
from data_prep.instructions.files import is_table, open_rows, write_image_rows
from data_prep.instructions.forms import Asked, read_row
from data_prep.run import Instruction, Run
from data_prep.tables.archives import Images, images_of_rows
from data_prep.tables.images import check_image, upright
from data_prep.tables.importing import id_of
from data_prep.tables.rejections import Rejected, Rejection
from data_prep.tables.table import Place, Table
from silkie_jax.corpus.shards import write_file
from silkie_jax.endpoints.store import to_json
from silkie_jax.errors import UserError

_TOGETHER = 256  # rows whose images are checked at a time
_SPOOL = "instructions.tmp"  # what is being gathered; a folder in the run


@dataclass(frozen=True)
class Report:
    """What became of the rows, by source; also saved as `instructions.json` of the run."""

    instructions: int
    sources: dict[str, dict[str, int]]

    def table(self) -> str:
        columns = list(dict.fromkeys(key for counts in self.sources.values() for key in counts))
        width = max([6, *map(len, self.sources)])
        rows = [f"{'source':<{width}}  " + "  ".join(columns)]
        for name, counts in self.sources.items():
            rows.append(f"{name:<{width}}  " + "  ".join(f"{counts.get(key, 0):>{len(key)},}" for key in columns))
        return "\n".join([*rows, f"{self.instructions:,} instructions in the run"])


def gather_instructions(
    config: InstructionsConfig,
    run: str | os.PathLike[str],
    *,
    workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Fills a run with instructions. The same call again leaves them as they are; one cut off is simply run again.

    Args:
        config: see `InstructionsConfig`.
        run: the run folder to make.
        workers: threads that check images; as many as there are processors by default.
        progress: whether to show progress on stderr.

    Raises:
        UserError: a source is missing or of another kind, nothing can be used, or the run has other instructions.
    """
    settings = asdict(config) | {"files": {name: _files(source) for name, source in config.sources.items()}}
    with Run.create(run) as opened:
        saved = opened.path / "instructions.json"
        if opened.settings("instructions") == json.loads(to_json(settings)) and saved.exists():
            return Report(**json.loads(saved.read_text(encoding="utf-8")))
        work = opened.path / _SPOOL
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            gathering = _Gathering(config, opened, work, workers or os.cpu_count() or 1, progress)
            report = gathering.gather()
            opened.write_instructions(gathering.chosen(), settings)
            shutil.move(work / "rejected.jsonl", opened.path / "instructions_rejected.jsonl")
            write_file(saved, [json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n"], temporary_in=work)
            return report
        finally:
            shutil.rmtree(work, ignore_errors=True)


@dataclass(frozen=True)
class _Ready:
    """An instruction whose images are checked: their bytes, hashes and looks."""

    asked: Asked
    images: list[bytes]
    looks: list[tuple[int, Any]]


@dataclass(frozen=True)
class _Refused:
    """What cannot be an instruction: its id where it has one, and why."""

    id: str
    why: Rejected


class _Gathering:
    """One pass over all sources; what is accepted is spooled to disk, so that memory stays flat."""

    def __init__(self, config: InstructionsConfig, run: Run, work: Path, workers: int, progress: bool):
        self.config, self.run, self.work, self.workers, self.progress = config, run, work, workers, progress
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in config.sources}
        self._looks = Looks()
        self._exact: dict[bytes, int] = {}  # SHA-256 of an image -> its number among looks
        self._seen: dict[bytes, str] = {}  # hash of an instruction's content -> id of the first that has it
        self._ids: set[str] = set()
        self._ranks: list[bytes] = []

    def gather(self) -> Report:
        """Spools all that is accepted."""
        with (
            open(self.work / "accepted.jsonl", "w", encoding="utf-8") as self._accepted,
            open(self.work / "rejected.jsonl", "w", encoding="utf-8") as self._rejected,
        ):
            for name, source in self.config.sources.items():
                self._gather_source(name, source)
        if not self._ranks:
            first = (self.work / "rejected.jsonl").read_text(encoding="utf-8").partition("\n")[0]
            paths = ", ".join(source.path for source in self.config.sources.values())
            why = f"; the first row: {first}" if first else f": {paths} holds no rows"
            raise UserError(f"no instruction can be used{why}")
        sources = {name: dict(counts) for name, counts in self.counts.items()}
        sample = self.config.sample
        return Report(len(self._ranks) if sample is None else min(sample, len(self._ranks)), sources)

    def chosen(self) -> Iterator[Instruction]:
        """The instructions of the run: all that were accepted, or a sample of them, in order."""
        sample = self.config.sample
        wanted = None if sample is None else set(heapq.nsmallest(sample, self._ranks))
        with open(self.work / "accepted.jsonl", encoding="utf-8") as lines:
            for rank, line in zip(self._ranks, lines, strict=True):
                if wanted is None or rank in wanted:
                    fields = json.loads(line)
                    history = tuple((user, assistant) for user, assistant in fields.pop("history"))
                    yield Instruction(**fields | {"history": history, "images": tuple(fields["images"])})

    def _gather_source(self, name: str, source: SourceConfig) -> None:
        path, work = Path(source.path), self.work / "source"
        work.mkdir()
        if is_table(path):
            rows = open_rows(path, work)
            images = images_of_rows(path, source.images, max_bytes=self.config.max_image_bytes)
        else:
            rows, images = write_image_rows(
                path, source.prompts, lambda key, count: _rank(self.config.seed, name, key)[0] % count, work,
                self.config.max_image_bytes,
            )  # fmt: skip
        for file, why in images.refused.items():
            self._reject(name, Rejection(0, file, 0, "file", "", "image refused", why))
        with closing(images), ThreadPoolExecutor(self.workers) as pool:
            places = []
            for number, row in enumerate(rows.scan(), 1):
                places.append((row.place, number, row.line))
            self.counts[name]["rows"] = len(places)
            quota = source.quota
            if quota is not None:
                places.sort(key=lambda item: _rank(self.config.seed, name, str(item[1])))
            with tqdm(
                total=min(len(places), quota or len(places)), unit="row", desc=name, disable=not self.progress,
                mininterval=0.5,
            ) as bar:  # fmt: skip
                while places and (quota is None or self.counts[name]["accepted"] < quota):
                    room = _TOGETHER if quota is None else min(_TOGETHER, quota - self.counts[name]["accepted"])
                    chunk, places = sorted(places[:room]), places[room:]
                    before = self.counts[name]["accepted"]
                    with self.run.transaction():
                        self._take(name, source, rows, images, chunk, pool)
                    bar.update(len(chunk) if quota is None else self.counts[name]["accepted"] - before)
        shutil.rmtree(work)

    def _take(
        self, name: str, source: SourceConfig, rows: Table, images: Images, chunk: list[tuple[Place, int, int]],
        pool: ThreadPoolExecutor,
    ) -> None:  # fmt: skip
        """Rows whose images are checked side by side, and which are accepted or not one after another."""
        images_alone = not is_table(Path(source.path))
        values = rows.fetch_all([place for place, _, _ in chunk])

        def ready(value: Any) -> list[_Ready | _Refused]:
            if isinstance(value, Rejected):
                return [_Refused("", value)]
            try:
                return [self._check(asked, images) for asked in read_row(value, source.turns)]
            except Rejected as why:
                return [_Refused(id_of(value), why)]

        for (place, number, line), value, results in zip(chunk, values, pool.map(ready, values), strict=True):
            file = rows.titles[place.file]
            if images_alone and not isinstance(value, Rejected):
                file, line = value["image"], 0
            for result in results:
                try:
                    if isinstance(result, _Refused):
                        raise result.why
                    if source.quota is None or self.counts[name]["accepted"] < source.quota:
                        self._accept(name, source, number, result)
                except Rejected as why:
                    id = result.id if isinstance(result, _Refused) else result.asked.id
                    id = f"{name}-{id or number}"
                    self._reject(name, Rejection(number, file, line, "row", id, why.reason, why.detail))

    def _reject(self, name: str, what: Rejection) -> None:
        self.counts[name][what.reason] += 1
        self._rejected.write(what.to_json() + "\n")

    def _check(self, asked: Asked, images: Images) -> _Ready | _Refused:
        try:
            files = []
            for ref in _find(asked, images):
                data = ref if isinstance(ref, bytes) else images.read(ref)
                if len(data) > self.config.max_image_bytes:
                    raise Rejected("image too large", f"more than {self.config.max_image_bytes} bytes")
                files.append(upright(check_image(data, max_pixels=self.config.max_pixels)))
            return _Ready(asked, files, [look(data) for data in files])
        except Rejected as why:
            return _Refused(asked.id, why)

    def _accept(self, name: str, source: SourceConfig, number: int, ready: _Ready) -> None:
        """Spools an instruction and stores its images, unless it repeats an earlier one."""
        asked = ready.asked
        hashes = [hashlib.sha256(data).digest() for data in ready.images]
        exact = [sha256 in self._exact for sha256 in hashes]
        for sha256, found in zip(hashes, ready.looks, strict=True):
            if sha256 not in self._exact:
                self._exact[sha256], like_another = self._looks.number(*found)
                self.counts[name]["images like another"] += like_another
        text = [normal_prompt(asked.prompt), [self._exact[h] for h in hashes], asked.history]
        key = hashlib.sha256(to_json(text).encode()).digest()
        id = self._new_id(f"{name}-{asked.id or number}")
        first = self._seen.setdefault(key, id)
        if first != id:
            reason = "duplicate" if all(exact) else "near duplicate"
            if self.config.duplicates == "drop":
                raise Rejected(reason, f"of {first}")
            self._reject(name, Rejection(number, "", 0, "row", id, reason, f"of {first} (kept)"))
        self._ids.add(id)
        instruction = Instruction(
            id=id,
            prompt=asked.prompt,
            images=tuple(self.run.add_image(data) for data in ready.images),
            history=tuple(asked.history),
            source=name,
            licence=asked.licence or source.licence,
            extra=asked.extra,
        )
        fields = asdict(instruction)
        del fields["number"]
        self._accepted.write(to_json(fields) + "\n")
        self._ranks.append(_rank(self.config.seed, "sample", id))
        self.counts[name]["accepted"] += 1

    def _new_id(self, id: str) -> str:
        """`id`, or `id#2`, `id#3` where it is taken."""
        if id not in self._ids:
            return id
        return next(name for n in range(2, len(self._ids) + 3) if (name := f"{id}#{n}") not in self._ids)


def _find(asked: Asked, images: Images) -> list[str | bytes]:
    """The images of an instruction: names among the image files, or bytes. COCO's numbers may lack their zeros."""
    ids = [asked.image_id, f"{asked.image_id:0>12}"] if asked.image_id else [""]
    id = next((id for id in ids if images.has(id)), ids[0])
    if asked.images:
        return [ref if isinstance(ref, bytes) else images.find(ref, id) for ref in asked.images]
    if asked.image_id or images.has(asked.id):
        return [images.find("", id or asked.id)]
    return []


def _rank(seed: int, *parts: str) -> bytes:
    """A number drawn for something by its name: the same whatever else there is."""
    return hashlib.sha256(json.dumps([seed, *parts]).encode()).digest()


def _files(source: SourceConfig) -> list[list[Any]]:
    """Names and sizes of a source's files, by which a rerun sees whether it is the same."""
    found = []
    for path in filter(None, (source.path, source.images)):
        file = Path(path)
        files = sorted(file.iterdir()) if file.is_dir() else [file]
        found += [[path.name, path.stat().st_size] for path in islice(files, 100_000) if path.is_file()]
    return found
