"""SIMA (arXiv 2405.15973): the critic's verdicts, as proposed in place of the release's parsing."""

import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.judging.ratings import parse
from data_prep.judging.rubric import load_rubric
from tests.related.differences import same


def critic(folder: Path) -> Iterator[str]:
    """Every reply of `sima_critic.json`."""
    rubric = load_rubric("self_critic")
    for case in json.loads((folder / "sima_critic.json").read_text())["replies"]:
        row = parse(case["reply"], rubric, 2).ratings["Preferred"]
        yield from same(f"verdict of {case['reply']!r}", row.index(1.0) + 1 if 1.0 in row else None, case["proposed"])
