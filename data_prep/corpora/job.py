"""One shard of a corpus from a run's replies: what every worker does, wherever it is."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from data_prep.corpora.synthesized import samples, syntheses_of
from data_prep.judging.aggregate import judgements_of, to_record
from data_prep.judging.kinds import in_scope, reading
from data_prep.run import Gathered, Instruction, Run
from data_prep.synthesize import Teacher
from data_prep.tables.rejections import Rejection
from data_prep.tables.summary import counts_of, pairs_by_rule
from silkie_jax.corpus.schema import Record
from silkie_jax.corpus.shards import FORMAT, CorpusBuilder, Entry
from silkie_jax.yaml_files import make

VERSION = 2  # of the way replies become records; a resumed build keeps no shard that another version made


@dataclass(frozen=True)
class BuildJob:
    """All that making one shard needs; can be sent to another process.

    Attributes:
        run, dst: folders.
        name: of the data set.
        shards: how many.
        total: instructions of the run.
        judges: judge -> what its ratings depend on (`kinds.kept_of`); replies of other judges do not count.
        teacher: what the run keeps of its teacher, if it has one.
        excluded: numbers of instructions that belong to another corpus.
        snapshot: of the run's database, where it cannot be read itself: by other hosts (see `RunStore.snapshot`).
    """

    run: str
    dst: str
    name: str
    shards: int
    total: int
    judges: dict[str, dict[str, Any]]
    excluded: frozenset[int] = frozenset()
    snapshot: str | None = None
    teacher: dict[str, Any] | None = None

    @property
    def settings(self) -> str:
        taught = [{key: self.teacher[key] for key in ("name", "form", "captions", "seed")}] if self.teacher else []
        return json.dumps([VERSION, FORMAT, self.name, self.judges, *taught])

    def make(self, number: int) -> Entry:
        """Makes a shard, unless an earlier run did."""
        builder = CorpusBuilder(self.dst, self.name, self.shards)
        with Run.open(self.run, snapshot=self.snapshot) as run:
            if builder.has_entry(number) and (entry := builder.finished(number, self.key(run, number))):
                return entry
            notes: dict[str, Any] = {}
            digest = self._digest()  # grows with the records: a second pass over the run would cost a tenth of the time
            return builder.write(number, digest.hexdigest, self._records(run, number, digest, notes), notes)

    def key(self, run: Run, number: int) -> str:
        """A hash of all that a shard is made from."""
        digest = self._digest()
        for gathered in self._gathered(run, *self._range(number)):
            digest.update(_content(gathered))
        return digest.hexdigest()

    def _digest(self) -> Any:
        return hashlib.sha256(self.settings.encode())

    def _range(self, number: int) -> tuple[int, int]:
        """First and last instruction of a shard."""
        return self.total * number // self.shards + 1, self.total * (number + 1) // self.shards

    def _gathered(self, run: Run, first: int, last: int) -> Iterator[Gathered]:
        asked = {name for judge, kept in self.judges.items() for name in reading(judge, kept).asked}
        for gathered in run.gathered(first, last):
            if gathered.instruction.number not in self.excluded:
                replies = tuple(reply for reply in gathered.replies if reply.judge in asked)
                yield replace(gathered, replies=replies)

    def _records(self, run: Run, number: int, digest: Any, notes: dict[str, Any]) -> Iterator[Record]:
        """The records of a shard, one at a time; feeds `digest` as `key` does, and fills `notes` at the end."""
        judges = {judge: reading(judge, kept) for judge, kept in self.judges.items()}
        counts: Counter[str] = Counter()
        pair_counts: Counter[str] = Counter()
        kinds: dict[str, Counter[str]] = {judge: Counter() for judge in judges}
        rejections: list[dict[str, Any]] = []
        teacher = make(self.teacher, Teacher, "the run's teacher") if self.teacher else None
        for gathered in self._gathered(run, *self._range(number)):
            digest.update(_content(gathered))
            instruction = gathered.instruction
            if teacher and gathered.syntheses:
                images = [run.image(image) for image in instruction.images]
                for synthesis in syntheses_of(gathered, teacher):
                    if synthesis.kind != "complete":
                        counts["rows"] += 1
                        why = f"{teacher.name} ({synthesis.kind}): {synthesis.note}"
                        rejections.append(_rejection(instruction, "row", "reply not complete", why))
                        continue
                    for record in samples(gathered, teacher, synthesis, images):
                        counts["rows"] += 1
                        counts.update(counts_of(record))
                        pair_counts.update(pairs_by_rule(record))
                        yield _Record(**vars(record), image_hashes=instruction.images)
                if not gathered.responses:
                    continue
            counts["rows"] += 1
            if not gathered.responses:
                rejections.append(_rejection(instruction, "row", "no usable response", "no model gave one"))
                continue
            mine = {judge: one for judge, one in judges.items() if in_scope(self.judges[judge], instruction)}
            judgements = judgements_of(gathered, mine)
            record = to_record(gathered, mine, judgements, [run.image(image) for image in instruction.images])
            for judgement in judgements:
                kinds[judgement.judge][judgement.kind] += 1
                if judgement.kind != "complete":
                    why = f"{judgement.judge}, order {judgement.order} ({judgement.kind}): {judgement.note}; "
                    why += "average more orders or judges to fill the gap"
                    rejections.append(_rejection(instruction, "reply", "reply not complete", why))
            counts.update(counts_of(record))
            pair_counts.update(pairs_by_rule(record))
            yield _Record(**vars(record), image_hashes=instruction.images)
        notes.update(counts=dict(counts), pairs=dict(pair_counts), rejections=rejections)
        notes["kinds"] = {judge: dict(counter) for judge, counter in kinds.items()}


def _rejection(instruction: Instruction, what: str, reason: str, detail: str) -> dict[str, Any]:
    return asdict(Rejection(instruction.number, "", 0, what, instruction.id, reason, detail))


@dataclass(frozen=True)
class _Record(Record):
    """A record whose images the run has hashed before: they are named by it."""

    image_hashes: tuple[str, ...] = ()

    @property
    def image_sha256(self) -> tuple[str, ...]:
        return self.image_hashes


def _content(gathered: Gathered) -> bytes:
    """What a record depends on, as bytes: images by their hashes."""
    parts = [vars(gathered.instruction), [vars(r) for r in gathered.responses], [vars(r) for r in gathered.replies]]
    parts += [[vars(r) for r in gathered.syntheses]] if gathered.syntheses else []
    parts += [[vars(one) for one in tree] for tree in gathered.trees.values()]
    return _encoder.encode(parts).encode()


_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
