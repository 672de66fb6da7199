"""A run's replies into a corpus: parsed anew, averaged, cut into shards, each made by one process. Costs nothing.

The same replies give the same bytes, whoever writes them: `BuildJob.make` is what every worker does, a process of this
machine or a worker of Apache Beam (`beam.py`), and a shard depends on its own instructions alone.
"""

import hashlib
import math
import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from data_prep.corpora.job import BuildJob
from data_prep.judging.aggregate import KINDS, check_scales
from data_prep.judging.kinds import Reading, kept_of, reading
from data_prep.run import SEARCH, Run
from data_prep.tables.importing import finished_before
from data_prep.tables.summary import Summary, finish, rejections_of
from silkie_jax.corpus.reader import IndexRow
from silkie_jax.corpus.schema import codec
from silkie_jax.corpus.shards import BUILDING, MANIFEST, CorpusBuilder, Entry
from silkie_jax.corpus.splits import split
from silkie_jax.endpoints.store import DATABASE
from silkie_jax.errors import UserError

_PER_SHARD = 1000
_SHARDS_A_PROCESS = 2  # fewer are not worth a process
_THREADED = {"jax", "tensorflow", "torch"}  # libraries with threads of their own, which a fork would cut off
Runner = Literal["processes", "beam"]


def build(
    run: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    name: str = "corpus",
    judges: list[str] | None = None,
    partial: bool = False,
    evaluation: str | os.PathLike[str] | None = None,
    evaluation_fraction: float = 0.005,
    seed: int = 0,
    shards: int | None = None,
    workers: int | None = None,
    runner: Runner = "processes",
    beam_options: list[str] | None = None,
    progress: bool = True,
) -> Summary:
    """Builds a corpus of a run; run the same call again to resume one that was interrupted.

    Args:
        run: the run folder.
        dst: the corpus folder to make.
        name: of the data set, in file names: lower-case letters, digits, underscores.
        judges: those whose ratings count; all by default.
        partial: whether to build although requests are open or nothing has been rated.
        evaluation: a second corpus, of instructions held out of `dst`. Instructions that share an image, or a prompt
            where there is no image, are held out together.
        evaluation_fraction: how much of the instructions to hold out, where `evaluation` is given.
        seed: of what is held out.
        shards: number of files; one for about 1,000 instructions by default.
        workers: processes; by default one for two shards, and no more than there are processors.
        runner: "processes" of this machine, or "beam".
        beam_options: Apache Beam's own options, such as `--runner=FlinkRunner`.
        progress: whether to show progress on stderr.

    Returns:
        What `dst` holds, also saved as its `summary.json`.

    Raises:
        UserError: the run is unfinished or has no responses, judges cannot be averaged, or `dst` holds something else.
    """
    for key, value in (("workers", workers), ("shards", shards)):
        if value is not None and value < 1:
            raise UserError(f"{key}: {value} is not at least 1")
    if beam_options and runner != "beam":
        raise UserError(f"--beam-option {beam_options[0]}: add --runner beam")
    if evaluation is not None:
        ends = Path(dst).resolve(), Path(evaluation).resolve()
        if ends[0].is_relative_to(ends[1]) or ends[1].is_relative_to(ends[0]):
            raise UserError(f"--evaluation {evaluation}: name a folder of its own, outside {dst}")
    with Run.open(run) as opened:
        counted = _judges(opened, judges)
        readings = {name: reading(name, kept) for name, kept in counted.items()}
        check_scales(readings)
        total = _check(opened, readings, partial)
        held_out = _hold_out(opened, evaluation_fraction, seed) if evaluation is not None else frozenset()
        spending = _spending(opened, {name for one in readings.values() for name in one.asked})
        teacher = opened.settings("teacher")
    shards = math.ceil(total / _PER_SHARD) if shards is None else min(shards, total)
    job = BuildJob(str(run), str(dst), name, shards, total, counted, held_out, teacher=teacher)
    workers = workers or min(os.cpu_count() or 1, max(1, shards // _SHARDS_A_PROCESS))
    everywhere = _Side(runner, workers, beam_options or [], progress, spending)
    if evaluation is not None:
        others = frozenset(range(1, total + 1)) - held_out
        fewer = min(shards, len(held_out))
        _build_one(replace(job, dst=str(evaluation), shards=fewer, excluded=others), everywhere)
    return _build_one(job, everywhere)


@dataclass(frozen=True)
class _Side:
    """How to run jobs, and what the manifest says beside the records."""

    runner: Runner
    workers: int
    beam_options: list[str]
    progress: bool
    spending: list[dict[str, Any]] = field(default_factory=list)


def _build_one(job: BuildJob, side: _Side) -> Summary:
    if (Path(job.dst) / MANIFEST).exists():
        with Run.open(job.run) as run:
            return finished_before(Path(job.dst), _hash(job.key(run, number) for number in range(job.shards)))
    others = 0 if side.runner == "beam" else min(side.workers, job.shards) - 1
    # Workers come first: what this process opens, the lock of the corpus for one, is not theirs.
    with _workers(others) as pool, CorpusBuilder(job.dst, job.name, job.shards) as builder:
        if side.runner == "beam":
            from data_prep.corpora.beam import run_on_beam

            snapshot = Path(job.dst) / BUILDING / DATABASE  # goes when the corpus is finished
            with Run.open(job.run) as run:
                run.snapshot(snapshot)
            job = replace(job, snapshot=str(snapshot))
            run_on_beam(job, side.beam_options)
            entries = [job.make(number) for number in range(job.shards)]  # as Beam's workers left them
        else:
            entries = _run_all(job, side.progress, pool, others)
        return _finish(builder, job, entries, _hash(entry.key for entry in entries), side.spending)


@contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor | None]:
    """Other processes; None for none."""
    if not count:
        yield None
        return
    context: multiprocessing.context.BaseContext
    if sys.platform == "linux" and threading.active_count() == 1 and not _THREADED & sys.modules.keys():
        codec()  # workers have what is loaded before
        context = multiprocessing.get_context("fork")
    else:  # threads do not survive a fork: a server that has none forks the workers, which takes a second longer
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["__main__", "data_prep.corpora.build", "tensorflow_datasets.proto"])
        context = server
    with ProcessPoolExecutor(count, context, initializer=_die_with_parent) as pool:
        with warnings.catch_warnings():  # of threads, which numpy's are; it minds forks itself
            warnings.simplefilter("ignore", DeprecationWarning)
            pool.submit(os.getpid)  # all of them start now
        yield pool


