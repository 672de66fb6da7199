"""The input pipeline against Pillow alone: rows with their images, a second, on the same cores.

    python -m benchmarks.input [--rows 512] [--workers 2] [--side 448] [--width 4096] [--out results]

The baseline opens the same JPEG bytes, decodes, converts and resizes them with Pillow in as many threads, and does
nothing else. The pipeline also reads records and rows from disk, makes prompt and four responses of them, pads and
collates. (Rows are laid out once, before the first epoch; what that takes is printed, too.) The third line is the same
pipeline with stored features [256, width] in bfloat16 in the place of pixels, from a disk that has them in its cache.
"""

import argparse
import io
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import keep
from examples.tiny_qwen_vl import make_checkpoint
from silkie_jax.corpus import CorpusReader, Record, Response
from silkie_jax.corpus.shards import CorpusBuilder
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.preference.batches import BatchSource, RowOptions
from silkie_jax.preference.grid import Grid
from silkie_jax.preference.layout import lay_out
from silkie_jax.preference.plan import Plan
from silkie_jax.scoring.features import FeatureStore, first_places

WORDS = (
    "the",
    "picture",
    "shows",
    "a",
    "red",
    "box",
    "beside",
    "an",
    "old",
    "wall",
    "where",
    "two",
    "dogs",
    "sleep",
    "while",
    "people",
    "walk",
    "along",
    "the",
    "street",
)


def make_corpus(folder: Path, rows: int) -> CorpusReader:
    """Photograph-like JPEGs of 640x480 and four responses of about 100 words."""
    random = np.random.default_rng(0)
    records = []
    for n in range(rows):
        small = Image.fromarray(random.integers(0, 256, (30, 40, 3), np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        grain = np.clip(np.asarray(small, np.int16) + random.integers(-12, 13, (480, 640, 3)), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(grain).save(file, "JPEG", quality=85)
        responses = tuple(
            Response(" ".join(random.choice(WORDS, 100)), f"m{k}", {"Helpfulness": float(k)}) for k in range(4)
        )
        records.append(Record(f"r{n}", (file.getvalue(),), "What is in the picture?", responses))
    with CorpusBuilder(folder, "bench", 1) as builder:
        builder.finish([builder.write(0, "key", records, {})], {}, {"aspects": ["Helpfulness"]})
    return CorpusReader(folder)


def main() -> None:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--side", type=int, default=448)
    parser.add_argument("--width", type=int, default=4096, help="of stored features")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", help="a file, or `results` for benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder) / "corpus", args.rows)
        tokenizer = Tokenizer.from_folder(make_checkpoint(Path(folder) / "model"))
        options = RowOptions("mean_rating")
        began = time.perf_counter()
        layout = lay_out(corpus, lambda record: options.row(tokenizer, record), options.key(corpus, tokenizer))
        once = (time.perf_counter() - began) / args.rows
        grid = Grid(Plan(layout.sizes, args.batch), rows=args.batch)
        everything = np.arange(args.rows)
        make = partial(BatchSource, corpus, everything, grid, tokenizer, options, image_size=args.side, layout=layout)
        store = FeatureStore(corpus.path, {"of": "a benchmark"}, list(first_places(corpus)), args.width, "bfloat16")
        for part in range(store.parts):
            store.write(part, np.zeros((len(store.range(part)), *store.shape), store.dtype))
        sources = {"pipeline": make(), "pipeline with stored features": make(features=store.read())}
        images = [record.images[0] for record in corpus]

        def pillow(data: bytes) -> np.ndarray:
            opened = Image.open(io.BytesIO(data)).convert("RGB")
            return np.asarray(opened.resize((args.side, args.side), Image.Resampling.BICUBIC))

        rates: dict[str, list[float]] = {"Pillow alone": [], **{name: [] for name in sources}}
        for _ in range(args.turns):
            began = time.perf_counter()
            with ThreadPoolExecutor(args.workers) as pool:
                for _ in pool.map(pillow, images):
                    pass
            rates["Pillow alone"].append(args.rows / (time.perf_counter() - began))
            for name, source in sources.items():
                began = time.perf_counter()
                for _ in source.iterate(0, source.steps_per_epoch, args.workers):
                    pass
                rates[name].append(args.rows / (time.perf_counter() - began))
    pairs = zip(rates["pipeline"], rates["Pillow alone"], strict=True)
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    lines = [f"{args.rows} JPEGs of 640x480 to {args.side}x{args.side}, {args.workers} threads", ""]
    lines += [f"- {name}: {statistics.median(found):.0f} a second" for name, found in rates.items()]
    megabytes, rate = store.nbytes(1) / 1e6, statistics.median(rates["pipeline with stored features"])
    lines += [f"- a row's features: {megabytes:.2f} MB, together {megabytes * rate:.0f} MB/s"]
    lines += [f"- ratio, pipeline / Pillow: {ratio:.2f}", f"- laying out a row, once: {1e3 * once:.2f} ms"]
    keep("input", "\n".join(lines), args.out)


if __name__ == "__main__":
    main()
