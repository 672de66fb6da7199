"""The live client of data_prep against the bare `openai` client: the same server, requests, concurrency and machine.

    python -m benchmarks.judge_client [--requests 600] [--image-kb 60] [--concurrency 8 32]

The server (tests/endpoints/server.py) runs in a process of its own and reads every request whole. The bare client is
what anyone would write first: `AsyncOpenAI().chat.completions.create` under a semaphore, keeping nothing. Ours does
the same requests and writes each, durably, before it is sent and when its reply is in. Both are run in turns; the
median of their ratios is what counts, since the machine's own mood is the same for both sides of a pair.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
from PIL import Image

from data_prep.respond import respond
from data_prep.run import Instruction, Run
from silkie_jax.endpoints.stage import Options


def main() -> None:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--image-kb", type=int, default=60)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that the server takes for a reply")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    images = [picture(args.image_kb * 1000, seed) for seed in range(16)]
    results = []
    with serve(args.delay) as url, tempfile.TemporaryDirectory() as folder:
        asyncio.run(bare(url, images, 50, 8))  # both are warm
        for concurrency in args.concurrency:
            rates: dict[str, list[float]] = {"bare": [], "ours": []}
            for turn in range(args.rounds):
                rates["bare"].append(asyncio.run(bare(url, images, args.requests, concurrency)))
                rates["ours"].append(
                    ours(url, images, args.requests, concurrency, Path(folder) / f"{concurrency}-{turn}")
                )
            ratios = [mine / theirs for mine, theirs in zip(rates["ours"], rates["bare"], strict=True)]
            results.append(
                {
                    "concurrency": concurrency,
                    "bare_requests_per_s": round(statistics.median(rates["bare"]), 1),
                    "ours_requests_per_s": round(statistics.median(rates["ours"]), 1),
                    "ratio": round(statistics.median(ratios), 3),
                    "ratios": [round(ratio, 3) for ratio in ratios],
                }
            )
    body = {"requests": args.requests, "image_bytes": len(images[0]), "cores": os.cpu_count(), "results": results}
    print(json.dumps(body, indent=1))


def picture(size: int, seed: int) -> bytes:
    """A JPEG of about `size` bytes."""
    side = int((size / 0.94) ** 0.5)  # noise at quality 90 takes about a byte a pixel
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


@contextlib.contextmanager
def serve(delay: float) -> Iterator[str]:
    """The scripted server in its own process; yields its URL."""
    command = [sys.executable, "-m", "tests.endpoints.server", "--delay", str(delay)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process.stdout.readline().strip()
        process.terminate()


async def bare(url: str, images: list[bytes], count: int, concurrency: int) -> float:
    """Requests a second of the openai client alone."""
    urls = ["data:image/jpeg;base64," + base64.b64encode(image).decode() for image in images]
    turns = asyncio.Semaphore(concurrency)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

        async def one(number: int) -> str | None:
            async with turns:
                reply = await client.chat.completions.create(
                    model="m",
                    max_tokens=1024,
                    messages=[
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": urls[number % len(urls)]}},
                                {"type": "text", "text": f"What is in picture {number}?"},
                            ],
                        }
                    ],
                )
                return reply.choices[0].message.content

        await one(0)
        began = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(count)))
        return count / (time.perf_counter() - began)


def ours(url: str, images: list[bytes], count: int, concurrency: int, folder: Path) -> float:
    """Requests a second from the first to the last reply of a run, as its database tells."""
    with Run.create(folder) as run:
        names = [run.add_image(image) for image in images]
        run.write_instructions(
            (Instruction(f"i{n}", f"What is in picture {n}?", (names[n % len(names)],)) for n in range(count)), {}
        )
    pool = folder.with_suffix(".yaml")
    pool.write_text(
        f"models_per_instruction: 1\nmodels:\n  m: {{model: m, base_url: '{url}', concurrency: {concurrency}}}\n"
    )
    respond(folder, pool, Options(progress=False))
    with Run.open(folder) as run:
        first, last, done = run.db.execute(
            "SELECT min(finished), max(finished), count(*) FROM attempts WHERE outcome = 'ok'"
        ).fetchone()
    assert done == count
    return (count - 1) / (last - first)


if __name__ == "__main__":
    main()
