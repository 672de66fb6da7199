"""What a loss sees: summed log-probabilities of chosen and rejected responses."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Sides(NamedTuple):
    """Something of both responses of each pair."""

    chosen: Float[Array, "P"]
    rejected: Float[Array, "P"]


class Pairs(NamedTuple):
    """Log-probabilities summed over labelled tokens, and how many those were, for chosen and rejected responses.

    What only some losses need is None for the others (table.py: Needs):

      null: of the guide, under the null image in place of the response's own.
      mixed: under scores extrapolated at each label before the softmax.
      threshold: what the loss's memory says, the same for all pairs of a step.
      progress: the share of the run's updates that is done.
    """

    policy_chosen: Float[Array, "P"]
    policy_rejected: Float[Array, "P"]
    reference_chosen: Float[Array, "P"]
    reference_rejected: Float[Array, "P"]
    chosen_tokens: Float[Array, "P"]
    rejected_tokens: Float[Array, "P"]
    null: Sides | None = None
    mixed: Sides | None = None
    threshold: Float[Array, ""] | None = None
    progress: Float[Array, ""] | None = None

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
    null: Float[Array, "B K"] | None = None,
    mixed: Float[Array, "B K"] | None = None,
    threshold: Float[Array, ""] | None = None,
    progress: Float[Array, ""] | None = None,
) -> Pairs:
    """The pairs of all rows in one list: a row of K branches gives all its pairs from K log-probabilities."""

    def both(values: Float[Array, "B K"]) -> Sides:
        return Sides(*(jnp.take_along_axis(values, pairs[..., side], axis=1).reshape(-1) for side in (0, 1)))

    return Pairs(
        *both(policy),
        *both(reference),
        *both(tokens),
        null=None if null is None else both(null),
        mixed=None if mixed is None else both(mixed),
        threshold=threshold,
        progress=progress,
    )
