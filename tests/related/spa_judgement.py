"""SPA (arXiv 2406.04412): the pair that log-ratios make of a group, the highest against the lowest of all.

The release overlooks the last response of an odd group, and pairs equals: what it chose there is not ours.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.judging.implicit import ASPECT
from silkie_jax.corpus.pairs import pairs
from silkie_jax.corpus.schema import Record, Response
from tests.related.differences import same


def judgement(folder: Path) -> Iterator[str]:
    """Every group of `spa_judgement.json`."""
    data = json.loads((folder / "spa_judgement.json").read_text())
    official = {result["index"]: result for result in data["official_result"]}
    for number, ratios in enumerate(data["log_ratios"]):
        record = Record(str(number), (), "", tuple(Response("", "", {ASPECT: ratio}) for ratio in ratios))
        found = [(ratios[chosen], ratios[rejected]) for chosen, rejected in pairs(record, "best_vs_worst")]
        result = official.get(number)
        if result and result["all_responses_judged"]:
            ends = ratios[result["chosen"]], ratios[result["rejected"]]
        else:
            ends = max(ratios), min(ratios)
        yield from same(f"log-ratios of the pair of group {number}", found, [ends] if ends[0] > ends[1] else [])
