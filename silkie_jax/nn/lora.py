"""A linear layer with an optional low-rank adapter (LoRA, arXiv 2106.09685), its own weight perhaps in 8 bits."""

import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from silkie_jax.errors import UserError
from silkie_jax.nn.precision import precision
from silkie_jax.nn.quantize import METHODS, encode_array, product

LINEAR = "linear"  # checkpoint name of what linear layers give


class Linear(nnx.Module):
    """y = x W^T + b, plus ((alpha / rank) x A^T) B^T where an adapter is attached.

    Weights keep PyTorch's orientation, [*out, in], so that conversion copies bytes. `out` may have several
    dimensions: [3, heads * head_dim] for a fused query-key-value projection lets the heads be sharded.
    `axes` names the logical axes of the weight; sharding reads them (hardware/mesh.py).
    """

    def __init__(
        self,
        inputs: int,
        out: Sequence[int],
        axes: tuple[str | None, ...],
        *,
        bias: bool = True,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.normal(0.02)
        self.weight = nnx.Param(init(rngs.params(), (*out, inputs), dtype), axes=axes)
        self.bias = nnx.data(nnx.Param(jnp.zeros(tuple(out), dtype), axes=axes[:-1]) if bias else None)
        self.scale = nnx.data(None)  # [*out], where `weight` holds codes (nn/quantize.py)
        self.lora_a = nnx.data(None)  # [rank, in]
        self.lora_b = nnx.data(None)  # [*out, rank]
        self.lora_scale = 0.0

    def __call__(self, x: Float[Array, "... I"], adapter: bool = True) -> Float[Array, "... O"]:
        """Computes in the type of `x`. `adapter=False` is the base layer, whatever is attached."""
        weight = self.weight[...]
        y = _contract(x, weight) if self.scale is None else product(x, weight, self.scale[...])
        if adapter and self.lora_a is not None:
            # Scaled where it is narrow: the sum is then one matrix product that adds to another.
            low = _contract(x, self.lora_a[...]) * jnp.asarray(self.lora_scale, x.dtype)
            # Kept too: it is a hundredth of the sum, and the gradient of B would otherwise read all of x once more.
            y = y + _contract(checkpoint_name(low, LINEAR), self.lora_b[...])
        # After both products: before the second one it would be written out for that one to add to.
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        # Named, so that rematerialisation may keep the sum alone, and not also each of the products it is made of.
        return checkpoint_name(y, LINEAR)

    def quantize(self, method: str = "int8") -> None:
        """Codes and scales (nn/quantize.py) take the weight's place; it can no longer be trained."""
        axes = self.weight.axes
        codes, scale = encode_array(self.weight[...], METHODS[method])
        self.weight, self.scale = nnx.Param(codes, axes=axes), nnx.Param(scale, axes=axes[:-1])


def _contract(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tensordot(x, w.astype(x.dtype), axes=(-1, -1), precision=precision(x.dtype))


def linears(module: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """Every linear layer below `module` with its dotted path."""
    for path, node in nnx.iter_graph(module):
        if isinstance(node, Linear):
            yield ".".join(map(str, path)), node


def matches(name: str, targets: Iterable[str]) -> bool:
    """PEFT's rule: a target is a module's whole path or its end."""
    return any(name == t or name.endswith("." + t) for t in targets)


def add_lora(
    model: nnx.Module,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    *,
    rngs: nnx.Rngs,
    dtype: jnp.dtype = jnp.float32,
    scale: float | None = None,
) -> None:
    """Attaches adapters to the decoder's linear layers that `targets` name, in place.

    A is uniform in +-1/sqrt(in) and B is zero, as PEFT draws them, so that the policy starts as the reference.
    `scale` replaces alpha / rank (rank-stabilised adapters). Only the decoder's stacked layers can be adapted.

    Raises:
      UserError: a rank below 1, no target, or a target that matches nothing.
    """
    if rank < 1:
        raise UserError(f"lora.rank must be at least 1, not {rank}")
    targets = [targets] if isinstance(targets, str) else targets
    if not targets:
        raise UserError("lora.targets is empty: name the decoder's layers to adapt")
    layers = dict(linears(model.language.layers))
    for target in targets:
        if not any(matches(name, [target]) for name in layers):
            raise UserError(f"lora.targets: {target!r} matches no decoder layer; there are {', '.join(layers)}")
    for name, linear in layers.items():
        if not matches(name, targets):
            continue
        weight = linear.weight
        depth, *out, inputs = weight.shape
        bound = 1 / math.sqrt(inputs)
        a = jax.random.uniform(rngs.params(), (depth, rank, inputs), dtype, -bound, bound)
        *out_axes, in_axis = weight.axes
        linear.lora_a = nnx.LoRAParam(a, axes=("rank", in_axis))
        linear.lora_b = nnx.LoRAParam(jnp.zeros((depth, *out, rank), dtype), axes=(*out_axes, "rank"))
        linear.lora_scale = alpha / rank if scale is None else scale
