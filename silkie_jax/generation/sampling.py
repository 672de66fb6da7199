"""Which token comes next: the most probable one, or a draw from the nucleus (arXiv 1904.09751)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sample(
    logits: Float[Array, "B V"], temperature: Float[Array, ""], top_p: Float[Array, ""], key: jax.Array
) -> Int[Array, "B"]:
    """Draws from the smallest set of most probable ids whose probability reaches `top_p` (always at least one)."""
    logits = (logits - logits.max(-1, keepdims=True)) / temperature
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of the ids ranked above
    kept = ((before < top_p) | (top_p >= 1)).sum(-1, keepdims=True)
    threshold = jnp.take_along_axis(descending, jnp.maximum(kept, 1) - 1, axis=-1)
    return jax.random.categorical(key, jnp.where(logits >= threshold, logits, -jnp.inf))


def choose(
    logits: Float[Array, "B V"], temperature: Float[Array, "B"], top_p: Float[Array, "B"], keys: Array
) -> Int[Array, "B"]:
    """The next token of each row by its own options and key: temperature 0 is greedy, otherwise `sample` for it alone.

    A batch that needs no sorting of the vocabulary, or no draw, does without; what a row gets is the same either way.
    """
    warm = jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)

    def greedy() -> jax.Array:
        return logits.argmax(-1)

    def plain() -> jax.Array:
        def one(row: jax.Array, temperature: jax.Array, key: jax.Array) -> jax.Array:
            return jax.random.categorical(key, (row - row.max()) / temperature)

        return jnp.where(temperature > 0, jax.vmap(one)(logits, warm, keys), greedy())

    def nucleus() -> jax.Array:
        def one(row: jax.Array, temperature: jax.Array, top_p: jax.Array, key: jax.Array) -> jax.Array:
            return sample(row[None], temperature, top_p, key)[0]

        return jnp.where(temperature > 0, jax.vmap(one)(logits, warm, top_p, keys), greedy())

    drawn = temperature > 0
    which = jnp.where(drawn.any(), 1, 0) + jnp.where((drawn & (top_p < 1)).any(), 1, 0)
    return jax.lax.switch(which, [greedy, plain, nucleus])
