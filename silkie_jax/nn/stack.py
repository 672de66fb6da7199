"""Layers of one kind as one module whose arrays have a leading layer axis: compile time does not grow with depth.

Where a layer's work is hardly more than reading its weights, as in decoding, that axis costs a copy of them: `unstack`.
"""

from collections.abc import Callable

import jax
from flax import nnx


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` layers as one module whose arrays have a leading layer axis."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.fork().split(depth))


def scan(layers: nnx.Module, x: jax.Array, apply: Callable, wrap: Callable | None = None) -> jax.Array:
    """x = apply(layer, x) over stacked layers, compiled once whatever the depth; or over those of `unstack`."""
    stacked = not isinstance(layers, nnx.List)
    graph, state = nnx.split(layers if stacked else layers[0])

    def body(x: jax.Array, state: nnx.State) -> tuple[jax.Array, None]:
        return apply(nnx.merge(graph, state), x), None

    body = wrap(body) if wrap else body
    if stacked:
        return jax.lax.scan(body, x, state)[0]
    for layer in layers:
        x, _ = body(x, nnx.state(layer))
    return x


def unstack(layers: nnx.Module, *, free: bool = False) -> list[nnx.Module]:
    """Stacked layers as modules of their own. `free` gives the memory of each stacked array back as soon as it is cut.

    XLA copies a layer's weights out of a stacked array before it multiplies with them: on an H200 a decoding step of
    32 sequences of 1,024 tokens of Qwen-VL-Chat took 18.2 ms from stacked weights, 10.6 ms from these.
    """
    graph, state = nnx.split(layers)
    flat, apart = nnx.to_flat_state(state), []
    for path, variable in flat:
        x = variable.get_value()
        cut = _cut(x)
        if free and not isinstance(x, jax.core.Tracer):
            jax.block_until_ready(cut)
            x.delete()
        apart.append([(path, variable.replace(part)) for part in cut])
    return [nnx.merge(graph, nnx.from_flat_state(list(some))) for some in zip(*apart, strict=True)]


@jax.jit
def _cut(x: jax.Array) -> list[jax.Array]:
    return [x[i] for i in range(x.shape[0])]
