"""Preference losses over pairs of responses.

Each loss is one function of `Pairs` and `LossOptions` that returns the loss of each pair, [P]; its entry in `LOSSES`
is its name in a config. Adding one is adding a function. `log_ratio` is log pi(y|x) - log pi_ref(y|x), summed over the
labelled tokens of a response, as in Silkie.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from silkie_jax.errors import UserError


class Pairs(NamedTuple):
    """Log-probabilities summed over labelled tokens, and how many those were, for chosen and rejected responses."""

    policy_chosen: Float[Array, "P"]
    policy_rejected: Float[Array, "P"]
    reference_chosen: Float[Array, "P"]
    reference_rejected: Float[Array, "P"]
    chosen_tokens: Float[Array, "P"]
    rejected_tokens: Float[Array, "P"]

    @property
    def chosen_log_ratio(self) -> Float[Array, "P"]:
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_log_ratio(self) -> Float[Array, "P"]:
        return self.policy_rejected - self.reference_rejected

    @property
    def margin(self) -> Float[Array, "P"]:
        """h of the IPO paper; beta times it is the reward margin of DPO."""
        return self.chosen_log_ratio - self.rejected_log_ratio

    @property
    def labels(self) -> Float[Array, "P"]:
        """Of both responses."""
        return self.chosen_tokens + self.rejected_tokens


def make_pairs(
    policy: Float[Array, "B K"],
    reference: Float[Array, "B K"],
    tokens: Float[Array, "B K"],
    pairs: Int[Array, "B P 2"],
) -> Pairs:
    """The pairs of all rows in one list: a row of K branches gives all its pairs from K log-probabilities."""

    def pick(values: Float[Array, "B K"], side: int) -> Float[Array, "B*P"]:
        return jnp.take_along_axis(values, pairs[..., side], axis=1).reshape(-1)

    return Pairs(*(pick(values, side) for values in (policy, reference, tokens) for side in (0, 1)))


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What losses depend on.

    Attributes:
        beta: strength of the pull to the reference.
        label_smoothing: assumed share of flipped preferences.
        sft_weight: of the likelihood of the chosen response, beside any of the losses (`chosen_nll`).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0


def sigmoid(pairs: Pairs, options: LossOptions) -> Float[Array, "P"]:
    """DPO (arXiv 2305.18290, eq. 7); with label smoothing, conservative DPO (E. Mitchell, 2023)."""
    return _smoothed(options.beta * pairs.margin, options.label_smoothing)


def sigmoid_norm(pairs: Pairs, options: LossOptions) -> Float[Array, "P"]:
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124, eq. 6): each log-ratio is divided by its response's tokens."""
    chosen = pairs.chosen_log_ratio / jnp.maximum(pairs.chosen_tokens, 1)
    rejected = pairs.rejected_log_ratio / jnp.maximum(pairs.rejected_tokens, 1)
    return _smoothed(options.beta * (chosen - rejected), options.label_smoothing)


def ipo(pairs: Pairs, options: LossOptions) -> Float[Array, "P"]:
    """IPO (arXiv 2310.12036, eq. 17), on summed log-probabilities as in the paper and in trl 0.7.2.

    Later versions of trl average them over tokens, which changes the meaning of beta.
    """
    return jnp.square(pairs.margin - 1 / (2 * options.beta))


def hinge(pairs: Pairs, options: LossOptions) -> Float[Array, "P"]:
    """The hinge of SLiC-HF (arXiv 2305.10425, eq. 1) on the margin of DPO, as RSO does (arXiv 2309.06657, eq. 8)."""
    return jax.nn.relu(1 - options.beta * pairs.margin)


def robust(pairs: Pairs, options: LossOptions) -> Float[Array, "P"]:
    """Robust DPO (arXiv 2403.00409, eq. 11): unbiased when a share `label_smoothing` of the preferences is flipped."""
    x, e = options.beta * pairs.margin, options.label_smoothing
    return (-jax.nn.log_sigmoid(x) * (1 - e) + jax.nn.log_sigmoid(-x) * e) / (1 - 2 * e)


def chosen_nll(pairs: Pairs) -> Float[Array, "P"]:
    """The likelihood term of RPO (arXiv 2404.19733, eq. 1-2), in nats a token: -log pi(y_w|x) / |y_w|.

    DPO sees the difference of two log-ratios alone, which also grows while both fall. With this term the loss of a
    pair is L_DPO + alpha L_NLL, alpha being `LossOptions.sft_weight`. A response that is chosen in several pairs counts
    in each of them; |y_w| counts labelled tokens.
    """
    return -pairs.policy_chosen / jnp.maximum(pairs.chosen_tokens, 1)


def _smoothed(x: Float[Array, "P"], e: float) -> Float[Array, "P"]:
    return -jax.nn.log_sigmoid(x) * (1 - e) - jax.nn.log_sigmoid(-x) * e


Loss = Callable[[Pairs, LossOptions], Float[Array, "P"]]
LOSSES: dict[str, Loss] = {f.__name__: f for f in (sigmoid, sigmoid_norm, ipo, hinge, robust)}
_SMOOTHED = ("sigmoid", "sigmoid_norm", "robust")


def check_loss(name: str, options: LossOptions) -> None:
    """Refuses unknown losses and options that the loss would ignore or that have no meaning in it."""
    if name not in LOSSES:
        raise UserError(f"loss: {name!r} is unknown; choose one of {', '.join(LOSSES)}")
    if not 0 < options.beta < math.inf:
        raise UserError(f"beta must be positive, not {options.beta}")
    if not 0 <= options.label_smoothing < 0.5:
        raise UserError(f"label_smoothing must be in [0, 0.5), not {options.label_smoothing}")
    if not 0 <= options.sft_weight < math.inf:
        raise UserError(f"sft_weight must be at least 0 and finite, not {options.sft_weight}")
    if options.label_smoothing and name not in _SMOOTHED:
        raise UserError(f"label_smoothing has no meaning in loss {name!r}; set it to 0 or use {' or '.join(_SMOOTHED)}")
