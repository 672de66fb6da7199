"""arXiv 2402.10884 (findalexli/mllm-dpo): pairs by ratings, log-probabilities, and the line of the best ratings."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from silkie_jax.corpus.pairs import pairs
from silkie_jax.corpus.schema import Record, Response
from silkie_jax.preference.condition import read_condition
from silkie_jax.preference.logprobs import token_logprobs
from tests.related.differences import close, same

IGNORED = -100
COUNTED = ("Helpfulness", "Correctness", "Coherence")
SEEDS = 200  # draws of a rejected response, of which each that may come must come


def ratings(folder: Path) -> Iterator[str]:
    """Who is chosen and who may be rejected, what log-probabilities add up to, and what SteerLM asks for."""
    facts = json.loads((folder / "mllm_dpo.json").read_text())
    for number, group in enumerate(facts["pair_groups"]):
        responses = [Response("t", ratings=dict(zip(facts["attributes"], r, strict=True))) for r in group["ratings"]]
        record = Record("id", (), "q", tuple(responses))
        rule = {"name": "best_vs_lower", "weights": dict.fromkeys(COUNTED, 1), "margin": 2}
        found = [pair for seed in range(SEEDS) for pair in pairs(record, rule, seed=seed)]
        chosen = [] if group["chosen"] is None else [group["chosen"]]
        yield from same(f"group {number}: chosen", sorted({a for a, _ in found}), chosen)
        yield from same(f"group {number}: rejected", sorted({b for _, b in found}), sorted(group["rejected_one_of"]))
    logps = facts["logps"]
    for name, ours in zip(
        ("summed", "mean"), _logps(np.array(logps["logits"]), np.array(logps["labels"])), strict=True
    ):
        yield from close(f"{name} log-probabilities", ours, logps[name], rtol=1e-6)
    line = read_condition({"name": "attributes", "best": 4}, facts["attributes"]).asked.split("\n")[-1]
    yield from same("the line of the best ratings", line, facts["steerlm"]["suffix_of_best"])


def _logps(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and mean over the labels; the scores at t are the next token's."""
    vocabulary, shifted = logits.shape[-1], labels[:, 1:]
    before = np.broadcast_to(np.arange(shifted.shape[1]), shifted.shape)
    hidden, head = jnp.array(logits, jnp.float32), jnp.eye(vocabulary)
    found = token_logprobs(hidden, jnp.array(before), jnp.array(np.maximum(shifted, 0)), head)
    counted = shifted != IGNORED
    sums = np.where(counted, np.asarray(found, np.float64), 0).sum(1)
    return sums, sums / counted.sum(1)
