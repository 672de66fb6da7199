"""The one attention function, the masks of the row layout, and the kernels that can do it."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from silkie_jax.nn.flash import flash_attention
from silkie_jax.nn.precision import precision

PADDING = -1  # the branch of a padding token
PROMPT = 0  # the branch of the prompt; responses are 1..63
# Rows that are packed one after the other in one sequence add 0, 64, 128, ... to their branches. A power of two.
ROW = 64

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""From queries, keys and values [B, T, H, D] to what the queries get."""


def branch_mask(branches: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Who sees whom: a token sees its row's prompt and its own branch, up to itself.

    `branches` is 0 for the prompt, k for response k, -1 for padding. With b = [0 0 1 1 2 -1]:

        query \\ key   0 0 1 1 2 -
        prompt        x
        prompt        x x
        branch 1      x x x
        branch 1      x x x x
        branch 2      x x . . x         branch 2 does not see branch 1
        padding       . . . . . .       never seen, and what comes of it does not matter

    One sequence is the special case of zeros: the causal mask. Padding may stand on either side. In a packed sequence,
    [0 0 1 | 64 64 65], the second row (prompt 64, branch 65) does not see the first.
    """
    index = jnp.arange(branches.shape[1])
    causal = index[:, None] >= index[None, :]
    return causal & _visible(branches[:, :, None], branches[:, None, :])


def _visible(query: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
    """The rule of `branch_mask` without the order of the tokens."""
    return (key != PADDING) & ((key == query) | (key == query & -ROW))  # the row's prompt: without the last bits


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S H D"],
    v: Float[Array, "B S H D"],
    mask: Bool[Array, "B T S"] | None = None,
) -> Float[Array, "B T H D"]:
    """softmax(q k^T / sqrt(D)) v, the softmax in float32. A query that sees nothing gets finite nonsense."""
    with jax.default_matmul_precision("highest" if precision(q.dtype) is not None else "default"):
        return jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None])


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How whole rows and images attend.

    Attributes:
        name: `plain`, the function above, is what holds everywhere. `flash` is one pass in Pallas for TPU and GPU
            (flash.py), `cudnn` NVIDIA's and `tokamax` the one in Mosaic of the library of that name, both for bfloat16
            on NVIDIA's GPUs: none of the three ever holds [T, T] scores.
        platform: of the devices, `tpu` or `gpu` ('interpret': any, slowly).
        most: the largest blocks that `flash` may take (flash.py); None: those that are best on the platform.
        mesh, batch, heads: where arrays lie, and which axes of the mesh split rows and heads; None: on one device.
    """

    name: str = "plain"
    platform: str = "interpret"
    mesh: Mesh | None = None
    batch: tuple[str, ...] = ()
    heads: str | None = None
    most: tuple[int, int] | None = None

    def among(self, branches: Int[Array, "B T"]) -> Attend:
        """Attention of rows with these branches, the same for all layers."""
        if self._own:
            return partial(self._each, branches=branches)
        return partial(self._whole, mask=branch_mask(branches))

    def everywhere(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Attention in which every query sees every key."""
        return self._each(q, k, v) if self._own else self._whole(q, k, v)

    @property
    def _own(self) -> bool:
        """XLA cannot see into it and would gather everything for it: each device attends for its own part."""
        return self.name in ("flash", "tokamax")

    def spec(self, heads: int) -> tuple[tuple[str, ...], None, str | None]:
        """The mesh axes of arrays [B, T, H, ...]: heads are whole where the mesh does not divide them."""
        assert self.mesh is not None
        return self.batch, None, self.heads if self.heads and heads % self.mesh.shape[self.heads] == 0 else None

    def _whole(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        if self.name == "cudnn":
            mask = None if mask is None else mask[:, None]
            return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
        return attention(q, k, v, mask)

    def _each(self, q: jax.Array, k: jax.Array, v: jax.Array, branches: jax.Array | None = None) -> jax.Array:
        visible = None if branches is None else _visible

        def local(q: jax.Array, k: jax.Array, v: jax.Array, branches: jax.Array | None) -> jax.Array:
            if self.name == "tokamax":
                return _tokamax(q, k, v, branches, self.platform)
            return flash_attention(q, k, v, branches, visible, platform=self.platform, most=self.most)

        if self.mesh is None:
            return local(q, k, v, branches)
        # A mesh of one device still tells Pallas what that device is, where it is not there.
        part, ids = PartitionSpec(*self.spec(q.shape[2])), PartitionSpec(self.batch)
        specs = (part, part, part, None if branches is None else ids)
        split = jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=part, check_vma=False)
        return split(q, k, v, branches)


def _tokamax(q: jax.Array, k: jax.Array, v: jax.Array, branches: jax.Array | None, platform: str) -> jax.Array:
    """Attention by tokamax: on a GPU its kernel, elsewhere what it takes for the truth."""
    import tokamax  # an extra

    mask = None
    if branches is not None:
        # Padding sees itself, for a query that sees nothing may get NaN.
        itself = jnp.eye(branches.shape[1], dtype=bool)
        mask = (branch_mask(branches) | itself)[:, None]
    way = "mosaic_gpu" if platform == "gpu" else "xla"
    return tokamax.dot_product_attention(q, k, v, mask=mask, implementation=way)


PLAIN = Kernel()
