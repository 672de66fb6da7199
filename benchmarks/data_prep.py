"""Building a corpus against tfds's own generator, on the same records in the same run; and memory as runs grow.

    python -m benchmarks.data_prep speed [--records 5000] [--image-kb 60] [--rounds 3]
    python -m benchmarks.data_prep memory [--sizes 1000 10000 100000]

Speed: `build` parses every judge's reply anew, averages, encodes, writes and checks shards; the generator is handed
finished examples with `download_and_prepare` in ArrayRecord form. Apache Beam (direct runner) is measured where it is
installed, and its bytes are compared. Memory: the largest resident set of `silkie corpus instructions`, `build` and
`report` in processes of their own; every worker of `build` holds what one alone does.
"""

import argparse
import hashlib
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.build import build
from silkie_jax.corpus import CorpusReader
from silkie_jax.corpus.schema import features

_BEAM = ["--runner=DirectRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=0"]


def main() -> None:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--records", type=int, default=5000)
    parser.add_argument("--image-kb", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "speed":
            body = speed(Path(folder), args.records, args.image_kb, args.rounds)
        else:
            body = {"largest_resident_MB": {str(size): memory(Path(folder) / str(size), size) for size in args.sizes}}
    print(json.dumps({"cores": os.cpu_count(), **body}, indent=1))


def speed(folder: Path, records: int, image_kb: int, rounds: int) -> dict[str, Any]:
    """Seconds of each way in turns, and the median of the ratios within a turn."""
    from benchmarks.judge_client import picture
    from tests.data_prep.rated import fill  # here, lest every worker process imports them

    images = [picture(image_kb * 1000, seed) for seed in range(64)]

    def image(n: int) -> bytes:
        return images[n % 64] + n.to_bytes(4, "big")  # a file of its own for each: bytes after the end are allowed

    run = fill(folder / "run", records, image=image)
    build(run, folder / "warm", progress=False)
    warm = CorpusReader(folder / "warm")
    seconds: dict[str, list[float]] = {}
    same = True
    for turn in range(rounds):
        ways: dict[str, Callable[[Path], object]] = {
            "tfds generator": lambda dst: _with_tfds(dst, warm),
            "ours": lambda dst: build(run, dst, progress=False),
            "ours, one process": lambda dst: build(run, dst, workers=1, progress=False),
        }
        if importlib.util.find_spec("apache_beam"):
            ways["ours, Beam"] = lambda dst: build(run, dst, runner="beam", beam_options=_BEAM, progress=False)
        for way, function in ways.items():
            dst = folder / f"{way} {turn}"
            began = time.perf_counter()
            function(dst)
            seconds.setdefault(way, []).append(time.perf_counter() - began)
            if way != "tfds generator":
                same = same and _digests(dst) == _digests(folder / "warm")
    base = seconds["tfds generator"]
    return {
        "records": records,
        "record_bytes": sum(f.stat().st_size for f in (folder / "warm").glob("*array_record*")) // records,
        "seconds": {way: round(statistics.median(values), 2) for way, values in seconds.items()},
        "times_as_fast_as_tfds": {
            way: round(statistics.median(b / v for b, v in zip(base, values, strict=True)), 2)
            for way, values in seconds.items()
        },
        "all_of_ours_give_the_same_bytes": same,
    }


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


def memory(folder: Path, count: int) -> dict[str, int]:
    """Largest resident set in MB of each verb on `count` small instructions."""
    from tests.data_prep.rated import fill
    from tests.data_prep.runs import picture

    folder.mkdir()
    rows = folder / "rows.jsonl"
    with open(rows, "w") as lines, zipfile.ZipFile(folder / "images.zip", "w") as images:
        for n in range(count):
            images.writestr(f"{n}.png", picture(n % 65_000))
            lines.write(json.dumps({"id": n, "image": f"{n}.png", "prompt": f"What is in picture {n}?"}) + "\n")
    found = {
        "instructions": _largest("instructions", rows, folder / "asked", "--images", folder / "images.zip"),
    }
    fill(folder / "run", count)
    found["build"] = _largest("build", folder / "run", folder / "corpus", "--workers", 1)
    found["report"] = _largest("report", folder / "corpus")
    return found


def _largest(verb: str, *arguments: object) -> int:
    """Runs `silkie corpus VERB` under a process that reports the largest resident set of all below it."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)"
    )
    command = [sys.executable, "-c", code, sys.executable, "-m", "silkie_jax.cli", "corpus", verb]
    done = subprocess.run(
        [*command, *map(str, arguments)], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return int(done.stdout)


if __name__ == "__main__":
    main()
