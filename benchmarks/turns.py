"""Variants of a benchmark in processes of their own, in turns, so that neither memory nor the machine's mood is shared.

A script that uses it prints, when it is started with `--worker OPTIONS` (JSON), one line of JSON: a `Measured`. A
variant that fails, for want of memory above all, is reported and left out of later turns; the others go on.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.workload import PAIRS_EACH

ROOT = Path(__file__).resolve().parents[1]
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "MemoryError", "Out of memory", "out of memory")


@dataclasses.dataclass
class Measured:
    """What one process found.

    seconds: of each step, warm-up excluded. pairs, tokens: of one step, without padding. flops: model FLOPs of one
    step by formula. peak: bytes at the peak, of the device where it tells (else of the process). compiled: bytes that
    the compiler says the step needs (arguments, temporaries and outputs), where there is a compiler. loss: of the first
    step and of the last one.
    """

    device: str
    seconds: list[float]
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


@dataclasses.dataclass(frozen=True)
class Variant:
    """A name, the module that measures it, and the options that it is given."""

    name: str
    module: str
    options: dict[str, Any]


def run_in_turns(variants: list[Variant], turns: int, limit: float) -> dict[str, Measured | str]:
    """Measures every variant in every turn; in place of one that failed stands the reason, in one line."""
    found: dict[str, Measured | str] = {}
    with tempfile.TemporaryDirectory() as cache:
        # Later turns take the compiled step from the first one's cache.
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92"),
        }
        for turn in range(turns):
            for variant in variants:
                before = found.get(variant.name)
                if isinstance(before, str):
                    continue
                now = _run(variant, environment, limit)
                print(f"turn {turn + 1}, {variant.name}: {_short(now)}", file=sys.stderr, flush=True)
                if isinstance(now, str) or before is None:
                    found[variant.name] = now
                else:
                    before.seconds += now.seconds
                    before.peak = max(before.peak, now.peak)
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
    if status == -9 or any(word in stderr for word in OUT_OF_MEMORY):
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
        f"| variant | s a step | pairs a step | pairs/s | x {baseline} | instructions/s | tokens/s | TFLOP/s | MFU "
        "| peak, GiB | compiled, GiB | compile, s | loss, first and last step |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        if isinstance(one, str):
            lines.append(f"| {name} | {one} | | | | | | | | | | | |")
            continue
        rate = one.pairs / one.median
        ratio = "" if isinstance(first, str) else f"{rate * first.median / first.pairs:.2f}"
        speed = one.flops / one.median
        mfu = f"{speed / one.peak_flops:.1%}" if one.peak_flops else ""
        compiled = "" if one.compiled is None else f"{one.compiled / 2**30:.2f}"
        took = "" if one.compile_seconds is None else f"{one.compile_seconds:.0f}"
        lines.append(
            f"| {name}{one.note and f' ({one.note})'} | {one.median:.3f} | {one.pairs} | {rate:.2f} | {ratio} | "
            f"{rate / PAIRS_EACH:.2f} | {one.tokens / one.median:.0f} | {speed / 1e12:.3g} | {mfu} | "
            f"{one.peak / 2**30:.2f} | {compiled} | {took} | {one.loss[0]:.4f}, {one.loss[1]:.4f} |"
        )
    return lines


def device_of(found: dict[str, Measured | str]) -> str:
    """The devices that the variants ran on."""
    return ", ".join(sorted({one.device for one in found.values() if isinstance(one, Measured)})) or "no device"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What all scripts with variants take."""
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--turns", type=int, help="default: 3 on a CPU, 1 on an accelerator")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which one process is stopped")
    parser.add_argument("--out", help="a file, or `results` for benchmarks/results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def default_size() -> str:
    """`full` where JAX finds an accelerator, else `scaled`. Another process asks: this one must not take its memory."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    return "full" if done.stdout.strip() not in ("", "cpu") else "scaled"
