"""What a single GPU must show at full size, in one call: log-probabilities, attention, the step, the PyTorch peer.

    python -m benchmarks.gpu [--minutes 9] [--parts attention step logprobs] [--out results]

Sized for one call of nine minutes on one H100 or H200. What matters most comes first, and every result is written as
soon as it is there, so that a run that is cut off keeps what it has. Each part is a script in a process of its own: one
that fails, or runs out of memory or time, is named at the end and the others go on. Random weights; needs JAX and Flax
with what these bring, for the peers PyTorch, Transformers and PEFT, and neither a checkpoint nor a network.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of the step: configs/silkie-1x80gb.yaml's batch with both kernels, the peers, and then one change at a time.
STEP = ["--remat", "dots", "--batch-rows", "8", "--attention", "flash", "--steps", "5", "--warmup", "2"]
STEP += ["--limit", "170", "--peer-pairs", "8", "--peer", "trl", "tricks"]
STEP += ["--also", "batch_rows=14", "features=precomputed,batch_rows=14", "features=precomputed,batch_rows=32"]
STEP += ["tokens=1024,batch_rows=14", "compute=fp8,batch_rows=14", "quantize=int8,batch_rows=14"]
STEP += ["attention=cudnn", "reference=adapter_off"]
STEP += ["remat=full,features=precomputed,batch_rows=1", "remat=none,batch_rows=4", "attention=plain"]
# Script, its options, and the share of the minutes that it may take at most.
PARTS: dict[str, tuple[str, list[str], float]] = {
    "attention": ("benchmarks.attention", ["--lengths", "1024", "2048"], 0.25),
    "step": ("benchmarks.step", STEP, 0.9),
    "logprobs": ("benchmarks.logprobs", ["--rows", "4", "--labels", "592", "1184"], 0.25),
}


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="the most that all parts take together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", default="full", help="other sizes are for trying this script")
    parser.add_argument("--out", default="results", help="a folder, or `results` for benchmarks/results")
    args = parser.parse_args()
    end, failed = time.monotonic() + 60 * args.minutes, []
    for name in args.parts:
        module, options, share = PARTS[name]
        left = min(share * args.minutes, (end - time.monotonic()) / 60 - 0.1)
        if left <= 0:
            failed.append(f"{name}: not begun, out of time")
            continue
        out = args.out if args.out == "results" else str(Path(args.out).resolve() / f"{name}.md")
        if args.size != "full" and name != "logprobs":
            options = [*options, "--steps", "1"]
        command = [sys.executable, "-m", module, *options, "--size", args.size, "--out", out]
        if name == "step":
            command += ["--minutes", f"{left - 0.15:.2f}"]  # to stop by itself before it is stopped
        print(f"== {' '.join(command[1:])} ({left:.1f} of {(end - time.monotonic()) / 60:.1f} minutes)", flush=True)
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=60 * left).returncode
        except subprocess.TimeoutExpired:
            failed.append(f"{name}: stopped after {left:.1f} minutes")
            continue
        if status:
            failed.append(f"{name}: ended with status {status}")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
