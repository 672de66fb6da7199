"""Compares the code with what the related systems' official code computed.

    python -m tests.related.check DIR

DIR has the form of `golden/related` beside the checkout: its README says what each file is. Each difference is one
line, and so is each file that nobody here knows; the exit status is 1 if there is any. Files that DIR lacks are not
missed.

A system is a module beside this one and a line in `CHECKS`: a function of DIR that yields the differences that it finds
in one file. `differences.py` has what such functions share.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.related import allava, csr, mllm_dpo, sima, spa, spa_judgement, vdpo

Check = Callable[[Path], Iterator[str]]

CHECKS: dict[str, Check] = {
    "allava_replies": allava.replies,
    "csr_trees": csr.trees,
    "mllm_dpo": mllm_dpo.ratings,
    "sima_critic": sima.critic,
    "spa_judgement": spa_judgement.judgement,
    "vdpo": vdpo.response_pairs,
    "vdpo_image_contrast": vdpo.image_pairs,
    "vdpo_paper_form": vdpo.paper_form,
    "spa_loss": spa.loss_and_threshold,
    "spa_extrapolation": spa.extrapolation,
}
"""From a file's name, without what follows the dot, to what compares it; arrays beside it (.npz) belong to it."""


def differences(folder: Path) -> Iterator[str]:
    """A line for each difference in any of the folder's files, beginning with the file's name."""
    for name in sorted({path.stem for path in folder.iterdir() if path.suffix in (".json", ".npz")}):
        if name in CHECKS:
            yield from (f"{name}: {line}" for line in found_in(name, folder))
        else:
            yield f"{name}: nothing here compares it"


def found_in(name: str, folder: Path) -> Iterator[str]:
    """The differences in one file; what cannot be compared at all is one, too."""
    try:
        yield from CHECKS[name](folder)
    except Exception as e:
        place = traceback.extract_tb(e.__traceback__)[-1]
        yield f"cannot be compared: {type(e).__name__}: {e} ({Path(place.filename).name}, line {place.lineno})"


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.related.check", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder in the form of golden/related")
    folder = parser.parse_args().folder
    if not folder.is_dir():
        print(f"{folder}: no such folder", file=sys.stderr)
        return 1
    found = list(differences(folder))
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
