"""What a single GPU must show at full size, in one call: log-probabilities, attention, the step, the PyTorch peer.

    python -m benchmarks.gpu [--minutes 25] [--parts logprobs attention step] [--out results]

Each part is a script in a process of its own that keeps its own result: one that fails, or runs out of memory or time,
is named at the end and the others go on. Random weights; needs neither a checkpoint nor a network.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of the step: configs/silkie-1x80gb.yaml's batch, the peers, silkie-1xh200.yaml's, and then one change at a time.
STEP = ["--remat", "dots", "--batch-rows", "8", "--steps", "6", "--peer-pairs", "8", "--peer", "trl", "tricks"]
STEP += ["tricks-compiled", "--also", "batch_rows=16", "attention=plain", "attention=cudnn", "attention=flash"]
STEP += ["remat=full", "reference=adapter_off", "remat=full,batch_rows=16", "remat=none,batch_rows=4"]
# Script, its options, and the most that it may take of the minutes.
PARTS: dict[str, tuple[str, list[str], float]] = {
    "logprobs": ("benchmarks.logprobs", ["--rows", "4", "--labels", "592", "1184"], 3),
    "attention": ("benchmarks.attention", [], 4),
    "step": ("benchmarks.step", STEP, 60),
}


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25, help="the most that all parts take together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", default="full", help="other sizes are for trying this script")
    parser.add_argument("--out", default="results", help="a folder, or `results` for benchmarks/results")
    args = parser.parse_args()
    end, failed = time.monotonic() + 60 * args.minutes, []
    for name in args.parts:
        module, options, most = PARTS[name]
        left = min(most, (end - time.monotonic()) / 60 - 0.5)
        if left <= 0:
            failed.append(f"{name}: not begun, out of time")
            continue
        out = args.out if args.out == "results" else str(Path(args.out).resolve() / f"{name}.md")
        command = [sys.executable, "-m", module, *options, "--out", out]
        if name != "attention":  # which has one size
            command += ["--size", args.size]
        if name == "step":
            command += ["--minutes", f"{left:.2f}"]
        print(f"== {' '.join(command[1:])}", flush=True)
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=60 * left + 20).returncode
        except subprocess.TimeoutExpired:
            failed.append(f"{name}: stopped after {left:.1f} minutes")
            continue
        if status:
            failed.append(f"{name}: ended with status {status}")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
