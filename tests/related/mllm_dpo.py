"""arXiv 2402.10884: the pair of each group of rated responses."""

import json
from collections.abc import Iterator
from pathlib import Path

from silkie_jax.corpus.pairs import pairs
from silkie_jax.corpus.schema import Record, Response
from tests.related.differences import same

RULE = {"name": "best_vs_lower", "margin": 2, "weights": {"Helpfulness": 1, "Correctness": 1, "Coherence": 1}}
_SEEDS = 40  # lots that show who can be drawn


def groups(folder: Path) -> Iterator[str]:
    """Every group of `mllm_dpo.json`: the chosen response, and the set from which the rejected one is drawn."""
    data = json.loads((folder / "mllm_dpo.json").read_text())
    for number, group in enumerate(data["pair_groups"]):
        rated = [dict(zip(data["attributes"], row, strict=True)) for row in group["ratings"]]
        record = Record(str(number), (), "", tuple(Response("", "", ratings) for ratings in rated))
        found = [pair for seed in range(_SEEDS) for pair in pairs(record, {**RULE, "seed": seed})]
        yield from same(f"chosen of group {number}", {c for c, _ in found}, {group["chosen"]} - {None})
        yield from same(f"rejected of group {number}", {r for _, r in found}, set(group["rejected_one_of"]))
