"""SPA: the refined loss, the threshold at each step of a run, and margins of extrapolated models."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from silkie_jax.preference.forward import Hidden, extrapolated_scores, response_scores
from silkie_jax.preference.losses import Term, make_pairs, read_loss
from silkie_jax.preference.losses.memory import Window
from silkie_jax.preference.losses.pairs import Pairs, Sides
from tests.related.differences import close, same


def loss_and_threshold(folder: Path) -> Iterator[str]:
    """spa_loss, which was computed in float64."""
    with jax.enable_x64(True):
        given = json.loads((folder / "spa_loss.json").read_text())
        inputs = {name: jnp.asarray(values, jnp.float64) for name, values in given["inputs"].items()}
        for number, case in enumerate(given["loss_cases"]):
            yield from (f"loss case {number}: {line}" for line in _loss(inputs, case))
        for number, run in enumerate(given["threshold_runs"]):
            yield from (f"threshold run {number}: {line}" for line in _thresholds(run))


def extrapolation(folder: Path) -> Iterator[str]:
    """spa_extrapolation, which was computed from float32 logits."""
    cases = json.loads((folder / "spa_extrapolation.json").read_text())["cases"]
    with np.load(folder / "spa_extrapolation.npz") as file:
        arrays = dict(file)
    for case in cases:
        for frozen in (False, True):
            what = f"case {case['case']}, {'frozen' if frozen else 'trained'} head"
            yield from (f"{what}: {line}" for line in _extrapolated(arrays, case, frozen))


def _loss(inputs: dict[str, jax.Array], case: dict[str, Any]) -> Iterator[str]:
    term, progress = _term(case), jnp.float64(case["step"]) / case["max_steps"]
    tokens = jnp.ones_like(inputs["policy_chosen"])

    def losses(chosen: jax.Array, rejected: jax.Array) -> tuple[jax.Array, Pairs]:
        pairs = Pairs(
            chosen,
            rejected,
            inputs["reference_chosen"],
            inputs["reference_rejected"],
            tokens,
            tokens,
            mixed=Sides(inputs["mixed_chosen"], inputs["mixed_rejected"]),
            threshold=jnp.float64(case["threshold_value"]),
            progress=progress,
        )
        return term(pairs).mean(), pairs

    policy = inputs["policy_chosen"], inputs["policy_rejected"]
    (value, pairs), slopes = jax.value_and_grad(losses, (0, 1), has_aux=True)(*policy)
    yield from close("losses", term(pairs), case["losses"], rtol=1e-6)
    yield from close("loss", value, case["loss"], rtol=1e-6)
    yield from close("margin", term.loss.records(pairs, **term.options), case["mixed_margin"], rtol=1e-6)
    yield from _kept(term, pairs, case["kept"])
    yield from close("gradient by chosen", slopes[0], case["dloss_dpolicy_chosen"], rtol=1e-6)
    yield from close("gradient by rejected", slopes[1], case["dloss_dpolicy_rejected"], rtol=1e-6)


def _thresholds(run: dict[str, Any]) -> Iterator[str]:
    window = Window(run["window"], run["threshold"])
    kept, found = window.start(), []
    read, take = jax.jit(window.read), jax.jit(window.take)
    one = jnp.zeros(1, jnp.int32), jnp.ones(1, bool)
    for margin in run["margins"]:
        found.append(float(read(kept)))
        kept = take(kept, jnp.asarray([margin], jnp.float64), *one)
    yield from close("threshold in force", found, run["threshold_in_force"], rtol=1e-6)


def _extrapolated(arrays: dict[str, np.ndarray], case: dict[str, Any], frozen: bool) -> Iterator[str]:
    term = _term(case, extrapolation=case["extrapolation"])
    labels = np.concatenate([arrays["labels/chosen"], arrays["labels/rejected"]])
    pairs, counted = len(labels) // 2, labels[:, 1:] != -100
    batch = {
        "predecessors": jnp.asarray(np.tile(np.arange(labels.shape[1] - 1), (2 * pairs, 1))),
        "labels": jnp.asarray(np.where(counted, labels[:, 1:], 0)),
        "label_branches": jnp.asarray(counted.astype(np.int32)),
    }
    both = {
        of: jnp.asarray(np.concatenate([arrays[f"logits/{of}_{side}"] for side in ("chosen", "rejected")]))
        for of in ("policy", "reference")
    }
    head = jnp.eye(both["policy"].shape[-1])
    sides = jnp.stack([jnp.arange(pairs), jnp.arange(pairs) + pairs], -1)[None]
    base = Hidden(both["reference"], head)

    def loss(logits: jax.Array) -> tuple[jax.Array, Pairs]:
        own, mix, mixed = Hidden(logits, head), term.needs.mixed, None
        if mix:
            more = extrapolated_scores(batch, own, base, mix.factor, mix.through, branches=1, frozen_head=frozen)
            policy, reference, mixed = more.logps, more.against, more.mixed.reshape(1, -1)
        else:
            policy = response_scores(batch, own, branches=1, frozen_head=frozen).logps
            reference = response_scores(batch, base, branches=1).logps
        policy, reference = policy.reshape(1, -1), reference.reshape(1, -1)
        threshold, progress = jnp.float32(case["threshold_value"]), jnp.float32(case["step"] / case["max_steps"])
        tokens = jnp.ones_like(policy)
        made = make_pairs(policy, reference, tokens, sides, mixed=mixed, threshold=threshold, progress=progress)
        return term(made).mean(), made

    (value, made), slope = jax.value_and_grad(loss, has_aux=True)(both["policy"])
    margins = term.loss.records(made, **term.options)
    yield from close("loss", value, case["loss"], atol=2e-6)
    yield from close("mixed margins", margins, case["mixed_margin_of_pairs"], atol=2e-6)
    yield from close("mean mixed margin", margins.mean(), case["mean_mixed_margin"], atol=2e-6)
    yield from close("mean margin", term.options["beta"] * made.margin.mean(), case["mean_margin"], atol=2e-6)
    yield from close("accuracy", (made.margin > 0).mean(), case["accuracy"], atol=1e-6)
    yield from _kept(term, made, case["kept"])
    for side, ours in zip(("chosen", "rejected"), np.split(np.asarray(slope), 2), strict=True):
        theirs = arrays[f"case{case['case']}/grad_policy_{side}_logits"]
        yield from close(f"gradient by logits of {side}", ours, theirs, atol=1e-7)


def _kept(term: Term, pairs: Pairs, theirs: list[bool]) -> Iterator[str]:
    trusted = term.loss.report(pairs, **term.options)["spa/trusted"]
    yield from same("trusted", [bool(x) for x in trusted], theirs)


def _term(case: dict[str, Any], **more: float) -> Term:
    (term,) = read_loss({"name": "spa", "beta": case["beta"], "alpha": case["alpha"], **more})
    return term
