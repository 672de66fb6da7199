"""SPA (arXiv 2406.04412): DPO on labels that the model itself gave, some of which it distrusts.

D is DPO's margin and D' that of a model extrapolated beyond the policy, away from the reference (scores at each label
before the softmax, `extrapolation` the factor). A pair whose beta D' is not above a threshold is trusted less: with a
share alpha of the opposite label. The threshold follows the lowest `percentile` of the last `window` pairs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from silkie_jax.preference.losses.memory import Window
from silkie_jax.preference.losses.needs import REFERENCE, Mix, Needs
from silkie_jax.preference.losses.pairs import Pairs


def spa(
    pairs: Pairs,
    *,
    beta: float = 0.1,
    alpha: float = 0.1,
    percentile: float = 0.1,
    window: int = 200,
    begin: float = 0.2,
    extrapolation: float = 0.0,
) -> Float[Array, "P"]:
    """SPA's refined loss (arXiv 2406.04412, eq. 10-12): -(1 - a + a I) log sigmoid(z) - a (1 - I) log sigmoid(-z).

    z = beta D; I, 1 where beta D' is above the threshold, carries no gradient; a is 0 for the first share `begin` of
    the run's updates, then alpha. The release keeps a window of 50 on each of four devices: 200 here, on all together.
    """
    z, trusted = beta * pairs.margin, _trusted(pairs, beta)
    assert pairs.progress is not None
    a = jnp.where(pairs.progress < begin, 0.0, alpha)
    return -(1 - a + a * trusted) * jax.nn.log_sigmoid(z) - a * (1 - trusted) * jax.nn.log_sigmoid(-z)


def spa_needs(*, percentile: float, window: int, extrapolation: float, **_: object) -> Needs:
    """Scores of both models where it extrapolates, and its window."""
    mixed = Mix(REFERENCE, extrapolation, "nothing") if extrapolation else None
    return Needs(mixed=mixed, memory=Window(window, percentile), progress=True)


def spa_margins(pairs: Pairs, *, beta: float, **_: object) -> Float[Array, "P"]:
    """beta D', what the window takes up."""
    if pairs.mixed is None:
        return jax.lax.stop_gradient(beta * pairs.margin)
    chosen, rejected = pairs.mixed.chosen - pairs.reference_chosen, pairs.mixed.rejected - pairs.reference_rejected
    return jax.lax.stop_gradient(beta * (chosen - rejected))


def spa_report(pairs: Pairs, *, beta: float, **_: object) -> dict[str, Float[Array, "P"]]:
    """The share of pairs whose labels are trusted."""
    return {"spa/trusted": _trusted(pairs, beta)}


def _trusted(pairs: Pairs, beta: float) -> Float[Array, "P"]:
    assert pairs.threshold is not None
    return (spa_margins(pairs, beta=beta) > pairs.threshold).astype(pairs.policy_chosen.dtype)