def _run_all(job: BuildJob, progress: bool, pool: ProcessPoolExecutor | None, others: int) -> list[Entry]:
    """All shards, by this process and the others."""
    numbers = iter(range(job.shards))  # next() is atomic: whoever is free takes the next shard
    made: dict[int, Entry] = {}
    with (
        tqdm(total=job.shards, unit="shard", desc="building", disable=not progress, mininterval=0.5) as bar,
        ThreadPoolExecutor(max(others, 1)) as feeders,
    ):

        def work(make: Callable[[int], Entry]) -> None:
            for number in numbers:
                made[number] = make(number)
                bar.update()

        def feed(pool: ProcessPoolExecutor) -> None:
            work(lambda number: pool.submit(job.make, number).result())

        try:
            fed = [feeders.submit(feed, pool) for _ in range(others)] if pool else []
            work(job.make)
            for future in fed:
                future.result()
            return [made[number] for number in range(job.shards)]
        except BrokenProcessPool:
            raise UserError(
                f"{job.dst}: a worker process was killed (out of memory?): run the same command again to continue, "
                "with fewer --workers"
            ) from None
        finally:
            for _ in numbers:  # after an error: nobody begins another
                pass


def _die_with_parent() -> None:
    """Leaves Ctrl-C to the parent, and ends this worker with it, even if it is killed: nobody writes to a corpus whose
    lock is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _finish(
    builder: CorpusBuilder, job: BuildJob, entries: list[Entry], key: str, spending: list[dict[str, Any]]
) -> Summary:
    """Sums up the shards and completes the corpus."""
    kinds: dict[str, Counter[str]] = {judge: Counter() for judge in job.judges}
    for entry in entries:
        for judge, found in entry.notes["kinds"].items():
            kinds[judge].update(found)
    rows = sum(entry.notes["counts"].get("rows", 0) for entry in entries)
    if not any(entry.shard.records for entry in entries):
        raise UserError(f"none of the {rows} instructions of {job.run} has a response: nothing to build")
    readings = [reading(judge, kept) for judge, kept in job.judges.items()]
    facts = {
        "aspects": list(dict.fromkeys(name for one in readings for name in one.names)),
        "input": key,
        "scales": {
            name: [one.scale.low, one.scale.high] if one.scale else None for one in readings for name in one.names
        },
        "weights": {name: weight for one in readings for name, weight in one.weights.items()},
        "judges": {
            judge: {"rubric": job.judges[judge]["name"], **{kind: kinds[judge][kind] for kind in KINDS}}
            for judge in kinds
        },
        "spending": spending,
    }
    return finish(builder, entries, rejections_of(entries), facts, rows=rows)


def _judges(run: Run, wanted: list[str] | None) -> dict[str, dict[str, Any]]:
    """Judge -> what its ratings depend on, of the judges that count, in the order of their names."""
    names = sorted(
        key.removeprefix("judge:")
        for (key,) in run.db.execute("SELECT key FROM meta WHERE key LIKE 'judge:%'").fetchall()
    )
    for name in wanted or ():
        if name not in names:
            raise UserError(f"--judge {name}: the run {run.path} has judges {', '.join(names) or '(none yet)'}")
    chosen = [name for name in names if wanted is None or name in wanted]
    return {name: kept_of(run.settings(f"judge:{name}")) for name in chosen}


def _check(run: Run, judges: dict[str, Reading], partial: bool) -> int:
    """The number of instructions; refuses a run that is not ready."""
    total = run.count()
    if not total:
        raise UserError(f"{run.path} has no instructions yet: add some with `silkie corpus instructions`")
    waiting = dict(
        run.db.execute(
            "SELECT stage, count(*) FROM requests WHERE state NOT IN ('ok', 'failed') GROUP BY stage"
        ).fetchall()
    )
    for stage, count in sorted(waiting.items(), reverse=True):
        if not partial:
            raise UserError(
                f"{run.path}: {count} requests of `silkie corpus {'respond' if stage == SEARCH else stage}` are still "
                "open: finish them first, "
                "or build what there is with --partial"
            )
    if not judges and not partial and not (run.settings("teacher") and not run.settings("pool")):
        raise UserError(f"{run.path} has no ratings yet: run `silkie corpus rate`, or build without with --partial")
    return total


def _hold_out(run: Run, fraction: float, seed: int) -> frozenset[int]:
    """Numbers of the instructions to hold out, by the rule that training uses (`corpus.splits`)."""
    if not 0 < fraction < 1:
        raise UserError(f"--evaluation-fraction: {fraction} is not between 0 and 1")
    index = [IndexRow(i.id, hashlib.sha256(i.prompt.encode()).hexdigest(), i.images, "") for i in run.instructions()]
    return frozenset(int(position) + 1 for position in split(index, fraction, seed)[1])


def _spending(run: Run, asked: Set[str]) -> list[dict[str, Any]]:
    """What the replies that count have cost, by stage and agent. Attempts in vain are not among them: they differ from
    run to run, and a corpus does not. `silkie corpus report --run` shows them."""
    rows = run.db.execute(
        "SELECT r.stage, r.agent, r.state, coalesce(a.model, ''), a.cost, coalesce(a.input_tokens, 0), "
        "coalesce(a.output_tokens, 0) FROM requests r JOIN attempts a ON a.id = r.attempt "
        "WHERE r.state IN ('ok', 'failed')"
    )
    found: dict[tuple[str, str], dict[str, Any]] = {}
    costs: dict[tuple[str, str], list[float]] = {}
    for stage, agent, state, model, cost, tokens_in, tokens_out in rows:
        if stage == "rate" and agent not in asked:
            continue
        row = found.setdefault(
            (stage, agent),
            {
                "stage": stage,
                "agent": agent,
                "models": set(),
                "ok": 0,
                "failed": 0,
                "input_tokens": 0,
                "output_tokens": 0,
            },
        )
        row["models"] |= {model} - {""}
        row[state] += 1
        row["input_tokens"] += tokens_in
        row["output_tokens"] += tokens_out
        costs.setdefault((stage, agent), []).append(cost)
    return [
        row | {"models": sorted(row["models"]), "cost": round(math.fsum(costs[key]), 9)}
        for key, row in sorted(found.items(), reverse=False)
    ]


def _hash(keys: Iterable[str]) -> str:
    """What a corpus is made from, by the keys of its shards."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()
