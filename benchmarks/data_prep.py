"""Building a corpus against tfds's own generator, on the same records in the same run; and memory as runs grow.

    python -m benchmarks.data_prep speed [--records 5000] [--image-kb 60] [--rounds 5]
    python -m benchmarks.data_prep memory [--sizes 1000 10000 100000]

Speed: each way is a command in a process of its own, from a run or a corpus in the page cache to a finished folder.
`silkie corpus build` parses every judge's reply anew, averages, encodes, hashes, writes and syncs; the generator is
handed finished examples and runs `download_and_prepare` in ArrayRecord form. Apache Beam (direct runner) is measured
where it is installed, and its bytes are compared. Processor time says more than seconds where a machine is shared.

Memory: the largest resident set of every `silkie corpus` command on small images, each in a process of its own; of
several processes (`build`) that of the largest. `respond` and `rate` plan all requests, then send some thousands of
them and are stopped by their budget; `rate --batch` sends and collects all. `--out results` keeps what was measured.
"""

import argparse
import hashlib
import importlib.util
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from silkie_jax.corpus import CorpusReader
from silkie_jax.corpus.schema import features

_BEAM = [
    f"--beam-option={option}"
    for option in ("--runner=DirectRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=0")
]


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "memory", "generate"))
    parser.add_argument("--records", type=int, default=5000)
    parser.add_argument("--image-kb", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--corpus", type=Path, help="of `generate`, which is what `speed` compares with")
    parser.add_argument("--out", help="a file to keep the result in, or `results`; of `generate`, the folder to make")
    args = parser.parse_args()
    if args.what == "generate":
        generate(args.corpus, Path(args.out))
        return
    from benchmarks.common import keep  # within functions, lest the generator that is measured pays for imports

    with tempfile.TemporaryDirectory() as folder:
        if args.what == "speed":
            table = speed(Path(folder), args.records, args.image_kb, args.rounds)
        else:
            table = memory(Path(folder), args.sizes)
    words = " ".join(sys.argv[1:]).partition(" --out")[0]
    keep(
        f"data-prep-{args.what}",
        f"`python -m benchmarks.data_prep {words}`, {os.cpu_count()} cores\n\n{table}",
        args.out,
    )


_SILKIE = [sys.executable, "-m", "silkie_jax.cli", "corpus"]


def speed(folder: Path, records: int, image_kb: int, rounds: int) -> str:
    """A table: seconds of each command in turns, and the ratio of their medians."""
    from benchmarks.judge_client import picture
    from tests.data_prep.rated import fill

    images = [picture(image_kb * 1000, seed) for seed in range(64)]

    def image(n: int) -> bytes:
        return images[n % 64] + n.to_bytes(4, "big")  # a file of its own for each: bytes after the end are allowed

    run = fill(folder / "run", records, image=image)
    warm = folder / "warm"
    build = [*_SILKIE, "build", str(run)]
    subprocess.run([*build, str(warm)], check=True, capture_output=True)
    generator = [sys.executable, "-m", "benchmarks.data_prep", "generate", "--corpus", str(warm), "--out"]
    ways: dict[str, Callable[[str], list[str]]] = {
        "tfds generator": lambda dst: [*generator, dst],
        "build": lambda dst: [*build, dst],
        "build --workers 1": lambda dst: [*build, dst, "--workers", "1"],
    }
    if importlib.util.find_spec("apache_beam"):
        ways["build --runner beam"] = lambda dst: [*build, dst, "--runner", "beam", *_BEAM]
    seconds: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    same = True
    for turn in range(rounds):
        for way in sorted(ways, reverse=bool(turn % 2)):  # whatever one leaves to the disk troubles each in turn
            dst = folder / f"{way} {turn}"
            os.sync()
            began, used = time.perf_counter(), _cpu_of_children()
            subprocess.run(ways[way](str(dst)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds.setdefault(way, []).append(time.perf_counter() - began)
            cpu.setdefault(way, []).append(_cpu_of_children() - used)
            if way != "tfds generator":
                same = same and _digests(dst) == _digests(warm)
            shutil.rmtree(dst)
    base, base_cpu = (statistics.median(values["tfds generator"]) for values in (seconds, cpu))
    size = sum(file.stat().st_size for file in warm.glob("*array_record*")) // records
    lines = [f"{records:,} records of {size:,} bytes; bytes of all builds equal: {same}", ""]
    lines += [
        "| command | median s | tfds / this | CPU s | tfds / this | seconds of each turn |",
        "|---|---|---|---|---|---|",
    ]
    for way, values in seconds.items():
        median, used = statistics.median(values), statistics.median(cpu[way])
        turns = ", ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {way} | {median:.2f} | {base / median:.2f} | {used:.2f} | {base_cpu / used:.2f} | {turns} |")
    return "\n".join(lines)


def _cpu_of_children() -> float:
    """Seconds of processor time of all processes that have ended below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def generate(corpus: Path, dst: Path) -> None:
    """The examples of a corpus by tfds's own generator."""
    _with_tfds(dst, CorpusReader(corpus))


def _with_tfds(dst: Path, corpus: CorpusReader) -> None:
    """What one writes with tfds alone."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():  # it is defined anew in every turn

        class Corpus(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(builder=self, features=features())

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
                for record in corpus:
                    yield record.id, _as_example(record)

    builder = Corpus(data_dir=str(dst), file_format="array_record")
    builder.download_and_prepare()


def _as_example(record: Any) -> dict[str, Any]:
    responses = record.responses
    return {
        "id": record.id,
        "images": [io.BytesIO(image) for image in record.images],
        "prompt": record.prompt,
        "history": {"user": [], "assistant": []},
        "responses": {
            "text": [r.text for r in responses],
            "model": [r.model for r in responses],
            "ratings": [json.dumps(dict(r.ratings)) for r in responses],
            "rationales": [json.dumps(dict(r.rationales)) for r in responses],
        },
        "pairs": {"chosen": [], "rejected": []},
        "source": record.source,
        "extra": json.dumps(dict(record.extra)),
    }


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def memory(folder: Path, sizes: list[int]) -> str:
    """A table: the largest resident set in MB of each command at each size."""
    from benchmarks.judge_client import serve

    with serve(0.0) as url:
        found = [memory_of(folder / str(size), size, url) for size in sizes]
    lines = ["| largest resident set in MB, instructions: | " + " | ".join(f"{size:,}" for size in sizes) + " |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for command in found[0]:
        lines.append(f"| {command} | " + " | ".join(str(column[command]) for column in found) + " |")
    return "\n".join(lines)


def memory_of(folder: Path, count: int, url: str) -> dict[str, int]:
    """Largest resident set in MB of each command on `count` small instructions."""
    from data_prep.run import Run
    from tests.data_prep.rated import fill
    from tests.data_prep.runs import picture, write_judge, write_pool

    folder.mkdir()
    rows = folder / "rows.jsonl"
    with open(rows, "w") as lines, zipfile.ZipFile(folder / "images.zip", "w") as images:
        for n in range(count):
            images.writestr(f"{n}.png", picture(n % 65_000))
            lines.write(json.dumps({"id": n, "image": f"{n}.png", "prompt": f"What is in picture {n}?"}) + "\n")
    # A reply may cost 200 tokens at 30 USD a million at most, and costs less: this is enough for some 1,500.
    pool = write_pool(folder / "pool.yaml", url, concurrency=8)
    judge = write_judge(folder / "judge.yaml", url, {"name": "second"}, concurrency=8)
    batched = write_judge(folder / "batched.yaml", url, {"name": "third"})
    asked, run, corpus = folder / "asked", fill(folder / "run", count), folder / "corpus"
    with Run.create(run) as opened:
        opened.save_settings("pool", {"of": "a benchmark"})
    commands: dict[str, list[object]] = {
        "instructions": [rows, asked, "--images", folder / "images.zip"],
        "respond --dry-run": [asked, "--pool", pool, "--dry-run"],
        "respond, stopped by its budget": [asked, "--pool", pool, "--budget", "4USD"],
        "rate --dry-run": [run, "--judge", judge, "--dry-run"],
        "rate, stopped by its budget": [run, "--judge", judge, "--budget", f"{0.005 * count + 10}USD"],
        "rate --batch": [run, "--judge", batched, "--batch", "--poll", 1],
        "build": [run, corpus, "--partial", "--judge", "judge", "--evaluation", folder / "held-out"],
        "report": [corpus, "--run", run],
        "export-pairs": [corpus, folder / "pairs"],
        "show": [corpus, "--number", 0],
    }
    found = {}
    for name, arguments in commands.items():
        print(f"{count:,}: {name}", file=sys.stderr, flush=True)
        found[name] = largest(name.split()[0].rstrip(","), *arguments, stopped="stopped" in name)
        print(f"{found[name]} MB", file=sys.stderr, flush=True)
    return found


def largest(verb: str, *arguments: object, stopped: bool = False) -> int:
    """Runs `silkie corpus VERB` under a process that reports the largest resident set of all below it, in MB."""
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL);"
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)"
    )
    command = [sys.executable, "-c", code, *_SILKIE, verb, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    status, megabytes = map(int, done.stdout.split())
    if status != (1 if stopped else 0):
        raise SystemExit(f"silkie corpus {verb} ended with {status}: {done.stderr[-2000:]}")
    return megabytes


if __name__ == "__main__":
    main()
