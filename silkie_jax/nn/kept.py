"""Keys and values that are kept while sequences grow, and the attention of a new token to them.

B slots of C places, one pair of arrays a layer. How the arrays lie follows from who reads them: cuDNN wants
[B, C, H, D]; XLA's own products are quickest (on a CPU 10 times) where a slot's keys are a matrix that a query
multiplies from the left, [B, H, D, C], and its values one that probabilities do, [B, H, C, D].
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Int

from silkie_jax.nn.attention import PLAIN, Kernel
from silkie_jax.nn.precision import precision


class Kept(NamedTuple):
    """One layer's keys and values of all slots, as a `Keeper` lays them out."""

    k: Float[Array, "B ..."]
    v: Float[Array, "B ..."]


@dataclass(frozen=True)
class Keeper:
    """How keys and values are kept and read: `plain` anywhere, `cudnn` on NVIDIA GPUs in bfloat16.

    cuDNN reads a slot up to its own place, the plain path all of it.
    """

    kernel: Kernel = PLAIN

    @property
    def rows(self) -> bool:
        return self.kernel.name == "cudnn"

    def shardings(self, heads: int) -> Kept:
        """Where a layer's arrays lie: slots over the batch axes of the mesh, heads over its tensor axis."""
        if self.kernel.mesh is None:
            where: Sharding = SingleDeviceSharding(jax.devices()[0])
            return Kept(where, where)  # type: ignore[arg-type]
        batch, middle, head = self.kernel.spec(heads)
        spec = PartitionSpec(batch, middle, head) if self.rows else PartitionSpec(batch, head)
        where = NamedSharding(self.kernel.mesh, spec)
        return Kept(where, where)  # type: ignore[arg-type]

    def empty(self, slots: int, places: int, heads: int, width: int, dtype: jnp.dtype) -> Kept:
        """Arrays of zeros."""
        if self.rows:
            shape = (slots, places, heads, width)
            return Kept(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        return Kept(jnp.zeros((slots, heads, width, places), dtype), jnp.zeros((slots, heads, places, width), dtype))

    def keep_prompts(
        self, kept: Kept, k: Float[Array, "R T H D"], v: Float[Array, "R T H D"], slots: Int[Array, "R"]
    ) -> Kept:
        """The first T places of some slots; a slot beyond the last one is dropped."""
        length = k.shape[1]
        if self.rows:
            return Kept(*(old.at[slots, :length].set(new, mode="drop") for old, new in ((kept.k, k), (kept.v, v))))
        return Kept(
            kept.k.at[slots, :, :, :length].set(k.transpose(0, 2, 3, 1), mode="drop"),
            kept.v.at[slots, :, :length].set(v.transpose(0, 2, 1, 3), mode="drop"),
        )

    def keep_tokens(
        self, kept: Kept, k: Float[Array, "B 1 H D"], v: Float[Array, "B 1 H D"], places: Int[Array, "B"]
    ) -> Kept:
        """One place of every slot; a place beyond the last one is dropped."""
        each = jnp.arange(k.shape[0])
        if self.rows:
            return Kept(*(old.at[each, places].set(new[:, 0], mode="drop") for old, new in ((kept.k, k), (kept.v, v))))
        return Kept(
            kept.k.at[each, :, :, places].set(k[:, 0], mode="drop"),
            kept.v.at[each, :, places].set(v[:, 0], mode="drop"),
        )

    def attend(self, q: Float[Array, "B 1 H D"], kept: Kept, places: Int[Array, "B"]) -> Float[Array, "B 1 H D"]:
        """Attention of one query a slot to what is kept of it up to and with its own place."""
        if not self.rows:
            return _plain(q, kept, places)
        if self.kernel.mesh is None:
            return _cudnn(q, kept, places)
        # XLA would gather everything for it: each device attends for its own part.
        part = PartitionSpec(*self.kernel.spec(q.shape[2]))
        specs = (part, Kept(part, part), PartitionSpec(self.kernel.batch))  # type: ignore[arg-type]
        split = jax.shard_map(_cudnn, mesh=self.kernel.mesh, in_specs=specs, out_specs=part, check_vma=False)
        return split(q, kept, places)


def _plain(q: Float[Array, "B 1 H D"], kept: Kept, places: Int[Array, "B"]) -> Float[Array, "B 1 H D"]:
    exact = precision(q.dtype)
    scores = jnp.einsum("bhd,bhdc->bhc", q[:, 0], kept.k, precision=exact, preferred_element_type=jnp.float32)
    seen = jnp.arange(kept.v.shape[2]) <= places[:, None, None]
    p = jax.nn.softmax(jnp.where(seen, scores / math.sqrt(q.shape[-1]), -jnp.inf), axis=-1).astype(q.dtype)
    return jnp.einsum("bhc,bhcd->bhd", p, kept.v, precision=exact)[:, None]


def _cudnn(q: Float[Array, "B 1 H D"], kept: Kept, places: Int[Array, "B"]) -> Float[Array, "B 1 H D"]:
    lengths = jnp.minimum(places + 1, kept.k.shape[1])
    return jax.nn.dot_product_attention(
        q,
        kept.k,
        kept.v,
        query_seq_lengths=jnp.ones_like(lengths),
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
