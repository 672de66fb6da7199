"""Layers of one kind as one module whose arrays have a leading layer axis: compile time does not grow with depth."""

from collections.abc import Callable

import jax
from flax import nnx


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` layers as one module whose arrays have a leading layer axis."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.fork().split(depth))


def scan(layers: nnx.Module, x: jax.Array, apply: Callable, wrap: Callable | None = None) -> jax.Array:
    """x = apply(layer, x) over stacked layers, compiled once whatever the depth."""
    graph, state = nnx.split(layers)

    def body(x: jax.Array, state: nnx.State) -> tuple[jax.Array, None]:
        return apply(nnx.merge(graph, state), x), None

    return jax.lax.scan(wrap(body) if wrap else body, x, state)[0]
