"""Compiles every machine's config at full size with the real compilers of TPUs and GPUs and writes the table.

    python -m benchmarks.pods [--out results]         (needs the tpu and cuda12 extras; a minute a config on two cores)
    python -m benchmarks.pods --only silkie-v5e-16 silkie-1x80gb --loss sigmoid '{name: spa, extrapolation: 0.5}'

Each config is compiled in a process of its own by `silkie compile`; nothing runs. Times and rates are forecasts.
`--loss` compiles each config with each of these losses in place of its own, the reference computed in the step.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import keep

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MACHINES = {
    "silkie-1x80gb": "h100:1",
    "silkie-1xh200": "h200:1",
    "silkie-8gpu": "h100:8",
    "silkie-v5e-16": "v5e:4x4",
    "silkie-v5e-256": "v5e:16x16",
    "silkie-v5p-64": "v5p:4x4x4",
    "silkie-v6e-64": "v6e:8x8",
    "silkie-full-v5p-64": "v5p:4x4x4",
}


def memory_of(program: dict[str, Any]) -> str:
    """A compiled shape and what it needs."""
    shape = program["shape"]
    about = f"{program['name']}, {shape['batches']} x {shape['sequences']} x {shape['tokens']}: "
    if program["refused"]:
        return f"{about}DOES NOT FIT"
    gib = [program[f"{kind}_bytes"] / 2**30 for kind in ("argument", "temporary", "peak", "memory")]
    verdict = "" if program["fits"] else " DOES NOT FIT"
    return f"{about}{gib[0]:.2f}, {gib[1]:.2f}, {gib[2]:.2f} / {gib[3]:.0f}{verdict}"


def main() -> None:
    """Compiles all and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--loss", nargs="*", help="losses, as a config has them")
    parser.add_argument("--out", help="a file, or `results` for benchmarks/results")
    args = parser.parse_args()
    lines = [
        "| config | chips | rows a step | shape: GiB a chip: arguments, temporaries, peak / has | compile, s | "
        "received by a chip a step, GB | forecast: s a step, instructions/s, hours for 3 epochs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, loss in itertools.product(args.only, args.loss or [None]):
        command = [sys.executable, "-m", "silkie_jax.cli", "compile", str(CONFIGS / f"{name}.yaml"), "--json"]
        command += ["--topology", MACHINES[name], *([f"loss={loss}", "reference=copy"] if loss else [])]
        title = f"{name} ({MACHINES[name]})" + (f", `{loss}`" if loss else "")
        done = subprocess.run(command, capture_output=True, text=True)
        if not done.stdout.startswith("{"):
            why = (done.stderr.strip() or "ended without a word").splitlines()[-1]
            lines.append(f"| {title} | {why} | | | | | |")
            continue
        found = json.loads(done.stdout)
        programs = found["compiled"]
        rate = found["instructions"] / found["step_seconds"]
        took = " + ".join(f"{program['compile_seconds']:.0f}" for program in programs)
        memory = "<br>".join(map(memory_of, programs))
        lines.append(
            f"| {title} | {found['chips']} | {found['rows']} | {memory} | {took} | "
            f"{sum(programs[0]['collectives'].values()) / 1e9:.1f} | "
            f"{found['step_seconds']:.2f}, {rate:.0f}, {3 * found['in_all'] / rate / 3600:.1f} |"
        )
        print(lines[-1], flush=True)
    keep("objectives" if args.loss else "pods", "\n".join(lines), args.out)


if __name__ == "__main__":
    main()
