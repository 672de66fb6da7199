"""Variants of a benchmark in processes of their own, in turns, so that neither memory nor the machine's mood is shared.

A script that uses it prints, when it is started with `--worker OPTIONS` (JSON), one line of JSON: a `Measured`. A
variant that fails, for want of memory above all, is reported and left out of later turns; the others go on.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import devices
from benchmarks.workload import PAIRS_EACH

ROOT = Path(__file__).resolve().parents[1]
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "MemoryError", "Out of memory", "out of memory")


@dataclasses.dataclass
class Measured:
    """What one process found.

    seconds: of each step, warm-up excluded; busy: of the processors meanwhile, which on a CPU hardly change when other
    work slows the steps. pairs, tokens: of one step, without padding. flops: model FLOPs of one
    step by formula. peak: bytes at the peak, of the device where it tells (else of the process). compiled: bytes that
    the compiler says the step needs (arguments, temporaries and outputs), where there is a compiler. loss: of the first
    step and of the last one. matmul: FLOP/s of one large matrix product in this library, just after the steps: what
    part of a ratio is the library's or the machine's of that moment, and not the program's.
    """

    device: str
    seconds: list[float]
    busy: list[float]
    matmul: float
    pairs: int
    tokens: int
    flops: float
    peak_flops: float | None
    peak: int
    loss: tuple[float, float]
    compile_seconds: float | None = None
    compiled: int | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Clock:
    """Times steps: `with clock.step(): ...`."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.busy: list[float] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        began, busy = time.perf_counter(), time.process_time()
        yield
        self.seconds.append(time.perf_counter() - began)
        self.busy.append(time.process_time() - busy)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A name, the module that measures it, and the options that it is given."""

    name: str
    module: str
    options: dict[str, Any]


def run_in_turns(
    variants: list[Variant],
    turns: int,
    args: argparse.Namespace,
    save: Callable[[dict[str, Measured | str]], object] = lambda found: None,
) -> dict[str, Measured | str]:
    """Measures every variant in every turn; in place of one that failed stands the reason, in one line.

    `save` is given what has been found after each of them, so that a run that is cut off keeps it.

    What is not begun after `args.minutes` is left out, a process is stopped after `args.limit` seconds.
    """
    found: dict[str, Measured | str] = {}
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as cache:
        # Later turns take the compiled step from the first one's cache.
        environment = {
            **os.environ,
            "OMP_WAIT_POLICY": "PASSIVE",  # PyTorch on a CPU: threads that wait do not count as busy
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92"),
        }
        for turn in range(turns):
            for variant in variants:
                before = found.get(variant.name)
                left = end - time.monotonic()
                if isinstance(before, str) or (before and left < 0):
                    continue
                now = _run(variant, environment, min(args.limit, left)) if left > 0 else "not begun: out of time"
                print(f"turn {turn + 1}, {variant.name}: {_short(now)}", file=sys.stderr, flush=True)
                if before is None or (isinstance(now, str) and left > args.limit):
                    found[variant.name] = now
                elif isinstance(now, Measured):
                    before.seconds += now.seconds
                    before.busy += now.busy
                    before.matmul = (before.matmul * turn + now.matmul) / (turn + 1)
                    before.peak = max(before.peak, now.peak)
                save(found)
    return found


def _run(variant: Variant, environment: dict[str, str], limit: float) -> Measured | str:
    command = [sys.executable, "-m", variant.module, "--worker", json.dumps(variant.options)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    if done.returncode:
        return why(done.returncode, done.stderr)
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


def why(status: int, stderr: str) -> str:
    """One line for a process that failed."""
    if status == -9 or any(word in stderr[-8000:] for word in OUT_OF_MEMORY):
        return "out of memory"
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else f"ended with status {status}"


def _short(found: Measured | str) -> str:
    return found if isinstance(found, str) else f"{found.median:.3f} s a step, {found.pairs / found.median:.2f} pairs/s"


def worker(measure: Callable[[dict[str, Any]], Measured], options: str) -> None:
    """Runs one variant and prints what was found."""
    print(json.dumps(dataclasses.asdict(measure(json.loads(options)))))


def resident_peak() -> int:
    """Bytes of this process at its peak."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def table(found: dict[str, Measured | str], baseline: str) -> list[str]:
    """Markdown: a line for each variant, rates from the median step of all turns, ratios in pairs/s to `baseline`."""
    first = found[baseline]
    lines = [
        "| variant | s a step | processor s a step | pairs a step | pairs/s | x | instructions/s | tokens/s | TFLOP/s "
        "| matmul, TFLOP/s | MFU | peak, GiB | compiled, GiB | compile, s | loss, first and last step |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        if isinstance(one, str):
            lines.append(f"| {name} | {one} | | | | | | | | | | | | | |")
            continue
        rate = one.pairs / one.median
        ratio = "" if isinstance(first, str) else f"{rate * first.median / first.pairs:.2f}"
        speed, tokens = one.flops / one.median, one.tokens / one.median
        mfu = f"{speed / one.peak_flops:.1%}" if one.peak_flops else ""
        busy, loss = statistics.median(one.busy), ", ".join(f"{x:.4f}" for x in one.loss)
        compiled = "" if one.compiled is None else f"{one.compiled / 2**30:.2f}"
        took = "" if one.compile_seconds is None else f"{one.compile_seconds:.0f}"
        label = f"{name} ({one.note})" if one.note else name
        lines.append(
            f"| {label} | {one.median:.3f} | {busy:.3f} | {one.pairs} | {rate:.2f} | {ratio} | "
            f"{rate / PAIRS_EACH:.2f} | {tokens:.0f} | {speed / 1e12:.3g} | {one.matmul / 1e12:.3g} | {mfu} | "
            f"{one.peak / 2**30:.2f} | {compiled} | {took} | {loss} |"
        )
    return lines


def device_of(found: dict[str, Measured | str]) -> str:
    """The devices that the variants ran on."""
    return ", ".join(sorted({one.device for one in found.values() if isinstance(one, Measured)})) or "no device"


MATMUL = (4096, 4096)  # rows and columns of the measured product; the inner dimension is the model's width
_QUEUED = 16  # products at most that are begun before the first is waited for
_LONG = 0.05  # seconds of work beside which starting it and waiting for it do not count


def matmul_speed(product: Callable[[], Any], wait: Callable[[Any], object], width: int) -> float:
    """FLOP/s of a product of MATMUL[0] x width by width x MATMUL[1].

    An accelerator has done one in less time than it takes to ask for it and to hear that it is done, so that several
    are queued and waited for together.

    Args:
        product: begins one and returns its result, finished or not.
        wait: waits for a list of results.
        width: the inner dimension.
    """

    def seconds(count: int) -> float:
        began = time.perf_counter()
        wait([product() for _ in range(count)])
        return (time.perf_counter() - began) / count

    seconds(1)  # compiles, or loads what it needs
    count = min(_QUEUED, max(1, round(_LONG / seconds(1))))
    return 2 * MATMUL[0] * MATMUL[1] * width / statistics.median(seconds(count) for _ in range(7))


def add_options(parser: argparse.ArgumentParser) -> None:
    """What all scripts with variants take."""
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--turns", type=int, help="default: 3 on a CPU, 1 on an accelerator")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which one process is stopped")
    parser.add_argument("--out", help="a file, or `results` for benchmarks/results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def default_size() -> str:
    """`full` where JAX finds an accelerator, else `scaled`."""
    return "scaled" if devices().endswith(("cpu", "no device")) else "full"
