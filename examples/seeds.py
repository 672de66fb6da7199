"""What several runs of the quickstart say side by side, each with a seed of its own: of scenes, answers and training.

    python -m examples.quickstart runs/seed-12 --seed 12
    python -m examples.quickstart runs/seed-15 --seed 15
    python -m examples.seeds runs/seed-12 runs/seed-15

prints for each figure and run: before -> after DPO, and the change's 95 % interval by paired bootstrap over scenes.
"""

import argparse
import json
import sys
from pathlib import Path

from examples.quickstart import ROWS
from examples.road import change, markdown, marker_of, shown
from silkie_jax.errors import UserError
from silkie_jax.evaluation.report.runs import read_run


def seeds(folders: list[Path]) -> str:
    """The table as Markdown.

    Raises:
        UserError: a folder is not a finished quickstart.
    """
    head, columns = [""], []
    for folder in folders:
        marker = marker_of("quickstart", folder)
        if not (folder / "table.md").exists() or not marker.exists():
            raise UserError(f"{folder}: not a finished quickstart; run `python -m examples.quickstart {folder}` first")
        head.append(f"seed {json.loads(marker.read_text())['seed']}")
        columns.append([_cell(folder, *row[:3]) for row in ROWS])
    return markdown([head, *([row[3], *cells] for row, cells in zip(ROWS, zip(*columns, strict=True), strict=True))])


def _cell(folder: Path, decoding: str, benchmark: str, figure: str) -> str:
    before, after = (read_run(str(folder / decoding / name)).measured[benchmark] for name in ("sft", "dpo"))
    return f"{shown(before, figure)} -> {shown(after, figure)}, {change(before, after, figure)}"


def main() -> int:
    """Print the table of the folders named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.seeds", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a finished quickstart")
    try:
        print(seeds(parser.parse_args().folders), end="")
    except UserError as error:
        print(f"seeds: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
