"""V-DPO (arXiv 2411.02712): DPO whose reward asks how much the picture mattered.

Write lp(y|v) for a response's log-probability with its image, lp(y|0) with the null image, and k = gamma - 1. The
policy is guided away from what a guide says without the picture:

    f(y) = lp(y|v) + k (lp(y|v) - lp_guide(y|0)) - lp_ref(y|v)
    loss = -log sigmoid(beta (f(chosen) - f(rejected)))

Each side has its own image: of two responses to one picture, of one text under two pictures, or of both.
"""

from typing import Literal

import jax
from jaxtyping import Array, Float

from silkie_jax.models.qwen_vl.null_image import Kind, NullImage
from silkie_jax.preference.logprobs import Through, extrapolate
from silkie_jax.preference.losses.needs import Mix, Needs, Pass
from silkie_jax.preference.losses.pairs import Pairs
from silkie_jax.preference.losses.pairwise import smoothed

_THROUGH: dict[str, Through] = {"paper": "base", "release": "all"}


def vdpo(
    pairs: Pairs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    gamma: float = 0.75,
    guide: Literal["policy", "reference"] = "reference",
    null_image: Kind = "mean",
    draws: int = 1,
    form: Literal["product", "normalised"] = "product",
    gradient: Literal["paper", "release"] = "paper",
) -> Float[Array, "P"]:
    """V-DPO (arXiv 2411.02712, eq. 9-11). gamma 1 is DPO.

    The paper stops the gradient of the whole guidance k (...), its release only of the null part, so that its gradient
    is gamma times the paper's, and nothing at gamma 0. In `form: normalised` (eq. 11) the guidance is of the scores at
    each label, before the softmax.
    """
    if gamma == 1:
        return smoothed(beta * pairs.margin, label_smoothing)
    if form == "normalised":
        assert pairs.mixed is not None
        chosen, rejected = pairs.mixed
    else:
        assert pairs.null is not None
        chosen = extrapolate(pairs.policy_chosen, pairs.null.chosen, gamma - 1, _THROUGH[gradient])
        rejected = extrapolate(pairs.policy_rejected, pairs.null.rejected, gamma - 1, _THROUGH[gradient])
    margin = (chosen - pairs.reference_chosen) - (rejected - pairs.reference_rejected)
    return smoothed(beta * margin, label_smoothing)


def vdpo_needs(
    *,
    gamma: float,
    guide: Literal["policy", "reference"],
    null_image: Kind,
    draws: int,
    form: str,
    gradient: str,
    **_: object,
) -> Needs:
    """The guide's pass under the null image; none where gamma is 1."""
    if gamma == 1:
        return Needs()
    null = Pass(guide, NullImage(null_image, draws))
    return Needs(null, Mix(null, gamma - 1, _THROUGH[gradient]) if form == "normalised" else None)


def vdpo_mend(*, null_image: str, draws: int, form: str, **_: object) -> str | None:
    """What is wrong with options that are sound by themselves."""
    if draws > 1 and null_image != "noise":
        return (
            f"draws is {draws}, but null_image {null_image} is always the same; set draws to 1 or null_image to noise"
        )
    if draws > 1 and form == "normalised":
        return f"draws is {draws}, but form normalised has one null image; set draws to 1 or form to product"
    return None


def vdpo_report(pairs: Pairs, *, guide: str, **_: object) -> dict[str, Float[Array, "P"]]:
    """How much the picture counts for the policy, lp(y|v) - lp(y|0), where it is the guide."""
    if pairs.null is None or guide != "policy":
        return {}
    chosen, rejected = pairs.policy_chosen - pairs.null.chosen, pairs.policy_rejected - pairs.null.rejected
    return {"images/chosen": jax.lax.stop_gradient(chosen), "images/rejected": jax.lax.stop_gradient(rejected)}
