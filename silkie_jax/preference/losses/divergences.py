"""f-divergences in the place of the reverse KL between policy and reference (arXiv 2309.16240).

Under a divergence f the implicit reward of a response is beta f'(u), u = pi(y|x) / pi_ref(y|x). A loss
that compares log u of two responses compares f'(u) instead:

    reverse_kl   log u                       DPO
    forward_kl   1 - 1 / u
    js           log(2 u / (1 + u))          Jensen-Shannon
    alpha        (1 - u^-alpha) / alpha      between the first (alpha to 0) and the second (alpha 1)

trl from 1.0 on calls 1 - alpha `f_alpha_divergence_coef`.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from silkie_jax.preference.losses.pairs import Pairs

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
_MOST = 40.0  # exponent: whatever follows from e^40, its square too, stays finite in float32


def bounded_exp(x: Float[Array, "P"]) -> Float[Array, "P"]:
    """exp(x), but constant beyond e^40."""
    return jnp.exp(jnp.minimum(x, _MOST))


def compared(
    pairs: Pairs, divergence: Divergence, divergence_alpha: float
) -> tuple[Float[Array, "P"], Float[Array, "P"]]:
    """f'(u) of the chosen and of the rejected response."""

    def score(log_ratio: Float[Array, "P"]) -> Float[Array, "P"]:
        match divergence:
            case "reverse_kl":
                return log_ratio
            case "js":
                return math.log(2) + jax.nn.log_sigmoid(log_ratio)
        alpha = 1.0 if divergence == "forward_kl" else divergence_alpha
        return (1 - bounded_exp(-alpha * log_ratio)) / alpha

    return score(pairs.chosen_log_ratio), score(pairs.rejected_log_ratio)
