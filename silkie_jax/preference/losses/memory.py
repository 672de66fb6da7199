"""What a loss remembers from step to step, as arrays of the train state: checkpointed, and the same on every host.

A memory takes up the values of a step's pairs AFTER its update, and what it says is in force from the next step on: one
number a step, which therefore does not depend on how the step's rows were accumulated, packed or spread over a mesh.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Kept = dict[str, Array]


class Memory(Protocol):
    """How a loss remembers."""

    def start(self) -> Kept:
        """Of a run that has done nothing."""
        ...

    def read(self, kept: Kept) -> Float[Array, ""]:
        """The number in force."""
        ...

    def take(self, kept: Kept, values: Float[Array, "N"], order: Int[Array, "N"], valid: Bool[Array, "N"]) -> Kept:
        """After a step whose valid pairs had these values; `order` numbers those from 0, in the order of the rows."""
        ...


@dataclasses.dataclass(frozen=True)
class Window:
    """The last `size` values, and a threshold near their lowest `percentile` (SPA's release: confidence_update).

    Of all sorted, the mean of entries int(size x percentile) and the next one, from 0; 0 until `size` were taken.
    """

    size: int
    percentile: float

    def start(self) -> Kept:
        return {"values": jnp.zeros(self.size), "count": jnp.int32(0)}

    def read(self, kept: Kept) -> Float[Array, ""]:
        ranked, low = jnp.sort(kept["values"]), int(self.size * self.percentile)
        threshold = (ranked[low] + ranked[min(low + 1, self.size - 1)]) / 2
        return jnp.where(kept["count"] >= self.size, threshold, 0)

    def take(self, kept: Kept, values: Float[Array, "N"], order: Int[Array, "N"], valid: Bool[Array, "N"]) -> Kept:
        more = valid.sum(dtype=jnp.int32)
        # The latest of a step that has more pairs than the window; what is beyond its end is dropped.
        place = jnp.where(valid & (order >= more - self.size), (kept["count"] + order) % self.size, self.size)
        values = jax.lax.stop_gradient(values).astype(kept["values"].dtype)
        return {"values": kept["values"].at[place].set(values, mode="drop"), "count": kept["count"] + more}


@dataclasses.dataclass(frozen=True)
class RunningMean:
    """The mean of all values of the run so far; 0 before the first."""

    def start(self) -> Kept:
        return {"mean": jnp.zeros(()), "count": jnp.int32(0)}

    def read(self, kept: Kept) -> Float[Array, ""]:
        return kept["mean"]

    def take(self, kept: Kept, values: Float[Array, "N"], order: Int[Array, "N"], valid: Bool[Array, "N"]) -> Kept:
        more = valid.sum(dtype=jnp.int32)
        count = kept["count"] + more
        gone = jnp.where(valid, jax.lax.stop_gradient(values) - kept["mean"], 0).sum()
        return {"mean": kept["mean"] + gone / jnp.maximum(count, 1), "count": count}
