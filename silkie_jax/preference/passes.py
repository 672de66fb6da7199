"""The forward passes over a batch that its losses need, each made once, and no other.

The policy sees the rows with their own images, with gradients. Everything else is without: the reference with their own
images, and what a loss asks for beside (losses/needs.py), such as a guide's pass with the null image in every image's
place. Log-probabilities that are stored beside the corpus come with the rows and are not computed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.models.qwen_vl.null_image import null_features
from silkie_jax.nn.attention import Kernel
from silkie_jax.preference.forward import (
    Hidden,
    extrapolated_scores,
    hidden_states,
    image_features,
    response_scores,
)
from silkie_jax.preference.losses import POLICY, REFERENCE, Mix, Pass, Term, passes_of

STORED = {False: "reference_logps", True: "reference_null_logps"}
"""The arrays of a batch that hold the reference's stored log-probabilities: with own images, with the null image."""


class Models(NamedTuple):
    """Whose passes are made.

    still: the policy without gradients. reference: None where its log-probabilities are stored, or nobody needs them;
    `adapter` says whether it has one, `own_tower` whether it sees other features of an image than the policy does.
    """

    policy: QwenVL
    still: QwenVL
    reference: QwenVL | None
    adapter: bool
    own_tower: bool


class Found(NamedTuple):
    """Log-probabilities of each branch by pass, and extrapolated ones; how many labels greedy decoding would say."""

    logps: dict[Pass, Float[Array, "B K"]]
    mixed: dict[Mix, Float[Array, "B K"]]
    greedy: Float[Array, "B K"]


def encode_null_images(terms: Sequence[Term], models: Models) -> dict[str, Float[Array, "N 256 W"]]:
    """Features of the null images that passes need, by pass, of each draw: once a step, whatever its batches."""
    out = {}
    for one in passes_of(terms):
        model = models.reference if one.of == "reference" else models.still
        if one.image is not None and model is not None:
            out[str(one)] = jax.lax.stop_gradient(null_features(model, one.image))
    return out


def make_passes(
    terms: Sequence[Term],
    models: Models,
    rows: dict[str, Array],
    nulls: dict[str, Float[Array, "N 256 W"]],
    *,
    branches: int,
    wrap: Callable,
    kernel: Kernel,
    frozen_head: bool,
) -> Found:
    """All that `terms` read of a batch; the policy's own pass alone where there are none."""
    features = image_features(models.policy, rows, wrap, kernel)
    run = partial(hidden_states, batch=rows, wrap=wrap, kernel=kernel, frozen_head=frozen_head)
    score = partial(response_scores, rows, branches=branches, frozen_head=frozen_head)
    policy = run(models.policy, features=features, adapter=True)
    if not terms:
        scores = score(policy)
        return Found({POLICY: scores.logps}, {}, scores.greedy)

    def hidden(one: Pass) -> list[Hidden]:
        """Of each draw of the null image, or the only one."""
        if one == POLICY:
            return [Hidden(*map(jax.lax.stop_gradient, policy))]
        model, adapter = models.still, True
        if one.of == "reference":
            assert models.reference is not None
            model, adapter = models.reference, models.adapter
        seen = features
        if one == REFERENCE and models.own_tower:
            seen = image_features(model, rows, wrap, kernel)
        draws = [seen]
        if one.image is not None and features is not None:
            draws = [jnp.broadcast_to(x.astype(features.dtype), features.shape) for x in nulls[str(one)]]
        draws = [x if x is None else jax.lax.stop_gradient(x) for x in draws]
        return [run(model, features=x, adapter=adapter) for x in draws]

    def stands_for(one: Pass) -> Pass:
        """Where no row has an image the null image changes nothing."""
        return Pass(one.of) if features is None else one

    logps: dict[Pass, Array] = {}
    mixed: dict[Mix, Array] = {}
    greedy = None
    for mix in dict.fromkeys(term.needs.mixed for term in terms if term.needs.mixed):
        (against,) = hidden(stands_for(mix.against))
        found = extrapolated_scores(
            rows, policy, against, mix.factor, mix.through, branches=branches, frozen_head=frozen_head
        )
        logps |= {POLICY: found.logps, mix.against: found.against}
        mixed[mix], greedy = found.mixed, found.greedy
    if greedy is None:
        scores = score(policy)
        logps[POLICY], greedy = scores.logps, scores.greedy
    for one in (REFERENCE, *passes_of(terms)):
        same = stands_for(one)
        if one in logps:
            continue
        if one.of == "reference" and models.reference is None:
            logps[one] = rows[STORED[one.image is not None]]
        elif same in logps:
            logps[one] = logps[same]
        else:
            draws = [score(x).logps for x in hidden(same)]
            logps[one] = sum(draws[1:], draws[0]) / len(draws)
        logps[one] = jax.lax.stop_gradient(logps[one])
    return Found(logps, mixed, greedy)
