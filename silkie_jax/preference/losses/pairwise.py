"""Losses of log-probabilities under policy and reference, each with its paper; vdpo.py and spa.py need more.

Each is a function of `Pairs` and its own options that returns the loss of each pair, [P]. A log-ratio is
log pi(y|x) - log pi_ref(y|x), summed over the labelled tokens of a response, as in Silkie; a reward is beta times it.
Most are in trl under the same name. Not here is trl's `aot`: it sorts the pairs of a forward pass, so that its value
would change with accumulation, packing and mesh.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from silkie_jax.preference.losses.divergences import Divergence, bounded_exp, compared
from silkie_jax.preference.losses.pairs import Pairs


def sigmoid(
    pairs: Pairs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Float[Array, "P"]:
    """DPO (arXiv 2305.18290, eq. 7); with label smoothing, conservative DPO (E. Mitchell, 2023).

    Under another divergence, f-DPO (arXiv 2309.16240).
    """
    return smoothed(beta * _margin(pairs, divergence, divergence_alpha), label_smoothing)


def sigmoid_norm(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Float[Array, "P"]:
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124, eq. 6): each log-ratio is divided by its response's tokens."""
    chosen = pairs.chosen_log_ratio / jnp.maximum(pairs.chosen_tokens, 1)
    rejected = pairs.rejected_log_ratio / jnp.maximum(pairs.rejected_tokens, 1)
    return smoothed(beta * (chosen - rejected), label_smoothing)


def ipo(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, "P"]:
    """IPO (arXiv 2310.12036, eq. 17), on summed log-probabilities as in the paper and in trl 0.7.2.

    Later versions of trl average them over tokens, which changes the meaning of beta.
    """
    return jnp.square(pairs.margin - 1 / (2 * beta))


def hinge(
    pairs: Pairs, *, beta: float = 0.1, divergence: Divergence = "reverse_kl", divergence_alpha: float = 0.5
) -> Float[Array, "P"]:
    """The hinge of SLiC-HF (arXiv 2305.10425, eq. 1) on the margin of DPO, as RSO does (arXiv 2309.06657, eq. 8)."""
    return jax.nn.relu(1 - beta * _margin(pairs, divergence, divergence_alpha))


def robust(
    pairs: Pairs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Float[Array, "P"]:
    """Robust DPO (arXiv 2403.00409, eq. 11): unbiased when a share `label_smoothing` of the preferences is flipped."""
    x, e = beta * _margin(pairs, divergence, divergence_alpha), label_smoothing
    return (-jax.nn.log_sigmoid(x) * (1 - e) + jax.nn.log_sigmoid(-x) * e) / (1 - 2 * e)


def exo_pair(
    pairs: Pairs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Float[Array, "P"]:
    """EXO of pairs (arXiv 2402.00856, eq. 16): the reverse KL of the policy's preference from (1 - e, e).

    e is the label smoothing, which must be above 0.
    """
    x, e = beta * _margin(pairs, divergence, divergence_alpha), label_smoothing
    won = jax.nn.sigmoid(x) * (jax.nn.log_sigmoid(x) - math.log1p(-e))
    return won + jax.nn.sigmoid(-x) * (jax.nn.log_sigmoid(-x) - math.log(e))


def discopop(
    pairs: Pairs,
    *,
    beta: float = 0.1,
    temperature: float = 0.05,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Float[Array, "P"]:
    """DiscoPOP, the log-ratio modulated loss (arXiv 2406.08414, eq. 5): logistic for margins below 0, else exponential.

    Not convex: around 0 it rises with the margin, by design of the search that found it.
    """
    x = beta * _margin(pairs, divergence, divergence_alpha)
    share = jax.nn.sigmoid(x / temperature)
    return -jax.nn.log_sigmoid(x) * (1 - share) + bounded_exp(-x) * share


def apo_zero(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, "P"]:
    """APO-zero (arXiv 2408.06266, eq. 7): chosen up, rejected down, for chosen responses better than the policy."""
    return 1 - jax.nn.sigmoid(beta * pairs.chosen_log_ratio) + jax.nn.sigmoid(beta * pairs.rejected_log_ratio)


def apo_down(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, "P"]:
    """APO-down (arXiv 2408.06266, eq. 8): both down, the rejected more, for a policy better than both responses."""
    return jax.nn.sigmoid(beta * pairs.chosen_log_ratio) + 1 - jax.nn.sigmoid(beta * pairs.margin)


def sppo_hard(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, "P"]:
    """SPPO (arXiv 2405.00675, eq. 4.7) where the chosen response wins for sure: P is 1 and 0, eta 1 / beta."""
    chosen = jnp.square(pairs.chosen_log_ratio - 1 / (2 * beta))
    return chosen + jnp.square(pairs.rejected_log_ratio + 1 / (2 * beta))


def nca_pair(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, "P"]:
    """NCA (arXiv 2402.05369) on pairs: holds the likelihood of the chosen response up, too."""
    chosen, rejected = beta * pairs.chosen_log_ratio, beta * pairs.rejected_log_ratio
    both = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - both / 2


def bco_pair(pairs: Pairs, *, beta: float = 0.1, shift: bool = True) -> Float[Array, "P"]:
    """BCO (arXiv 2404.04656): a classifier of chosen and rejected responses by their rewards above `delta`.

    delta is the mean reward of all responses of the pairs of the updates before this one (`bco_rewards`), 0 at the
    first. trl up to 0.x adds each forward pass to its mean before it is used, which makes a loss depend on how a step
    is accumulated; from 1.0 on it has no delta, which is `shift: false`.
    """
    delta = pairs.threshold if shift and pairs.threshold is not None else 0.0
    chosen, rejected = beta * pairs.chosen_log_ratio - delta, beta * pairs.rejected_log_ratio - delta
    return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)


def bco_rewards(pairs: Pairs, *, beta: float = 0.1, shift: bool = True) -> Float[Array, "P"]:
    """What the memory of `bco_pair` takes up of each pair: the mean of its two rewards."""
    return beta * (pairs.chosen_log_ratio + pairs.rejected_log_ratio) / 2


def sft(pairs: Pairs) -> Float[Array, "P"]:
    """The likelihood term of RPO (arXiv 2404.19733, eq. 1-2) and MPO (arXiv 2411.10442), in nats a token.

    -log pi(y_w|x) / |y_w|. DPO sees the difference of two log-ratios alone, which also grows while both fall; with so
    much of this beside it the loss of a pair is L_DPO + alpha L_NLL. A response that is chosen in several pairs counts
    in each of them; |y_w| counts labelled tokens.
    """
    return -pairs.policy_chosen / jnp.maximum(pairs.chosen_tokens, 1)


def smoothed(x: Float[Array, "P"], e: float) -> Float[Array, "P"]:
    """-log sigmoid(x), of which a share `e` sees the preference flipped."""
    return -jax.nn.log_sigmoid(x) * (1 - e) - jax.nn.log_sigmoid(-x) * e


def _margin(pairs: Pairs, divergence: Divergence, divergence_alpha: float) -> Float[Array, "P"]:
    if divergence == "reverse_kl":
        return pairs.margin
    chosen, rejected = compared(pairs, divergence, divergence_alpha)
    return chosen - rejected
