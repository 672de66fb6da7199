"""V-DPO: losses and gradients by policy logits, of response pairs and image pairs, in both forms and both gradients."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from silkie_jax.preference.forward import Hidden, extrapolated_scores, response_scores
from silkie_jax.preference.losses import Term, make_pairs, read_loss
from tests.related.differences import close

Arrays = dict[str, np.ndarray]


def response_pairs(folder: Path) -> Iterator[str]:
    """vdpo: the release's gradient, the responses of a pair differ."""
    yield from _cases(folder, "vdpo", "vdpo", "release")


def image_pairs(folder: Path) -> Iterator[str]:
    """vdpo_image_contrast: one text under two images."""
    yield from _cases(folder, "vdpo_image_contrast", "vdpo_image_contrast", "release")


def paper_form(folder: Path) -> Iterator[str]:
    """vdpo_paper_form: the paper's gradient, on the inputs of vdpo."""
    yield from _cases(folder, "vdpo_paper_form", "vdpo", "paper")


def _cases(folder: Path, name: str, inputs: str, gradient: str) -> Iterator[str]:
    cases = json.loads((folder / f"{name}.json").read_text())["cases"]
    with np.load(folder / f"{inputs}.npz") as file:
        given = dict(file)
    with np.load(folder / f"{name}.npz") as file:
        expected = dict(file)
    for case in cases:
        what = f"case {case['case']}"
        options = {
            "name": "vdpo",
            "beta": case["beta"],
            "label_smoothing": case["smoothing"],
            "gamma": case["gamma"],
            "guide": "policy" if case["dynamic"] else "reference",
            "form": "normalised" if case["use_logits"] else "product",
            "gradient": gradient,
        }
        (term,) = read_loss(options)
        for frozen in (False, True) if case["use_logits"] else (case["case"] % 2 == 0,):
            loss, found, slope = _run(given, term, frozen)
            head = f"{what}, {'frozen' if frozen else 'trained'} head"
            yield from close(f"{head}: loss", loss, case["loss"], atol=2e-6)
            theirs = expected[f"case{case['case']}/grad_policy_logits"]
            yield from close(f"{head}: gradient by policy logits", slope, theirs, atol=1e-7)
            for ours, key in found.items():
                if key in case:
                    yield from close(f"{head}: {ours[0]}", ours[1], case[key], rtol=1e-6, atol=2e-6)


def _run(given: Arrays, term: Term, frozen: bool) -> tuple[float, dict[tuple[str, float], str], np.ndarray]:
    """The loss, what is reported with it, and the gradient by the policy's logits, which stand for hidden states."""
    labels = given["labels"]
    pairs, length = len(labels) // 2, labels.shape[1]
    counted = labels[:, 1:] != -100
    batch = {
        "predecessors": jnp.asarray(np.tile(np.arange(length - 1), (2 * pairs, 1))),
        "labels": jnp.asarray(np.where(counted, labels[:, 1:], 0)),
        "label_branches": jnp.asarray(counted.astype(np.int32)),
    }
    vocabulary = given["logits/policy"].shape[-1]
    head = jnp.eye(vocabulary)
    guide = f"{term.options['guide']}_null"

    def summed(name: str) -> jax.Array:
        return response_scores(batch, Hidden(jnp.asarray(given[f"logits/{name}"]), head), branches=1).logps

    reference, null = summed("reference"), summed(guide)
    sides = jnp.stack([jnp.arange(pairs), jnp.arange(pairs) + pairs], -1)[None]

    def loss(logits: jax.Array) -> tuple[jax.Array, Any]:
        own, mixed = Hidden(logits, head), None
        if term.needs.mixed:
            mix = term.needs.mixed
            other = Hidden(jnp.asarray(given[f"logits/{guide}"]), head)
            more = extrapolated_scores(batch, own, other, mix.factor, mix.through, branches=1, frozen_head=frozen)
            policy, mixed = more.logps, more.mixed
        else:
            policy = response_scores(batch, own, branches=1, frozen_head=frozen).logps
        tokens = jnp.ones_like(policy)
        arrays = [None if x is None else x.reshape(1, -1) for x in (policy, reference, tokens, null, mixed)]
        made = make_pairs(*arrays[:3], sides, *arrays[3:])
        return term(made).mean(), made

    (value, made), slope = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(given["logits/policy"]))
    beta = term.options["beta"]
    found = {
        ("reward of chosen", float(beta * made.chosen_log_ratio.mean())): "better_rewards",
        ("reward of rejected", float(beta * made.rejected_log_ratio.mean())): "worse_rewards",
        ("margin", float(beta * made.margin.mean())): "rewards_margin",
        ("accuracy", float((made.margin > 0).mean())): "accuracy",
    }
    reports = {"images/chosen": "image_contribution_better", "images/rejected": "image_contribution_worse"}
    report = term.loss.report(made, **term.options)
    found |= {(name, float(report[name].mean())): key for name, key in reports.items() if name in report}
    return float(value), found, np.asarray(slope)
