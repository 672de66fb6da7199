"""The related systems from end to end on two CPU cores: V-DPO, SPA, SIMA, CSR, rejection sampling and SteerLM beside
the quickstart's DPO, and one table.

    python -m examples.systems [FOLDER] [--seed N] [--fast]        (runs/quickstart if left out)

FOLDER is a quickstart's: its world, corpus, model and measurements are taken as they are, and where it is not finished
it is taken to its end first. Everything else goes to FOLDER/systems. Every step is a public command, shown as it runs;
killed at any moment, the same command continues. docs/systems.md says what each system does here, and what it shows.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from examples import quickstart
from examples.road import DONE, Road, marker_of, use_two_cores
from examples.systems.stages import FAST, Sizes, take
from examples.systems.table import table


def main() -> int:
    """Take the road beside the quickstart that the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.systems", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/quickstart"), help="of the quickstart")
    parser.add_argument("--seed", type=int, help="of all; left out: as the quickstart there has it")
    parser.add_argument("--fast", action="store_true", help="the same road in small; its numbers mean nothing")
    args = parser.parse_args()
    use_two_cores(args.folder)
    begun = marker_of("quickstart", args.folder)
    given = json.loads(begun.read_text())["seed"] if begun.exists() else quickstart.SEED
    seed = given if args.seed is None else args.seed
    if not (args.folder / DONE / "report").exists():
        begin_with = ["-m", "examples.quickstart", str(args.folder), "--seed", str(seed)]
        begin_with += ["--fast"] if args.fast else []
        print(f"systems: the quickstart comes first\n$ python {shlex.join(begin_with)}", flush=True)
        if status := subprocess.run([sys.executable, *begin_with]).returncode:
            return status
    began = time.monotonic()
    beside = quickstart.FAST if args.fast else quickstart.Sizes()
    quickstart.begin(args.folder, seed, beside)  # refuses one that was begun with something else
    settings = Path(__file__).parent.glob("*.yaml")
    road = Road("systems", args.folder / "systems", seed, FAST if args.fast else Sizes(), settings)
    try:
        take(road)
    except KeyboardInterrupt:
        print("\nsystems: interrupted; the same command continues", file=sys.stderr)
        return 130
    written = table(args.folder, road.sizes.rounds)
    (road.folder / "table.md").write_text(written, encoding="utf-8")
    print(f"\n{written}")
    print(f"Done in {time.monotonic() - began:.0f} s; docs/systems.md explains {road.folder / 'table.md'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
